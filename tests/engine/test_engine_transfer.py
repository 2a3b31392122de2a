"""Saving a prefix and loading it back: the store port, the saver, the pinned link."""

import pytest
import torch

from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.engine.saver import PrefixSaver, SaveReport
from cacheflow.engine.transfer_port import StoreTransferPort
from cacheflow.plan.grid import Cell, Tile
from cacheflow.stores.keys import Namespace, chain_hashes
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from support.engine_cases import prefilled, same_kv
from support.manual_clock import ManualClock

pytestmark = pytest.mark.torch


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=64 << 20, num_threads=1) as store:
        yield store


def names(case):
    namespace = Namespace(weights_fingerprint=case.runner.model.fingerprint, dtype="x", chunk_tokens=40).digest
    return {"namespace": namespace, "chain_hashes": chain_hashes(case.tokens, case.grid.chunk_ends)}


def cells(case):
    return list(Tile(0, case.grid.num_chunks, 0, case.grid.num_blocks).cells())


def load(port, tile):
    ticket = port.start(tile, deadline_s=5.0)
    assert port.wait(ticket, timeout_s=5.0) is LoadOutcome.OK
    port.place(ticket)
    return ticket.num_bytes


def finish(case, kv):
    port = case.new_port(kv)
    port.run_suffix(0, case.grid.num_blocks)
    port.finish()
    return port.logits


@pytest.mark.parametrize("layers_per_block", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_is_bit_equal(store, dtype, layers_per_block):
    case = prefilled("llama", dtype, layers_per_block=layers_per_block)
    saver = PrefixSaver(store, geometry=case.geometry, **names(case))
    saver.save_prefix(case.saved)
    num_cells = len(cells(case))
    assert saver.wait(5.0) == SaveReport(num_written=num_cells)
    again = PrefixSaver(store, geometry=case.geometry, **names(case))
    again.save_prefix(case.saved, first_chunk=1)
    assert again.wait(5.0).num_existing == num_cells - case.grid.num_blocks

    kv = case.runner.new_kv(case.saved.capacity)
    port = StoreTransferPort(store, geometry=case.geometry, kv=kv, **names(case))
    moved = sum(load(port, tile) for tile in reversed(cells(case)))
    assert moved == case.grid.num_tokens * case.runner.model.shape.kv_bytes_per_token
    assert torch.equal(finish(case, kv), case.logits)
    assert same_kv(case, kv)


def test_saving_copies_so_that_the_buffer_may_be_evicted(store):
    case = prefilled("llama", "float32")
    kv = case.runner.new_kv(case.saved.capacity)
    kv.kv_L2THD.copy_(case.saved.kv_L2THD)
    saver = PrefixSaver(store, geometry=case.geometry, **names(case))
    saver.save_prefix(kv)
    kv.poison()
    assert saver.wait(5.0).complete
    port = StoreTransferPort(store, geometry=case.geometry, kv=kv, **names(case))
    for tile in cells(case):
        load(port, tile)
    assert torch.equal(finish(case, kv), case.logits)


def test_a_missing_cell_is_a_miss_and_touches_nothing(store):
    case = prefilled("llama", "float32")
    kv = case.runner.new_kv(case.saved.capacity)
    port = StoreTransferPort(store, geometry=case.geometry, kv=kv, **names(case))
    ticket = port.start(Cell(0, 0), deadline_s=5.0)
    assert port.wait(ticket, timeout_s=5.0) is LoadOutcome.MISS
    port.cancel(ticket)
    assert kv.kv_L2THD.isnan().all()


def test_a_failed_write_is_counted(store):
    case = prefilled("llama", "float32")
    store.close()
    saver = PrefixSaver(store, geometry=case.geometry, **names(case))
    saver.save_prefix(case.saved)
    report = saver.wait(5.0)
    grid = case.geometry.grid
    assert report == SaveReport(num_failed=grid.num_chunks * grid.num_blocks)
    assert not report.complete


def test_pinned_link_restores_what_it_holds():
    case = prefilled("qwen3", "bfloat16", layers_per_block=2)
    prefix = PinnedPrefix.save(case.saved, case.geometry)
    kv = case.runner.new_kv(case.saved.capacity)
    port = PinnedLinkPort(prefix, kv=kv)
    tickets = [port.start(tile, deadline_s=5.0) for tile in cells(case)]
    for ticket in reversed(tickets):
        assert port.wait(ticket, timeout_s=1.0) is LoadOutcome.OK
        port.place(ticket)
    assert torch.equal(finish(case, kv), case.logits)
    assert same_kv(case, kv)


def test_pinned_link_keeps_its_pace():
    case = prefilled("llama", "float32")
    prefix = PinnedPrefix.save(case.saved, case.geometry)
    kv = case.runner.new_kv(case.saved.capacity)
    rate = case.geometry.num_bytes(Cell(0, 0)) / 0.02
    clock = ManualClock()
    port = PinnedLinkPort(prefix, kv=kv, bytes_per_s=rate, clock=clock)
    tickets = [port.start(Cell(0, block), deadline_s=5.0) for block in (0, 1)]
    arrived = []
    for step_s in (0.019, 0.002, 0.018, 0.002):
        clock.sleep(step_s)
        arrived.append([port.wait(ticket, timeout_s=0.0) for ticket in tickets])
    ok = LoadOutcome.OK
    assert arrived == [[None, None], [ok, None], [ok, None], [ok, ok]]


def test_a_late_cell_on_the_pinned_link_touches_nothing():
    case = prefilled("llama", "float32")
    kv = case.runner.new_kv(case.saved.capacity)
    port = PinnedLinkPort(PinnedPrefix.save(case.saved, case.geometry), kv=kv, bytes_per_s=1.0)
    ticket = port.start(Cell(0, 0), deadline_s=0.005)
    assert port.wait(ticket, timeout_s=5.0) is LoadOutcome.LATE
    port.cancel(ticket)
    assert kv.kv_L2THD.isnan().all()
