"""Sessions of a model with recurrent layers: evicted before every turn or never, the answers are the same bits."""

from __future__ import annotations

import pytest
import torch

from cacheflow.embedded import Engine
from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.transfer_port import state_key
from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Grid
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.stores.base import Store
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import ObjectKey, ObjectKind, chain_hashes
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from support.embedded_cases import (
    NEW_TOKENS,
    answer,
    assert_nothing_runs,
    assert_same,
    balanced_bytes_per_s,
    make_engine,
    never_evicted,
    random_tokens,
    sampling_of,
    tiny,
    turns,
)

FAMILY, CHUNK, ROW = "qwen3_5_text", 64, 4
CAPACITY = 64 << 20
HYBRID_POLICIES = ("cake", "cacheflow_v2", "cacheflow")


def hybrid_engine(store: Store, *, dtype: str = "bfloat16", **options) -> Engine:
    return make_engine(tiny(FAMILY, dtype), store, chunk_tokens=CHUNK, **options)


def play(engine: Engine, *, dtype: str = "bfloat16"):
    """Every turn from an evicted state, each compared with the session that never was; the replies."""
    reference = never_evicted(tiny(FAMILY, dtype), CHUNK, ROW)
    session, replies = engine.session(), []
    for turn, tokens in enumerate(turns()):
        session.evict()
        played = answer(session, tokens, sampling=sampling_of(turn))
        assert_nothing_runs()
        assert_same(played, reference[turn])
        replies.append(played.reply)
    return replies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", RESTORE_POLICIES)
def test_every_policy_restores_a_hybrid(policy: str, dtype: str):
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        for reply in play(hybrid_engine(store, policy=policy, dtype=dtype), dtype=dtype)[1:]:
            assert reply.report is not None
            assert reply.report.failed_loads == {}
            assert reply.restored_tokens > 0


@pytest.mark.parametrize("policy", HYBRID_POLICIES)
def test_compute_and_a_slow_link_share_a_hybrid(policy: str):
    model = tiny(FAMILY)
    with ThrottledStore(MemoryStore(capacity_bytes=CAPACITY), balanced_bytes_per_s(model)) as store:
        play(hybrid_engine(store, policy=policy))


def test_the_reference_is_what_prefilling_the_whole_prompt_in_its_chunks_gives():
    """So decoding an answer left the state that the next turn started from as it was."""
    model = tiny(FAMILY, "bfloat16")
    runner, tokens = LayerRunner(model), []
    for played, new in zip(never_evicted(model, CHUNK, ROW), turns(), strict=True):
        prompt = [*tokens, *new]
        kv = runner.new_kv(len(prompt))
        logits = runner.prefill(prompt, played.chunk_ends, kv)
        assert torch.equal(logits, played.reply.logits)
        assert torch.equal(kv.kv_L2THD, played.kv)
        tokens = [*prompt, *played.reply.tokens]


def is_state(row: int):
    return lambda key: key.kind is ObjectKind.STATE and key.layer_lo == row * ROW


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR])
@pytest.mark.parametrize("policy", ["load", "cacheflow"])
def test_a_lost_checkpoint_of_a_row_is_recomputed(policy: str, fault: Fault, row: int):
    plan = FaultPlan(rules=(FaultRule(fault=fault, matches=is_state(row)),))
    with FaultyStore(MemoryStore(capacity_bytes=CAPACITY), plan) as store:
        replies = play(hybrid_engine(store, policy=policy))
    if policy == "load":
        for reply in replies[1:]:
            assert reply.report is not None
            assert reply.report.failed_loads == {fault.value: 1}
            assert {letters[: row + 1] for letters in reply.report.cells_KB} == {"c" * (row + 1)}


@pytest.mark.parametrize("policy", RESTORE_POLICIES)
def test_lost_keys_and_values_are_recomputed(policy: str):
    rules = (
        FaultRule(fault=Fault.MISS, matches=lambda key: key.kind is ObjectKind.KV, every=3, probability=0.4),
        FaultRule(fault=Fault.CORRUPT, matches=lambda key: key.kind is ObjectKind.STATE, probability=0.3),
    )
    failed = 0
    for seed in range(4):
        with FaultyStore(MemoryStore(capacity_bytes=CAPACITY), FaultPlan(rules=rules, seed=seed)) as store:
            for reply in play(hybrid_engine(store, policy=policy))[1:]:
                failed += sum(reply.report.failed_loads.values()) if reply.report else 0
    assert failed > 0 or policy == "recompute"


def test_a_conversation_that_branches_off_starts_from_the_last_checkpoint_before():
    first, second, other = turns()[0], tuple(random_tokens(200, seed=98)), tuple(random_tokens(70, seed=99))
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        engine = hybrid_engine(store)
        kept = engine.session()
        answer(kept, first)
        answer(kept, second)
        # Shares the first prompt and one more chunk: its keys and values are there, the states at its end are not.
        common = kept.tokens[: len(first) + CHUNK + 10]
        found = answer(engine.session(), [*common, *other])
        assert found.reply.restored_tokens == len(first)
        assert answer(engine.session(), [*first[:100], *other]).reply.restored_tokens == 0
        alone = engine.session()
        answer(alone, first, save=False)
        assert_same(answer(alone, [*common, *other][len(alone.tokens) :], save=False), found)


def test_without_the_last_checkpoint_a_prefix_ends_at_the_one_before():
    first, second, third, *_ = turns()
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        engine = hybrid_engine(store)
        session = engine.session()
        answer(session, first)
        answer(session, second, sampling=sampling_of(1))
        assert store.delete(state_keys(engine, session.tokens, session.chunk_ends)) == engine.num_blocks
        session.evict()
        played = answer(session, third)
        assert played.reply.restored_tokens == len(first)
        # What is not restored is prefilled in the chunks it was saved in.
        assert_same(played, never_evicted(tiny(FAMILY, "bfloat16"), CHUNK, ROW)[2])


def state_keys(engine: Engine, tokens: list[int], ends: tuple[int, ...]) -> list[ObjectKey]:
    """Of the checkpoint at the last of these chunk ends."""
    geometry = CellGeometry(
        grid=Grid(chunk_ends=ends, num_blocks=engine.num_blocks), shape=engine.model.shape, layers_per_block=ROW
    )
    chain = chain_hashes(tokens, ends)[-1].hex()
    return [state_key(engine.namespace.digest, chain, geometry, block) for block in range(engine.num_blocks)]


def test_several_sessions_at_once_restore_the_same_prefix_each_for_itself():
    first, second, *_ = turns()
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        engine = hybrid_engine(store)
        answer(engine.session(), first)
        with engine.concurrent() as batch:
            sessions = [engine.session() for _ in range(3)]
            pending = [
                batch.submit(session, [*first, *second[: 5 + index]], max_new_tokens=NEW_TOKENS, save=False)
                for index, session in enumerate(sessions)
            ]
            replies = [each.result() for each in pending]
        for index, reply in enumerate(replies):
            assert reply.shared_tokens == 0
            alone = answer(engine.session(), [*first, *second[: 5 + index]], save=False).reply
            assert reply.tokens == alone.tokens
            assert torch.equal(reply.logits, alone.logits)


def test_warmed_sessions_go_on_from_the_checkpoint():
    first, second, *_ = turns()
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        engine = hybrid_engine(store)
        session = engine.session()
        answer(session, first)
        session.evict()
        report = session.warm()
        assert report is not None
        reference = never_evicted(tiny(FAMILY, "bfloat16"), CHUNK, ROW)[1]
        assert_same(answer(session, second, sampling=sampling_of(1)), reference)


def test_what_a_hybrid_cannot_have_is_refused():
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        with pytest.raises(ConfigError, match="chunk_tokens is 32, must be a multiple of 64"):
            make_engine(tiny(FAMILY), store, chunk_tokens=32)
        with pytest.raises(ConfigError, match="blocks of 2 layers, must be a multiple of 4"):
            make_engine(tiny(FAMILY), store, chunk_tokens=64, layers_per_block=2)
        engine = hybrid_engine(store)
        assert (engine.num_blocks, engine.chunking.layers_per_block) == (2, 4)
        assert ("state_dtype", "float32") in engine.namespace.extra
        assert not [name for name, _ in make_engine(tiny("llama"), store).namespace.extra if name == "state_dtype"]
