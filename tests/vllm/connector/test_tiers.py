"""A vLLM engine over tiers: what one engine saved the next reads from the slow tier, and either tier may fail."""

import numpy as np
import pytest

from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.stores.url import file_url
from cacheflow.types import LoadOutcome
from support.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
LAYERS = 4
NUM_CHUNKS = 6
TIMEOUT_S = 20.0


def tokens(seed):
    from support.connector_engine import random_tokens

    return random_tokens(NUM_CHUNKS * CHUNK + 21, seed=seed)


def num_read(store):
    return [tier.store.get_outcomes[LoadOutcome.OK] for tier in store.stats().tiers]


def test_the_next_engine_reads_what_the_last_one_had_in_memory(llama, tmp_path):
    """From the file, then from memory, into which it was promoted; measured at start, tier by tier."""
    engine = llama
    options = {"store": ["memory?capacity=64MiB", file_url(tmp_path / "kv")], "policy": "load"}
    prompt = tokens(seed=1)
    engine.restart(options)
    own = engine.saved(prompt)
    assert all(rate > 0 for rate in engine.worker.facts.tier_rates)
    engine.restart(options)
    for tier in (1, 0):
        before = num_read(engine.store)
        again = engine.ask(prompt)
        assert again.record["outcome"] == "done"
        assert again.record["loaded_cells"] > 0
        assert again.tokens == own.tokens
        assert np.array_equal(again.kv, own.kv)
        read = [after - earlier for after, earlier in zip(num_read(engine.store), before, strict=True)]
        assert read[tier] > 0
        assert read[1 - tier] == 0
        assert engine.store.drain(TIMEOUT_S)
        engine.evict()


@pytest.fixture(scope="module")
def started(llama, tmp_path_factory):
    """Memory too small for a prompt over a file, both of which a test makes fail."""

    def open_tiers(options):
        memory = FaultyStore(MemoryStore(capacity_bytes=options.cpu_bytes_to_use), FaultPlan())
        file = FileStore(tmp_path_factory.mktemp("kv"), capacity_bytes=1 << 30, fsync=False)
        stores = {"memory": memory, "file": FaultyStore(file, FaultPlan())}
        return ThrottledStore(TieredStore(stores, probe_after_s=0.05), options.throttle_bytes_per_s)

    options = {"throttle_bytes_per_s": 1e8, "policy": "cake", "cpu_bytes_to_use": 1 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacheflow.vllm.startup.open_store.open_store", open_tiers)
        llama.restart(options)
    return llama


@pytest.mark.parametrize("policy", ["cake", "load"])
@pytest.mark.parametrize("tier", [0, 1])
@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.HANG])
def test_a_tier_that_flaps_costs_no_token(started, fault, tier, policy):
    engine, tiers = started, started.store.inner.tiers
    engine.evict()
    engine.configure(policy=policy)
    prompt = tokens(seed=2)
    own = engine.saved(prompt)
    assert engine.store.inner.drain(TIMEOUT_S)
    before = num_read(engine.store)
    injected = 0
    for every in (3, 1):
        tiers[tier].store.set_plan(FaultPlan(rules=(FaultRule(fault=fault, every=every),)))
        engine.set_rate(1e8)
        again = engine.ask(prompt)
        assert again.tokens == own.tokens
        assert np.array_equal(again.kv, own.kv)
        injected += tiers[tier].store.injected()[fault]
        engine.evict()
    tiers[tier].store.set_plan(FaultPlan())
    eventually(lambda: tiers[tier].delivers)
    assert injected > 0
    assert num_read(engine.store) > before
    assert all(stats.store.num_evicted > 0 for stats in engine.store.stats().tiers[:1])  # it does not hold a prompt
