"""The same promises on a CUDA device."""

import pytest
import torch

from cacheflow.engine.families import FAMILIES
from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.saver import PrefixSaver
from cacheflow.engine.selftest import self_test
from cacheflow.engine.transfer_port import StoreTransferPort
from cacheflow.plan.grid import Cell, Tile
from cacheflow.stores.keys import Namespace, chain_hashes
from cacheflow.stores.opening import open_store
from cacheflow.tensors.pinned_memory import PinnedMemory
from cacheflow.types import LoadOutcome
from support.engine_cases import prefilled, restore, same_kv
from support.lending import borrow
from support.store_kinds import shm_url
from support.store_objects import put

pytestmark = [
    pytest.mark.torch,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_self_test_passes(family, dtype):
    assert self_test(tiny_model(family, dtype=dtype, device="cuda")).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_self_test_passes_with_a_window_that_cuts_in(dtype):
    assert self_test(tiny_model("mistral", dtype=dtype, device="cuda", sliding_window=24)).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("levels", [[3, 3, 3, 3], [3, 2, 1, 0], [0, 0, 0, 0]])
def test_staircases_are_bit_equal(levels, dtype):
    case = prefilled("llama", dtype, device="cuda")
    kv, port = restore(case, levels)
    assert same_kv(case, kv)
    assert torch.equal(port.logits, case.logits)


def all_cells(case):
    return list(Tile(0, case.grid.num_chunks, 0, case.grid.num_blocks).cells())


def restore_through(case, kv, port):
    tickets = [port.start(tile, deadline_s=10.0) for tile in all_cells(case)]
    for ticket in tickets:
        assert port.wait(ticket, timeout_s=10.0) is LoadOutcome.OK
        port.place(ticket)
    compute = case.new_port(kv)
    compute.run_suffix(0, case.grid.num_blocks)
    compute.finish()
    return compute.logits


@pytest.mark.parametrize("bytes_per_s", [float("inf"), 1e6])
def test_pinned_link_restores_on_its_own_stream(bytes_per_s):
    case = prefilled("llama", "bfloat16", device="cuda")
    prefix = PinnedPrefix.save(case.saved, case.geometry)
    assert prefix.payload(Cell(0, 0)).is_pinned()
    kv = case.runner.new_kv(case.saved.capacity)
    logits = restore_through(case, kv, PinnedLinkPort(prefix, kv=kv, bytes_per_s=bytes_per_s))
    assert torch.equal(logits, case.logits)
    assert same_kv(case, kv)


def test_a_caller_in_inference_mode_restores_all_the_same():
    case = prefilled("llama", "bfloat16", device="cuda")
    prefix = PinnedPrefix.save(case.saved, case.geometry)
    with torch.inference_mode():
        kv = case.runner.new_kv(case.saved.capacity)
        logits = restore_through(case, kv, PinnedLinkPort(prefix, kv=kv))
    assert torch.equal(logits, case.logits)


def names_of(case):
    return {
        "namespace": Namespace(weights_fingerprint="w", dtype="bfloat16", chunk_tokens=40).digest,
        "chain_hashes": chain_hashes(case.tokens, case.grid.chunk_ends),
    }


@pytest.mark.parametrize("kind", ["staged", "memory", "shm"])
def test_store_round_trip_through_pinned_staging_or_from_where_records_lie(kind, request):
    case = prefilled("llama", "bfloat16", device="cuda")
    url = shm_url(request) if kind == "shm" else "memory"
    with open_store(url, capacity_bytes=64 << 20) as store:
        if kind != "staged":
            store.lend_to(PinnedMemory(case.saved.lane.streams))
        saver = PrefixSaver(store, geometry=case.geometry, **names_of(case))
        saver.save_prefix(case.saved)
        assert saver.wait(10.0).complete
        for _ in range(3):  # what is shared is lent from the second time on
            kv = case.runner.new_kv(case.saved.capacity)
            port = StoreTransferPort(store, geometry=case.geometry, kv=kv, **names_of(case))
            assert torch.equal(restore_through(case, kv, port), case.logits)
            assert same_kv(case, kv)


@pytest.mark.parametrize("kind", ["memory", "shm"])
def test_a_lent_record_is_page_locked(kind, request):
    case = prefilled("llama", "bfloat16", device="cuda")
    url = shm_url(request) if kind == "shm" else "memory"
    with open_store(url, capacity_bytes=64 << 20) as store:
        store.lend_to(PinnedMemory(case.saved.lane.streams))
        put(store, 1)
        borrow(store, 1)[1].end()
        outcome, loan, _ = borrow(store, 1)
        assert outcome is LoadOutcome.OK
        assert torch.from_numpy(loan.payload).is_pinned()
        loan.end()
