"""How the compute port keeps a chunk's activations, over a fake forward; no vLLM needed."""

from types import SimpleNamespace

import pytest
import torch

from cacheflow.plan.grid import Tile
from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.models.boundary_states import BoundaryPart, BoundaryShape
from cacheflow.vllm.worker.recompute import VllmComputePort

pytestmark = pytest.mark.torch

WIDTH, LAYERS = 4, 6


class FakeForward:
    """Overwrites what it is given as vLLM's layers do, and remembers what it was asked."""

    def __init__(self, *, first_stage=True, compiled=False, refusal=""):
        self.handle = SimpleNamespace(
            num_layers=LAYERS, block_size=4, compiled=compiled, is_first_stage=first_stage, can_recompute=not refusal,
            refusal=refusal, device=torch.device("cpu"),
            boundary=BoundaryShape((BoundaryPart("hidden", (WIDTH,), torch.float32),)),
        )  # fmt: skip
        self.calls = []
        self.next_tokens = []

    def piece(self, start, tokens, block_ids, boundary=None, *, state_blocks=(), next_token=None, adapter=None):
        self.next_tokens.append(next_token)
        return SimpleNamespace(start=start, end=start + len(tokens), tokens=tuple(tokens), boundary=boundary)

    def run(self, piece, carry, *, layers, kv_only_top):
        self.calls.append((piece.tokens, carry, layers, kv_only_top))
        if piece.boundary is not None:
            piece.boundary["hidden"].add_(1)
        return None if kv_only_top else f"carry of {layers[1]}"

    def run_whole(self, piece):
        self.calls.append((piece.tokens, piece.boundary is not None))


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
    port.give(0, stored.numpy().view("uint8").reshape(-1), 4)
    given = []
    forward.run = lambda piece, carry, **_: given.append(piece.boundary["hidden"])
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=False)
    assert torch.equal(given[0], stored[4:])


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
