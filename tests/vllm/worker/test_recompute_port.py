"""How the compute port keeps a chunk's activations, over a fake forward; no vLLM needed."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from cacheflow.plan.grid import Boundary, Tile
from cacheflow.restore.work import RestoreTarget
from cacheflow.stores.base import PutRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.types import LoadOutcome
from cacheflow.vllm.models.boundary_states import BoundaryPart, BoundaryShape
from cacheflow.vllm.worker.layout import BlockLayout, LayerView
from cacheflow.vllm.worker.recompute import VllmComputePort
from cacheflow.vllm.worker.transfer import BoundaryReads, VllmTransferPort, boundary_pool
from support.examples import examples
from support.fake_device import NONE_GOES_ON, PromptDevice

pytestmark = pytest.mark.torch

WIDTH, LAYERS = 4, 6


class FakeForward:
    """Overwrites what it is given as vLLM's layers do, and remembers what it was asked."""

    def __init__(self, *, first_stage=True, compiled=False, refusal="", lane=None):
        self.handle = SimpleNamespace(
            num_layers=LAYERS, block_size=4, compiled=compiled, is_first_stage=first_stage, can_recompute=not refusal,
            refusal=refusal, device=torch.device("cpu"),
            boundary=BoundaryShape((BoundaryPart("hidden", (WIDTH,), torch.float32),)),
        )  # fmt: skip
        self.lane = lane
        self.calls = []
        self.next_tokens = []

    def segment(self, start, tokens, block_ids, boundary=None, *, state_blocks=(), next_token=None, adapter=None):
        self.next_tokens.append(next_token)
        return SimpleNamespace(start=start, end=start + len(tokens), tokens=tuple(tokens), boundary=boundary)

    def run(self, segment, carry, *, layers, kv_only_top):
        self.calls.append((segment.tokens, carry, layers, kv_only_top))
        if segment.boundary is not None:
            segment.boundary["hidden"].add_(1)
        return None if kv_only_top else f"carry of {layers[1]}"

    def run_whole(self, segment):
        self.calls.append((segment.tokens, segment.boundary is not None))


def new_port(forward, *, start=0, layers_per_block=2):
    target = RestoreTarget(
        restore_id=0, request_id="r", start=start, object_start=0, chunk_ends=(8, 16), tokens=tuple(range(start, 16)),
        block_ids=(3, 2, 1, 0), namespace="n", chain_hashes=("h", "h"), layers_per_block=layers_per_block,
        next_token=99,
    )  # fmt: skip
    return VllmComputePort(forward, target)


def test_blocks_become_layers_and_the_top_one_writes_alone():
    forward = FakeForward()
    port = new_port(forward, start=4, layers_per_block=4)
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=False)
    port.recompute(Tile(0, 1, 1, 2), kv_only_top=False)
    tokens = (4, 5, 6, 7)
    assert forward.calls == [(tokens, None, (0, 4), False), (tokens, "carry of 4", (4, 6), True)]


def test_a_drafter_is_told_the_token_after_each_chunk():
    forward = FakeForward()
    port = new_port(forward)
    port.recompute(Tile(0, 1, 0, 3), kv_only_top=False)
    port.recompute(Tile(1, 2, 0, 3), kv_only_top=False)
    assert forward.next_tokens == [8, 99]


@pytest.mark.parametrize("tile", [Tile(0, 2, 0, 1), Tile(1, 2, 1, 2), Tile(0, 1, 0, 4)])
def test_tiles_that_do_not_continue_a_chunk_are_bugs(tile):
    with pytest.raises(ValueError, match="does not continue"):
        new_port(FakeForward()).recompute(tile, kv_only_top=False)


def test_a_chunk_that_ended_in_keys_and_values_must_be_restarted():
    forward = FakeForward()
    port = new_port(forward)
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=True)
    with pytest.raises(ValueError, match="spent; restart it"):
        port.recompute(Tile(0, 1, 1, 2), kv_only_top=False)
    port.restart(0)
    port.recompute(Tile(0, 1, 0, 2), kv_only_top=False)
    assert forward.calls[-1] == (tuple(range(8)), None, (0, 4), False)


def test_a_later_stage_starts_from_its_boundary_states_again_and_again():
    forward = FakeForward(first_stage=False)
    port = new_port(forward)
    with pytest.raises(ValueError, match="chunk 1 has no boundary states"):
        port.recompute(Tile(1, 2, 0, 1), kv_only_top=False)
    states = torch.zeros(8, WIDTH)
    port.seed(1, {"hidden": states})
    for _ in range(2):
        port.recompute(Tile(1, 2, 0, 1), kv_only_top=False)
        port.restart(1)
    assert not states.any()
    with pytest.raises(ValueError, match=r"states hidden are \(4, 4\) of torch.float32, must be \(8, 4\)"):
        port.seed(1, {"hidden": states[:4]})
    with pytest.raises(ValueError, match="states hidden are missing"):
        port.seed(1, {"residual": states})


def test_stored_states_are_given_without_those_of_tokens_that_are_there():
    forward = FakeForward(first_stage=False)
    port = new_port(forward, start=4)
    stored = torch.arange(8 * WIDTH, dtype=torch.float32).view(8, WIDTH)
    assert port.give(0, stored.view(-1).view(torch.uint8), 4) is None  # copied at once
    given = []
    forward.run = lambda segment, carry, **_: given.append(segment.boundary["hidden"])
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=False)
    assert torch.equal(given[0], stored[4:])


def save_states(store, number):
    stored = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
    key = RankKeys().boundary("a" * 32, f"{number:064x}")
    packed = stored.view(-1).view(torch.uint8).numpy()
    store.submit_put([PutRequest(key, [packed], (packed.size,), "uint8")]).wait(5)
    return stored


@for_all(seed=st.integers(0, 2**32), idle=st.sampled_from([0.5, 0.95, 1.0]))
@settings(max_examples=examples(20))
def test_stored_states_are_right_however_late_they_come_to_a_device(seed, idle):
    """Through pinned memory that is used again for the next chunk's, while others are being recomputed."""
    rng, num_chunks = random.Random(seed), 6
    device = PromptDevice(lambda num_ready: NONE_GOES_ON if rng.random() < idle else rng.randrange(num_ready))
    lane = CopyLane(device)
    views = [LayerView(f"layers.{index}", torch.zeros(16, 1, 4, 2)) for index in range(LAYERS)]
    layout = BlockLayout(views, block_size=4, layout_name="LBHNC", lane=lane)
    target = RestoreTarget(
        restore_id=0, request_id="r", start=0, object_start=0, chunk_ends=tuple(range(8, 8 * num_chunks + 1, 8)),
        tokens=tuple(range(8 * num_chunks)), block_ids=tuple(range(2 * num_chunks)), namespace="a" * 32,
        chain_hashes=tuple(f"{chunk:064x}" for chunk in range(num_chunks)), layers_per_block=2, next_token=99,
    )  # fmt: skip
    forward = FakeForward(first_stage=False, lane=lane)
    compute, given = VllmComputePort(forward, target), {}
    forward.run = lambda segment, carry, **_: given.update({segment.start // 8: segment.boundary["hidden"].clone()})
    token_bytes = forward.handle.boundary.token_bytes
    pool = boundary_pool(layout, token_bytes=token_bytes, chunk_tokens=8)
    num_pinned = len(device.pinned_bytes)
    with MemoryStore(capacity_bytes=1 << 20) as store:
        stored = [save_states(store, number) for number in range(num_chunks)]
        reads = BoundaryReads(pool=pool, token_bytes=token_bytes, give=compute.give)
        port = VllmTransferPort(store, layout, target, pool=pool, boundaries=reads)
        for chunk in range(num_chunks):
            ticket = port.start(Boundary(chunk), deadline_s=60.0)
            ticket.handle.wait(20.0)
            assert port.wait(ticket, timeout_s=1.0) is LoadOutcome.OK
            port.place(ticket)
            if rng.random() < 0.5:
                compute.recompute(Tile(chunk, chunk + 1, 0, 1), kv_only_top=False)
        assert device.host_waits == 0
        for chunk in set(range(num_chunks)) - set(given):
            compute.recompute(Tile(chunk, chunk + 1, 0, 1), kv_only_top=False)
    assert all(torch.equal(given[chunk], stored[chunk]) for chunk in range(num_chunks))
    assert num_pinned == 1, "pinned before the first read"
    assert device.shared >= num_chunks, "memory of the upload's stream, which compute reads"


def test_a_compiled_engine_runs_whole_passes():
    forward = FakeForward(compiled=True)
    port = new_port(forward, layers_per_block=LAYERS)
    port.recompute(Tile(1, 2, 0, 1), kv_only_top=True)
    assert forward.calls == [(tuple(range(8, 16)), False)]
    with pytest.raises(ValueError, match="does not continue"):
        port.recompute(Tile(1, 2, 0, 1), kv_only_top=False)
    with pytest.raises(ValueError, match="whole passes"):
        new_port(forward, layers_per_block=1)


def test_finishing_frees():
    forward = FakeForward()
    port = new_port(forward)
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=False)
    port.finish()
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=False)


def test_what_cannot_be_served_is_a_bug():
    with pytest.raises(ValueError, match="LoRA is on"):
        new_port(FakeForward(refusal="LoRA is on"))
    with pytest.raises(ValueError, match="do not end on blocks of 4"):
        new_port(FakeForward(), start=3)
    with pytest.raises(ValueError, match="vLLM runs the suffix itself"):
        new_port(FakeForward()).run_suffix(0, 1)
