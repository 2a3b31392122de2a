"""Sessions that go on soon: what a slow store has of them is in the fast one before the next turn comes."""

import pytest

from cacheflow.errors import ConfigError
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores import prefetcher
from cacheflow.stores.base import PrefetchOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKind, key_of
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.tiered import TieredStore
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
from support.waiting import eventually

CAPACITY = 64 << 20
TIMEOUT_S = 20.0
HASTY = ExecutorOptions(deadline=ReadDeadline(floor_s=0.05, factor=0.1))
FAULTS = (Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.LATE, Fault.HANG)
FAMILIES = {"llama": (32, 1), "qwen3_5_text": (64, 4)}
"""Tokens of a chunk and layers of a row; the second has running states."""


def is_object(key):
    return key.kind in (ObjectKind.KV, ObjectKind.STATE)


class Tiers(TieredStore):
    """Memory over a file, both of which may fail; notes what is read from the file."""

    def __init__(self, folder, **options):
        self.read = []

        def noted(key):
            if is_object(key):
                self.read.append(key.name)
            return False

        self.watching = FaultRule(fault=Fault.MISS, matches=noted)
        memory = FaultyStore(MemoryStore(capacity_bytes=CAPACITY), FaultPlan())
        file = FaultyStore(FileStore(folder, capacity_bytes=CAPACITY, fsync=False), FaultPlan(rules=(self.watching,)))
        super().__init__({"memory": memory, "file": file}, **options)

    def clear_memory(self):
        """Everything leaves memory, as if others had thrown it out."""
        assert self.drain(TIMEOUT_S)
        memory = self.tiers[0].store.inner
        memory.delete([key_of(name) for name in memory._index.sizes()])  # noqa: SLF001 -- there is no list of objects
        self.read.clear()

    def settled(self):
        """Wait until nothing waits to be brought; how many objects were."""
        eventually(lambda: not self._prefetcher._wanted)  # noqa: SLF001 -- counts do not say what still waits
        return self.stats().prefetches[PrefetchOutcome.FETCHED]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_turn_reads_nothing_from_the_slow_tier(family, tmp_path):
    """With a partial chunk and, of a hybrid, the running states."""
    model, (chunk, row) = tiny(family, "bfloat16"), FAMILIES[family]
    with Tiers(tmp_path) as store:
        engine = make_engine(model, store, policy="load", chunk_tokens=chunk)
        session = engine.session(salt="ours")
        answer(session, turns()[0])
        session.evict()
        store.clear_memory()
        assert session.prefetch() == len(turns()[0])
        num_fetched = store.settled()
        assert num_fetched == len(store.read) > 0
        assert (sum("_state_" in name for name in store.read) > 0) == (family != "llama")
        store.read.clear()
        played = answer(session, turns()[1], sampling=sampling_of(1), save=False)
        assert_same(played, never_evicted(model, chunk, row)[1])
        assert store.read == []
        assert store.stats().prefetches[PrefetchOutcome.USED] == num_fetched
        session.evict()
        store.clear_memory()
        answer(session, turns()[2], save=False)
        assert store.read, "it would have read from there"
    assert_nothing_runs()


def test_the_last_chunk_comes_first(tmp_path):
    """Compute takes the first ones, should the time not do for all."""
    with Tiers(tmp_path) as store:
        engine = make_engine(tiny("llama", "bfloat16"), store)
        session = engine.session()
        answer(session, turns()[0])
        store.clear_memory()
        session.prefetch()
        store.settled()
        chain = [each.hex() for each in session.archive.find([*turns()[0], 1]).chain_hashes]
        read = list(dict.fromkeys(name.split("_")[1] for name in store.read))
        assert len(chain) > 2
        assert read == chain[::-1]


def test_of_a_conversation_to_come_its_own_tenant_alone_finds_something(tmp_path):
    with Tiers(tmp_path) as store:
        engine = make_engine(tiny("llama", "bfloat16"), store)
        answer(engine.session(salt="ours"), turns()[0])
        store.clear_memory()
        assert engine.session(history=turns()[0], salt="theirs").prefetch(keep_s=60.0) == 0
        assert store.settled() == 0
        assert not store.read
        assert engine.session(history=turns()[0], salt="ours").prefetch(keep_s=60.0) == len(turns()[0])
        assert store.settled() == len(store.read) > 0
        stats = store.stats().tiers
        eventually(lambda: store.stats().tiers[0].store.pinned_bytes > 0)
        cells, notes = stats[0].store.num_objects, 1
        assert stats[1].store.num_objects == cells + notes
        assert store.tiers[0].store.stats().pinned_bytes == store.tiers[0].store.stats().used_bytes


def test_a_store_without_tiers_has_nothing_to_do():
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        session = make_engine(tiny("llama", "bfloat16"), store).session()
        assert session.prefetch() == 0
        answer(session, turns()[0])
        assert session.prefetch() == len(turns()[0])
        assert store.stats().prefetches == {}


@pytest.mark.parametrize("keep_s", [-1, float("inf"), float("nan"), True, "60"])
def test_what_means_nothing_is_refused(keep_s):
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        session = make_engine(tiny("llama", "bfloat16"), store).session()
        with pytest.raises(ConfigError, match="keep_s is"):
            session.prefetch(keep_s=keep_s)


@pytest.mark.parametrize("policy", ["load", "cacheflow"])
@pytest.mark.parametrize("tier", [0, 1])
@pytest.mark.parametrize("fault", [*FAULTS, Fault.PUT_ERROR])
def test_a_tier_that_fails_a_prefetch_costs_no_token(fault, tier, policy, tmp_path, monkeypatch):
    """Every fifth operation of one tier, and every turn was to be brought before it came."""
    monkeypatch.setattr(prefetcher, "READ_S", 0.05)
    model, ended = tiny("llama", "bfloat16"), 0
    with Tiers(tmp_path, probe_after_s=0.02, drain_s=1.0) as store:
        session = make_engine(model, store, policy=policy, executor=HASTY).session()
        for turn, tokens in enumerate(turns()):
            session.evict()
            store.clear_memory()
            failing = store.tiers[tier].store
            failing.set_plan(FaultPlan(rules=(FaultRule(fault=fault, matches=is_object, every=5),)))
            session.prefetch(keep_s=60.0 * (turn % 2))
            store.settled()
            assert_same(answer(session, tokens, sampling=sampling_of(turn)), never_evicted(model)[turn])
            failing.set_plan(FaultPlan())
            ended = sum(store.stats().prefetches.values())
    assert ended > 0
    assert_nothing_runs()
