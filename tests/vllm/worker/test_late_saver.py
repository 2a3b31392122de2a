"""Chunks leave a device that does its work late: a snapshot at once, the host's copy on another thread."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.grid import block_layers
from cacheflow.stores.base import GetRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.types import LoadOutcome
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import SaveWork
from cacheflow.vllm.worker import saver as saver_module
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.saver import ChunkSaver, snapshot_room
from cacheflow.vllm.worker.state_blocks import StateBlocks
from support.examples import examples
from support.fake_device import NONE_GOES_ON, FakeDevice

pytestmark = pytest.mark.torch

NAMESPACE, SIZE, LAYERS, PER_BLOCK, NUM_BLOCKS, CHUNK = "a" * 32, 4, 5, 2, 16, 8
ROWS = [block_layers(block, PER_BLOCK, LAYERS) for block in range(3)]
STATE_BLOCKS = (14, 15)


def random_device(seed, idle):
    rng = random.Random(seed)
    return FakeDevice(
        lambda num_ready: NONE_GOES_ON if rng.random() < idle else rng.randrange(num_ready), favours=rng.choice((0, -1))
    )


def order(chunk, **arguments):
    ids = (2 * chunk, 2 * chunk + 1)
    return SaveWork(namespace=NAMESPACE, chain_hash=f"{chunk:064x}", block_ids=ids, **arguments)


class Case:
    """A saver over KV blocks on a device, running states in two groups of blocks, and a store."""

    def __init__(self, device, *, batch_tokens=64):
        self.device, self.lane = device, CopyLane(device)
        self.views = [
            LayerView(f"layers.{index}", torch.zeros(NUM_BLOCKS, heads, SIZE, 3, dtype=torch.bfloat16))
            for index, heads in enumerate((2, 1, 1, 1, 4))
        ]
        self.layout = BlockLayout(self.views, block_size=SIZE, layout_name="LBHNC", lane=self.lane)
        self.state_views = [LayerView(f"state.{index}", torch.zeros(NUM_BLOCKS, 7)) for index in range(LAYERS)]
        self.states = StateBlocks(
            BlockLayout(self.state_views, block_size=SIZE, layout_name="states", lane=self.lane),
            group_L=[index % 2 for index in range(LAYERS)], layers_R=[1] * LAYERS, num_groups=2,
        )  # fmt: skip
        self.room = snapshot_room(self.layout, self.states, chunk_tokens=CHUNK, batch_tokens=batch_tokens)
        self.store, self.counts = MemoryStore(capacity_bytes=1 << 20), Counts()
        self.saver = ChunkSaver(
            self.store, self.layout, layers_per_block=PER_BLOCK, keys=RankKeys(), counts=self.counts,
            states=self.states, room=self.room,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(3)
        self.expected = {}

    def close(self):
        self.saver.close()
        self.store.close()

    def forward(self, *block_ids):
        """Kernels that write blocks, launched and not done; what they write is returned by layer."""
        written = [torch.randn(len(block_ids), *v.blocks_NI.shape[1:], generator=self.generator).bfloat16()
                   for v in self.views]  # fmt: skip

        def write():
            for view, values in zip(self.views, written, strict=True):
                view.blocks_NI[list(block_ids)] = values

        self.device.compute.launch(write)
        return written

    def advance_states(self):
        """Kernels that write the running states."""
        written = [torch.randn(7, generator=self.generator) for _ in self.state_views]

        def write():
            for index, (view, values) in enumerate(zip(self.state_views, written, strict=True)):
                view.blocks_NI[STATE_BLOCKS[index % 2]] = values

        self.device.compute.launch(write)
        return written

    def compute_and_save(self, chunk, **arguments):
        save = order(chunk, **arguments)
        written = self.forward(*save.block_ids)
        self.expected[chunk] = [b"".join(as_bytes(values) for values in written[lo:hi]) for lo, hi in ROWS]
        self.saver.save([save])

    def read(self, key, size):
        buffer = np.zeros(size, dtype=np.uint8)
        (outcome,) = self.store.submit_get([GetRequest(key, buffer)]).wait(20)
        return outcome, buffer.tobytes()

    def holds(self, chunk):
        """Whether the store has a chunk as it was computed."""
        return all(
            self.read(RankKeys().kv(NAMESPACE, order(chunk).chain_hash, layers), len(payload))
            == (LoadOutcome.OK, payload)
            for layers, payload in zip(ROWS, self.expected[chunk], strict=True)
        )

    def holds_states(self, chunk, written):
        payloads = [b"".join(as_bytes(values) for values in written[lo:hi]) for lo, hi in ROWS]
        return all(
            self.read(RankKeys().states(NAMESPACE, order(chunk).chain_hash, rows), len(payload))
            == (LoadOutcome.OK, payload)
            for rows, payload in zip(ROWS, payloads, strict=True)
        )

    def take(self):
        return self.counts.take().get("chunks_saved", {})


def as_bytes(values):
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(
    seed=st.integers(0, 2**32),
    idle=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    reused=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(max_examples=examples(30))
def test_what_a_forward_left_is_saved_whatever_the_next_one_writes(seed, idle, reused):
    case = Case(random_device(seed, idle))
    try:
        for chunk, again in enumerate(reused):
            case.compute_and_save(chunk)
            if again:  # the request has ended, and another one computes in its blocks
                case.forward(*order(chunk).block_ids)
        assert case.saver.wait(20)
        assert case.take() == {"stored": len(reused)}
        assert all(map(case.holds, range(len(reused))))
        assert set(case.device.waits_by_thread) == {"cacheflow-save"}, "the thread that launches forwards never waits"
    finally:
        case.close()


def test_a_chunk_costs_one_snapshot_one_copy_and_one_wait_of_the_savers_thread():
    case = Case(FakeDevice(lambda num_ready: 0))
    num_chunks, device = 4, case.device
    pinned = list(device.pinned_bytes)
    device.asked.clear()
    for chunk in range(num_chunks):
        case.compute_and_save(chunk)
    assert case.saver.wait(20)
    assert case.take() == {"stored": num_chunks}
    assert device.asked["compute", "launch"] == 2 * num_chunks  # the forward and the snapshot
    assert device.asked["compute", "send"] == num_chunks  # the numbers of its blocks
    assert device.asked["compute", "record"] == num_chunks
    assert device.asked["compute", "wait_for"] == 0
    assert device.asked["down", "wait_for"] == num_chunks
    assert device.asked["down", "copy"] == num_chunks  # all layers at once
    assert device.asked["down", "record"] == num_chunks
    assert device.waits_by_thread == {"cacheflow-save": num_chunks}
    assert pinned, "memory for the host's copies is pinned before the first chunk"
    assert device.pinned_bytes == pinned
    case.close()


def test_without_room_a_chunk_is_skipped_and_counted_and_nobody_waits():
    """The device stands still for a while: what fits is saved, the first chunks first."""
    case = Case(FakeDevice(lambda num_ready: NONE_GOES_ON), batch_tokens=2 * CHUNK)
    assert case.room.num_slots == 3
    with case.device.lock:  # whoever waits for the device gets nowhere
        for chunk in range(5):
            case.compute_and_save(chunk)
        assert case.take() == {"skipped": 2}
        assert case.device.waits_by_thread.keys() <= {"cacheflow-save"}
    assert case.saver.wait(20)
    assert case.take() == {"stored": 3}
    assert all(map(case.holds, range(3)))
    case.compute_and_save(3)  # there is room again
    assert case.saver.wait(20)
    assert case.take() == {"stored": 1}
    assert case.holds(3)
    case.close()


@pytest.mark.parametrize("seed", range(4))
def test_states_are_saved_as_they_were_and_kept_ones_leave_the_device_at_once(seed):
    case = Case(random_device(seed, 0.9), batch_tokens=CHUNK)
    assert case.room.num_slots == 2
    first = case.advance_states()
    case.compute_and_save(0, state_blocks=STATE_BLOCKS, request_id="a")
    assert case.saver.wait(20)
    second = case.advance_states()
    case.compute_and_save(1, state_blocks=STATE_BLOCKS, request_id="a", keep=True)
    case.advance_states()
    assert case.saver.wait(20)
    case.compute_and_save(2)
    assert case.saver.wait(20)
    case.compute_and_save(3)  # kept states hold no room: chunks go on
    assert case.saver.wait(20)
    case.saver.write_kept(["a"])
    assert case.saver.wait(20)
    assert case.take() == {"stored": 4}
    assert case.holds_states(0, first)
    assert case.holds_states(1, second)
    case.close()


def test_there_is_room_for_the_longest_pass_within_bounds(monkeypatch):
    case = Case(FakeDevice(lambda num_ready: 0), batch_tokens=10 * CHUNK)
    assert case.room.num_slots == 11  # a pass may begin inside a chunk
    slot_bytes = case.room.slot_bytes
    assert slot_bytes >= case.layout.num_bytes(0, LAYERS, CHUNK // SIZE)
    monkeypatch.setattr(saver_module, "MAX_SNAPSHOT_BYTES", 3 * slot_bytes)
    assert Case(FakeDevice(lambda num_ready: 0), batch_tokens=10 * CHUNK).room.num_slots == 3
    monkeypatch.setattr(saver_module, "MAX_SNAPSHOT_BYTES", 1)
    assert Case(FakeDevice(lambda num_ready: 0), batch_tokens=10 * CHUNK).room.num_slots == 1
    on_cpu = BlockLayout(case.views, block_size=SIZE, layout_name="LBHNC")
    assert snapshot_room(on_cpu, chunk_tokens=CHUNK, batch_tokens=64) is None
    case.close()
