"""The golden truth: a session evicted before every turn equals one that never was, bit for bit."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from cacheflow.embedded import restorer
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.model import LoadedModel
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.stores.base import Store
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.throttled import ThrottledStore
from support.embedded_cases import (
    FAMILIES,
    TURN_TOKENS,
    answer,
    assert_nothing_runs,
    assert_same,
    balanced_bytes_per_s,
    make_engine,
    never_evicted,
    sampling_of,
    tiny,
    turns,
)
from support.store_kinds import ALL, url_of

POLICIES = tuple(RESTORE_POLICIES)
HYBRIDS = ("cake", "cacheflow_v1", "cacheflow_v2", "cacheflow")
DTYPES = ("float32", "bfloat16")
CAPACITY = 64 << 20


@contextmanager
def opened(kind: str, url: str, model: LoadedModel) -> Iterator[Store]:
    store = open_store(url, capacity_bytes=CAPACITY)
    if kind == "throttled":
        store = ThrottledStore(store, balanced_bytes_per_s(model))
    with store:
        yield store


@dataclass
class Split:
    """Cells of a whole conversation, by who restored them."""

    recomputed: int = 0
    loaded: int = 0


def play_evicted(
    model: LoadedModel, store: Store, policy: str, *, layers_per_block: int = 1, cell_s: float = 1e-3
) -> Split:
    """Play every turn from an evicted state and compare it with the session that never was."""
    reference = never_evicted(model, layers_per_block=layers_per_block)
    engine = make_engine(model, store, policy=policy, layers_per_block=layers_per_block, cell_s=cell_s)
    session, split = engine.session(), Split()
    for turn, tokens in enumerate(turns()):
        session.evict()
        played = answer(session, tokens, sampling=sampling_of(turn))
        assert_same(played, reference[turn])
        report = played.reply.report
        assert (report is not None) == (turn > 0)
        if report is not None:
            assert report.plan.policy == policy
            assert report.failed_loads == {}
            assert played.reply.restored_tokens == len(session.tokens) - len(played.reply.tokens) - (
                played.reply.suffix_tokens
            )
            split.recomputed += report.recomputed_cells
            split.loaded += report.loaded_cells
    assert_nothing_runs()
    return split


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [*ALL, "throttled"])
def test_every_policy_over_every_store(kind, policy, dtype, tmp_path, request):
    model = tiny("llama", dtype)
    url = url_of("memory" if kind == "throttled" else kind, request, tmp_path / "store")
    with opened(kind, url, model) as store:
        split = play_evicted(model, store, policy)
    if policy == "recompute":
        assert split.loaded == 0
    if policy in ("load", "layerwise_load"):
        assert split.recomputed == 0
    assert split.recomputed + split.loaded > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["layerwise_load", "cake", "cacheflow"])
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_every_family(family, policy, dtype):
    model = tiny(family, dtype)
    assert (model.shape.sliding_window is not None) == (family == "mistral")
    with opened("throttled", "memory", model) as store:
        play_evicted(model, store, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_layers_of_two_kinds(policy):
    model = tiny("qwen2", "bfloat16", windowed=True)
    assert set(model.module.config.layer_types) == {"full_attention", "sliding_attention"}
    with opened("throttled", "memory", model) as store:
        play_evicted(model, store, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_of_two_layers_the_top_one_cut_short(policy):
    model = tiny("qwen3", "bfloat16")
    assert model.shape.num_layers == 3
    with opened("throttled", "memory", model) as store:
        play_evicted(model, store, policy, layers_per_block=2)


@pytest.mark.parametrize("policy", HYBRIDS)
def test_compute_and_link_meet_in_the_middle(policy, tmp_path, monkeypatch):
    """Compute and link held to the same pace: both restore a share, whatever the machine is busy with."""
    cell_s = 0.004

    class PacedCompute(EngineComputePort):
        def recompute(self, tile, *, kv_only_top):
            time.sleep(cell_s * tile.num_cells)
            super().recompute(tile, kv_only_top=kv_only_top)

    monkeypatch.setattr(restorer, "EngineComputePort", PacedCompute)
    model = tiny("llama", "bfloat16")
    with ThrottledStore(MemoryStore(capacity_bytes=CAPACITY), balanced_bytes_per_s(model, cell_s=cell_s)) as store:
        split = play_evicted(model, store, policy, cell_s=cell_s)
    assert split.recomputed > 0
    assert split.loaded > 0


def test_with_as_many_threads_as_torch_likes(torch_threads):
    """The other cases run on one thread; float32 with few rows is where more threads round differently."""
    torch.set_num_threads(torch_threads)
    model = tiny("qwen3", "float32", seed=1)
    with opened("memory", "memory", model) as store:
        play_evicted(model, store, "cacheflow")


def test_the_conversation_has_partial_chunks_and_a_turn_below_a_chunk():
    """What the cases above rest on."""
    reference = never_evicted(tiny("llama", "float32"))
    ends = reference[-1].chunk_ends
    lengths = [hi - lo for lo, hi in zip((0, *ends), ends, strict=False)]
    assert len(reference) == len(TURN_TOKENS)
    assert set(lengths) >= {32, 22}
    assert min(lengths) < 8
    assert {len(played.reply.tokens) for played in reference} == {4}
