"""The rules between host and device, on a device that does its work as late and in whatever sequence it likes."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.pinned_link import PinnedLinkPort, PinnedPrefix
from cacheflow.engine.saver import PrefixSaver
from cacheflow.engine.transfer_port import StoreTransferPort, cell_key
from cacheflow.plan.grid import Cell, Tile
from cacheflow.stores.base import PutRequest
from cacheflow.stores.keys import RankKeys, chain_hashes
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.retention import Retention
from cacheflow.tensors.copy_lane import MAX_QUEUED, CopyLane
from cacheflow.tensors.pinned_memory import PinnedMemory
from cacheflow.tensors.staging import PinnedSlabs, StagingPool
from cacheflow.types import LoadOutcome
from support.engine_cases import prefilled, same_kv
from support.examples import examples
from support.fake_device import NONE_GOES_ON, FakeDevice, LateRunner

pytestmark = pytest.mark.torch


def lazy(num_ready):
    return NONE_GOES_ON


def chosen_by(rng, *, idle=0.5):
    return lambda num_ready: NONE_GOES_ON if rng.random() < idle else rng.randrange(num_ready)


def random_device(rng, idle):
    return FakeDevice(chosen_by(rng, idle=idle), favours=rng.choice((0, -1)))


class Restoration:
    """Both threads of a restoration played by one, in a sequence that a test chooses."""

    def __init__(self, case, device, levels, *, via_store=None):
        self.case, self.device = case, device
        self.runner = LateRunner(case.runner.model, device)
        self.kv = self.runner.new_kv(case.saved.capacity)
        device.finish()
        device.log.clear()
        device.asked.clear()
        self.compute = EngineComputePort(
            self.runner, grid=case.grid, tokens=case.tokens, kv=self.kv, layers_per_block=case.geometry.layers_per_block
        )
        if via_store is None:
            prefix = PinnedPrefix.save(case.saved, case.geometry)
            self.transfer = PinnedLinkPort(prefix, kv=self.kv)
        else:
            self.transfer = StoreTransferPort(via_store, geometry=case.geometry, kv=self.kv, **names(case))
        self.namespace, self.chain = names(case)["namespace"], [each.hex() for each in names(case)["chain_hashes"]]
        self.lent = []
        blocks = case.grid.num_blocks
        self.tiles = [
            (Tile(chunk, chunk + 1, block, block + 1), block == level - 1)
            for chunk, level in enumerate(levels)
            for block in range(level)
        ]
        self.reads = [
            Cell(chunk, block) for chunk, level in reversed(list(enumerate(levels))) for block in range(level, blocks)
        ]
        self.missing = [{cell.chunk for cell in self.reads if cell.block == block} for block in range(blocks)]
        self.tickets = []
        self.suffix_block = 0

    def moves(self):
        """What may be done now."""
        can_load = self.reads and len(self.tickets) < 8
        found = [self.recompute] * bool(self.tiles) + [self.start] * bool(can_load) + [self.place] * bool(self.tickets)
        if not self.tiles and self.suffix_block < len(self.missing) and not self.missing[self.suffix_block]:
            found.append(self.suffix)
        return found

    def recompute(self):
        tile, kv_only = self.tiles.pop(0)
        self.compute.recompute(tile, kv_only_top=kv_only)

    def start(self):
        cell = self.reads.pop(0)
        self.tickets.append((cell, self.transfer.start(cell, deadline_s=60.0)))

    def place(self):
        cell, ticket = self.tickets[0]
        outcome = self.transfer.wait(ticket, timeout_s=0.0)
        if outcome is None:  # no room, or the store's thread is still at it
            with self.device.lock:
                self.device.step()
            return
        assert outcome is LoadOutcome.OK
        self.lent.append(getattr(ticket, "loan", None) is not None and ticket.loan.payload is not None)
        self.transfer.place(ticket)
        self.tickets.pop(0)
        self.missing[cell.block].remove(cell.chunk)

    def suffix(self):
        self.compute.run_suffix(self.suffix_block, self.suffix_block + 1)
        self.suffix_block += 1

    def run(self, choose_move):
        while moves := self.moves():
            choose_move(moves)()
        waits_before_the_end = self.device.host_waits
        self.compute.finish()
        self.device.finish()
        return waits_before_the_end

    def is_exact(self):
        return torch.equal(self.compute.logits, self.case.logits) and same_kv(self.case, self.kv)


def names(case):
    return {"namespace": "0" * 32, "chain_hashes": chain_hashes(case.tokens, case.grid.chunk_ends)}


@pytest.fixture(scope="module")
def store():
    with MemoryStore(capacity_bytes=64 << 20, num_threads=1) as store:
        yield store


@st.composite
def staircases(draw, num_chunks=4, num_blocks=3):
    return sorted(
        draw(st.lists(st.integers(0, num_blocks), min_size=num_chunks, max_size=num_chunks)),
        reverse=True,
    )


@given(levels=staircases(), seed=st.integers(0, 2**32), idle=st.sampled_from([0.05, 0.5, 0.95, 1.0]))
@settings(max_examples=examples(40))
def test_bits_are_right_however_late_the_device_works(levels, seed, idle):
    rng = random.Random(seed)
    case = prefilled("llama", "bfloat16")
    restoration = Restoration(case, random_device(rng, idle), levels)
    assert restoration.run(rng.choice) == 0, "the host waited for the device before the first token"
    assert restoration.is_exact()


@given(levels=staircases(), seed=st.integers(0, 2**32), idle=st.sampled_from([0.05, 0.5, 0.95, 1.0]))
@settings(max_examples=examples(25))
def test_staging_memory_is_used_again_only_after_its_copy(store, levels, seed, idle):
    rng = random.Random(seed)
    case = prefilled("llama", "bfloat16")
    saver = PrefixSaver(store, geometry=case.geometry, **names(case))
    saver.save_prefix(case.saved)
    assert saver.wait(30.0).complete
    restoration = Restoration(case, random_device(rng, idle), levels, via_store=store)
    assert restoration.run(rng.choice) == 0
    assert restoration.is_exact()


@given(levels=staircases(), seed=st.integers(0, 2**32), idle=st.sampled_from([0.5, 0.95, 1.0]), room=st.integers(0, 2))
@settings(max_examples=examples(25))
def test_a_lent_record_is_uploaded_from_where_it_lies_and_kept_until_then(levels, seed, idle, room):
    """While the store is full and others write into it, so that what was read is evicted at once."""
    rng = random.Random(seed)
    case = prefilled("llama", "bfloat16")
    geometry, device = case.geometry, random_device(rng, idle)
    cells = list(Tile(0, case.grid.num_chunks, 0, case.grid.num_blocks).cells())
    sizes = {cell: geometry.num_bytes(cell) for cell in cells}
    full_bytes = sum(size + HEADER_BYTES for size in sizes.values())
    capacity_bytes = full_bytes + room * 2 * HEADER_BYTES
    with MemoryStore(capacity_bytes=capacity_bytes, num_threads=1, retention=Retention(pinned_share=1.0)) as store:
        store.lend_to(PinnedMemory(device))
        saver = PrefixSaver(store, geometry=geometry, **names(case))
        saver.save_prefix(case.saved)
        assert saver.wait(30.0).complete
        restoration = Restoration(case, device, levels, via_store=store)
        others, place = iter(range(1000)), restoration.place

        def place_and_push_out():
            """Others push out all but what is still to be read."""
            num_bytes = sizes[restoration.tickets[0][0]]
            place()
            left = [cell for cell, _ in restoration.tickets] + restoration.reads
            keys = [cell_key(restoration.namespace, restoration.chain[cell.chunk], geometry, cell) for cell in left]
            store.pin(keys, ttl_s=60.0)
            data = np.full(num_bytes, 255, np.uint8)  # not a number
            for _ in range(3):
                key = RankKeys().kv("f" * 32, f"{next(others):064x}", (0, 1))
                store.submit_put([PutRequest(key, [data], data.shape, "uint8")]).wait(20.0)
            store.unpin(keys)

        restoration.place = place_and_push_out
        assert restoration.run(rng.choice) == 0, "the host waited for the device before the first token"
        assert restoration.is_exact()
        assert all(restoration.lent), "a read went through staging memory"


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_a_cell_costs_its_copies_and_one_event(layers_per_block):
    case = prefilled("llama", "bfloat16", layers_per_block=layers_per_block)
    device = FakeDevice(chosen_by(random.Random(1)))
    restoration = Restoration(case, device, [0, 0, 0, 0])
    num_cells = len(restoration.reads)
    restoration.run(lambda moves: moves[-1])
    assert device.asked["up", "copy"] == 2 * 3 * case.grid.num_chunks  # keys and values of every layer and chunk
    assert device.asked["up", "record"] == num_cells
    # Compute waited for what was placed since it last looked: at most once a block of new tokens.
    assert 1 <= device.asked["compute", "wait_for"] <= case.grid.num_blocks


def test_compute_alone_never_waits_for_the_lane():
    device = FakeDevice(lazy)
    restoration = Restoration(prefilled("llama", "bfloat16"), device, [3, 3, 3, 3])
    restoration.run(lambda moves: moves[0])
    assert device.asked["compute", "wait_for"] == 0
    assert restoration.is_exact()


def test_uploads_that_are_not_done_are_bounded():
    case = prefilled("llama", "bfloat16", num_layers=6)
    device, most = FakeDevice(lazy), 0
    restoration = Restoration(case, device, [0, 0, 0, 0])
    up = device.streams[1]

    def look():
        nonlocal most
        most = max(most, up.num_queued("record"))

    device.on_ask = look
    restoration.run(lambda moves: moves[-1])
    assert most == MAX_QUEUED < len(restoration.case.grid.chunk_ends) * 6


def test_without_new_tokens_the_end_waits_for_every_upload():
    case = prefilled("llama", "bfloat16", suffix_ends=())
    restoration = Restoration(case, FakeDevice(lazy), [2, 1, 0, 0])
    restoration.run(lambda moves: moves[0])
    assert same_kv(case, restoration.kv)


def test_a_poisoned_buffer_keeps_lane_and_compute_apart():
    device = FakeDevice(lazy)
    runner = LateRunner(prefilled("llama", "bfloat16").runner.model, device)
    kv = runner.new_kv(8)
    assert device.shared == 2  # its memory outlives what either stream still has to do with it
    payload = torch.zeros(kv.cell(0, 1, 0, 8).nbytes, dtype=torch.uint8)
    kv.write_payload(payload, (0, 1, 0, 8))
    device.log.clear()
    kv.poison()
    assert device.log == [
        ("compute", "wait_for"),  # the upload
        ("down", "record"),
        ("compute", "wait_for"),  # what is being saved
        ("compute", "record"),  # the fill
        ("up", "wait_for"),
        ("down", "wait_for"),
    ]


@given(seed=st.integers(0, 2**32), idle=st.sampled_from([0.3, 0.9, 1.0]))
@settings(max_examples=examples(15))
def test_a_save_takes_one_copy_and_one_wait_a_chunk(seed, idle):
    case = prefilled("llama", "bfloat16")
    device = random_device(random.Random(seed), idle)
    runner = LateRunner(case.runner.model, device)
    kv = runner.new_kv(case.saved.capacity)
    compute = EngineComputePort(runner, grid=case.grid, tokens=case.tokens, kv=kv)
    for chunk in range(case.grid.num_chunks):
        compute.recompute(Tile(chunk, chunk + 1, 0, case.grid.num_blocks), kv_only_top=False)
    with MemoryStore(capacity_bytes=64 << 20, num_threads=1) as store:
        saver = PrefixSaver(store, geometry=case.geometry, **names(case))
        saver.save_prefix(kv)
        kv.kv_L2THD.fill_(float("nan"))  # nothing of the save may still be read from it
        assert saver.wait(30.0).complete
        loaded = case.runner.new_kv(case.saved.capacity)
        port = StoreTransferPort(store, geometry=case.geometry, kv=loaded, **names(case))
        for cell in Tile(0, case.grid.num_chunks, 0, case.grid.num_blocks).cells():
            ticket = port.start(cell, deadline_s=30.0)
            assert port.wait(ticket, timeout_s=30.0) is LoadOutcome.OK
            port.place(ticket)
    num_tokens = case.grid.num_tokens
    assert torch.equal(loaded.kv_L2THD[:, :, :num_tokens], case.saved.kv_L2THD[:, :, :num_tokens])
    assert device.asked["down", "copy"] == case.grid.num_chunks
    assert device.host_waits == case.grid.num_chunks


def test_a_pinned_prefix_is_one_wait_and_slabs():
    case = prefilled("llama", "bfloat16")
    device = FakeDevice(lazy, favours=-1)
    runner = LateRunner(case.runner.model, device)
    kv = runner.new_kv(case.saved.capacity)
    kv.kv_L2THD.copy_(case.saved.kv_L2THD)
    prefix = PinnedPrefix.save(kv, case.geometry)
    assert device.host_waits == 1
    assert device.pinned_bytes == [case.grid.num_tokens * case.runner.model.shape.kv_bytes_per_token]
    for cell in Tile(0, case.grid.num_chunks, 0, case.grid.num_blocks).cells():
        values = case.saved.cell(*case.geometry.extent(cell)).contiguous()
        assert torch.equal(prefix.payload(cell), values.view(-1).view(torch.uint8))


def test_a_caller_in_inference_mode_gets_a_buffer_that_others_can_write():
    case = prefilled("llama", "bfloat16")
    with torch.inference_mode():
        kv = case.runner.new_kv(8)
    kv.kv_L2THD.zero_()
    assert not kv.kv_L2THD.is_inference()


def test_one_engine_pins_once_for_all_restorations():
    device = FakeDevice(chosen_by(random.Random(3), idle=0.1))
    lane = CopyLane(device)
    for num_bytes in (70_000, 100_000, 131_072):
        pool = lane.staging(num_bytes)
        pool.give(pool.take())
    assert len(device.pinned_bytes) == 1


def test_slabs_hand_out_disjoint_aligned_pieces_and_grow():
    sizes = []

    def allocate(num_bytes):
        sizes.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    slabs = PinnedSlabs(allocate, slab_bytes=256)
    pieces = [slabs.take(each) for each in (100, 100, 60, 300, 10)]
    for index, piece in enumerate(pieces):
        piece.fill_(index + 1)
    assert [(piece.numel(), set(piece.tolist())) for piece in pieces] == [
        (100, {1}), (100, {2}), (60, {3}), (300, {4}), (10, {5})
    ]  # fmt: skip
    assert sizes == [256, 256, 300, 256]


def test_a_buffer_whose_copy_is_under_way_is_not_handed_out():
    class Copy:
        is_done = False

        def done(self):
            return self.is_done

    pool, copy = StagingPool(64), Copy()
    first = pool.take()
    pool.give(first, after=copy)
    second = pool.take()
    assert second is not first
    copy.is_done = True
    assert pool.take() is first
