"""Sessions over fast and slow stores: a restoration reads from both, and a tier that fails costs no token."""

import pytest

from cacheflow.embedded import Engine
from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Grid
from cacheflow.plan.report import SpanKind
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKind, RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.embedded_cases import (
    answer,
    assert_nothing_runs,
    assert_same,
    make_engine,
    never_evicted,
    sampling_of,
    tiny,
    turns,
)
from support.store_kinds import url_of

CAPACITY = 64 << 20
TIMEOUT_S = 20.0
HASTY = ExecutorOptions(deadline=ReadDeadline(floor_s=0.05, factor=0.1))
FAULTS = (Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.LATE, Fault.HANG)


@pytest.fixture
def model():
    return tiny("llama", "bfloat16")


def is_cell(key):
    return key.kind is ObjectKind.KV


def num_read(store):
    """Reads that each tier has served."""
    return [tier.store.get_outcomes[LoadOutcome.OK] for tier in store.stats().tiers]


@pytest.mark.parametrize("kinds", [("memory", "file"), ("memory", "shm"), ("file", "redis")], ids=" over ".join)
@pytest.mark.parametrize("policy", ["load", "cacheflow"])
def test_every_turn_comes_back_from_tiers(model, kinds, policy, request, tmp_path):
    urls = [url_of(kind, request, tmp_path / "store") for kind in kinds]
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        session = make_engine(model, store, policy=policy).session()
        for turn, tokens in enumerate(turns()):
            session.evict()
            played = answer(session, tokens, sampling=sampling_of(turn))
            assert_same(played, never_evicted(model)[turn])
    assert_nothing_runs()


def half_of_a_prefix(model):
    """Capacity of a memory that has room for half of the first turn."""
    with MemoryStore(capacity_bytes=CAPACITY) as measured:
        answer(make_engine(model, measured).session(), turns()[0])
        return measured.stats().used_bytes // 2


def test_a_restoration_reads_from_both_tiers(model, tmp_path):
    """Memory has room for the tail of the prefix alone; what came from the disk is promoted afterwards."""
    memory = MemoryStore(capacity_bytes=half_of_a_prefix(model))
    with TieredStore({"memory": memory, "file": FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False)}) as store:
        session = make_engine(model, store, policy="load").session()
        answer(session, turns()[0])
        assert store.drain(TIMEOUT_S)
        before = num_read(store)
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1), save=False)
        assert_same(played, never_evicted(model)[1])
        from_memory, from_file = (after - earlier for after, earlier in zip(num_read(store), before, strict=True))
        assert from_memory > 0
        assert from_file > 0
        assert not played.reply.report.failed_loads
        assert store.drain(TIMEOUT_S)
        assert store.stats().tiers[0].num_promoted > 0


def test_a_plan_knows_what_each_tier_delivers(model, tmp_path):
    """The same prefix in the same tiers, the slow one as fast as memory or a hundred times slower."""
    capacity, planned = half_of_a_prefix(model), []
    for slowness in (1.0, 100.0):
        file = FileStore(tmp_path / str(slowness), capacity_bytes=CAPACITY, fsync=False)
        with TieredStore({"memory": MemoryStore(capacity_bytes=capacity), "file": file}) as store:
            for tier, bytes_per_s in zip(store.tiers, (1e9, 1e9 / slowness), strict=True):
                tier.promise(bytes_per_s=bytes_per_s, latency_s=1e-4)
            session = make_engine(model, store, policy="cacheflow").session()
            answer(session, turns()[0])
            assert store.drain(TIMEOUT_S)
            session.evict()
            played = answer(session, turns()[1], sampling=sampling_of(1))
            assert_same(played, never_evicted(model)[1])
            planned.append(sum(played.reply.report.plan.levels_K))
    assert planned[0] < planned[1]


def test_tiers_behind_one_link_are_planned_as_one(model, tmp_path):
    file = FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False)
    tiers = TieredStore({"memory": MemoryStore(capacity_bytes=half_of_a_prefix(model)), "file": file})
    with ThrottledStore(tiers, 1e12) as store:
        for tier, bytes_per_s in zip(tiers.tiers, (1e9, 1e7), strict=True):
            tier.promise(bytes_per_s=bytes_per_s, latency_s=1e-4)
        engine = make_engine(model, store)
        session = engine.session()
        answer(session, turns()[0])
        assert tiers.drain(TIMEOUT_S)
        match = session.archive.find([*turns()[0], 1])
        problem = engine.problem(Grid(chunk_ends=match.chunk_ends, num_blocks=engine.num_blocks))
        assert make_engine(model, tiers).session().archive.over_tiers(problem, match).num_tiers == 2
        assert session.archive.over_tiers(problem, match) is problem


def test_a_slow_tier_that_is_read_first_does_not_hold_up_the_fast_one(model):
    """The head, which is read first, is in the slow tier alone; meanwhile the rest comes from memory."""
    slow = ThrottledStore(MemoryStore(capacity_bytes=CAPACITY), 1e12, 1.0)
    with TieredStore({"memory": MemoryStore(capacity_bytes=CAPACITY), "slow": slow}) as store:
        engine = make_engine(model, store, policy="load")
        session = engine.session()
        answer(session, turns()[0])
        assert store.drain(TIMEOUT_S)
        hashes = session.archive.find([*turns()[0], 1]).chain_hashes
        head, namespace = hashes[0].hex(), engine.namespace.digest
        keys = [RankKeys().kv(namespace, head, (block, block + 1)) for block in range(engine.num_blocks)]
        assert store.tiers[0].store.delete(keys) == len(keys)
        session.evict()
        played = answer(session, turns()[1], sampling=sampling_of(1), save=False)
    assert_same(played, never_evicted(model)[1])
    assert len(keys) >= engine.restorer.options.least_reads_in_flight
    loads = [span for span in played.reply.report.spans if span.kind is SpanKind.LOAD]
    by_end = [span.chunk > 0 for span in sorted(loads, key=lambda span: span.end_s)]
    assert by_end == [True] * (len(loads) - len(keys)) + [False] * len(keys)


@pytest.mark.parametrize("policy", ["load", "cacheflow"])
@pytest.mark.parametrize("tier", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_tier_that_fails_costs_no_token(model, fault, tier, policy, tmp_path):
    """Every third read of one tier, with memory too small for the prefix."""
    memory = FaultyStore(MemoryStore(capacity_bytes=half_of_a_prefix(model)), FaultPlan())
    file = FaultyStore(FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False), FaultPlan())
    (memory, file)[tier].set_plan(FaultPlan(rules=(FaultRule(fault=fault, matches=is_cell, every=3),)))
    with TieredStore({"memory": memory, "file": file}, probe_after_s=0.02, drain_s=1.0) as store:
        session = make_engine(model, store, policy=policy, executor=HASTY).session()
        for turn, tokens in enumerate(turns()):
            session.evict()
            assert_same(answer(session, tokens, sampling=sampling_of(turn)), never_evicted(model)[turn])
            assert store.drain(TIMEOUT_S)
    assert_nothing_runs()


@pytest.mark.parametrize("tier", [0, 1])
def test_a_tier_that_hangs_is_left_out_of_the_next_restorations(model, tier, tmp_path):
    memory = FaultyStore(MemoryStore(capacity_bytes=half_of_a_prefix(model)), FaultPlan())
    file = FaultyStore(FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False), FaultPlan())
    hung = (memory, file)[tier]
    with TieredStore({"memory": memory, "file": file}, probe_after_s=60.0) as store:
        session = make_engine(model, store, policy="load", executor=HASTY).session()
        answer(session, turns()[0])
        assert store.drain(TIMEOUT_S)
        hung.set_plan(FaultPlan(rules=(FaultRule(fault=Fault.HANG, matches=is_cell),)))
        for turn in (1, 2, 3):
            session.evict()
            assert_same(answer(session, turns()[turn], sampling=sampling_of(turn)), never_evicted(model)[turn])
        assert not store.stats().tiers[tier].delivers
        assert store.stats().tiers[tier].num_outages == 1
        assert hung.injected()[Fault.HANG] <= 8  # of one restoration
    assert_nothing_runs()


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ([], "no URL was given"),
        (["memory", "memory?capacity=1GiB"], "'memory' and 'memory.capacity=1GiB' are one store"),
        (["memory", "kv"], "store is 'kv', must be a URL"),
    ],
)
def test_tiers_that_are_none_are_refused(model, store, said):
    engine = make_engine(model, MemoryStore(capacity_bytes=1 << 20))
    with pytest.raises(ConfigError, match=said):
        Engine.open("smollm2-135m", store=store, capacity_bytes=1 << 20, costs=engine.costs, link=engine.link)
