"""What a label's values mean is said for every value that can be counted, in the HELP texts and in the docs."""

import itertools
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from cacheflow.plan.plan import Choice
from cacheflow.stores.base import PinOutcome, PrefetchOutcome, PrefetchRequest, PutOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from cacheflow.vllm.metrics import LABELS, TIER_COUNTERS, Counts, described
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.worker.saver import _chunk_outcome
from support.scheduler_cases import CHUNK, Case, Worker
from support.store_objects import get, key, put
from support.waiting import eventually

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
SOURCE = "".join(path.read_text() for path in sorted((ROOT / "src/cacheflow/vllm").rglob("*.py")))
SERIES = {
    "tokens": "tokens_total", "restorations": "restorations_total", "guard": "guard_decisions_total",
    "chunks_saved": "chunks_saved_total", "boundaries": "boundaries_total",
    "kept": "kept_chunks_total", "prefetched": "prefetched_objects_total",
}  # fmt: skip


def counted() -> dict[str, set[str]]:
    """Label values that the code can count: those it spells, and those that it takes from what happened."""
    values = {name: set(re.findall(rf"\b{name}\[\"(\w+)\"\]", SOURCE)) for name in LABELS}
    values["chunks_saved"] |= {_chunk_outcome(pair) for pair in itertools.product([*PutOutcome, None], repeat=2)}
    values["boundaries"] |= set(re.findall(r"_outcomes\.(?:append|extend)\(\"(\w+)\"", SOURCE))  # of any thread
    values["kept"] |= {outcome.value for outcome in PinOutcome}
    values["prefetched"] |= {outcome.value for outcome in PrefetchOutcome}
    # A guard that settles on the engine's own prefill restores nothing, which is counted as recompute.
    values["guard"] |= {choice.value for choice in Choice} - {Choice.PREFILL.value}
    for outcome, compute_error in ((LoadOutcome.OK, ""), (LoadOutcome.MISS, ""), (LoadOutcome.MISS, "boom")):
        case = Case(options=ConnectorOptions(chunk_tokens=CHUNK, lookup_timeout_s=20.0, policy="cake"))
        case.arrive("a", case.saved_prompt(8 * CHUNK + 1, 8))
        case.begin("a")
        Worker(case, default=outcome, compute_error=compute_error).run()
        case.arrive("b", case.saved_prompt(8 * CHUNK + 1, 8, seed=1))
        case.begin("b")
        worker = Worker(case)
        worker.carry_out(case.step())
        case.side.finished("b")
        worker.run()
        for name, seen in case.side.counts.take().items():
            if name in values:
                values[name] |= set(seen)
    return values


def test_every_value_that_can_be_counted_is_explained_and_no_other():
    for name, values in counted().items():
        assert values == set(LABELS[name]), name


@pytest.mark.parametrize("name", LABELS)
def test_help_texts_and_docs_name_every_value(name):
    rows = dict(re.findall(r"^\| `vllm:cacheflow_(\w+)\{\w+\}` \| (.*) \|$", (ROOT / "docs/vllm.md").read_text(), re.M))
    text = described(name, "Text.")
    for value, meaning in LABELS[name].items():
        assert f"{value}: {meaning}" in text
        assert f"`{value}`" in rows[SERIES[name]]


def test_what_becomes_of_a_prefetch_is_counted_once():
    fast, slow, counts = MemoryStore(capacity_bytes=1 << 20), MemoryStore(capacity_bytes=1 << 20), Counts()
    with TieredStore({"fast": fast, "slow": slow}) as store:
        put(slow, 1, 2)
        store.prefetch([PrefetchRequest(key(number), 1000) for number in (1, 2)], within_s=60.0)
        eventually(lambda: store.stats().prefetches[PrefetchOutcome.FETCHED] == 2)
        for expected in ({"prefetched": {"fetched": 2}}, {}):
            counts.note_prefetches(store.stats().prefetches)
            assert counts.take() == expected
        get(store, 1)
        counts.note_prefetches(store.stats().prefetches)
        assert counts.take() == {"prefetched": {"used": 1}}


def test_what_happens_to_a_tier_is_counted_once():
    failing = FaultyStore(MemoryStore(capacity_bytes=1 << 20), FaultPlan(rules=(FaultRule(fault=Fault.ERROR),)))
    counts = Counts()
    with TieredStore({"fast": MemoryStore(capacity_bytes=1 << 20), "slow": failing}, copy_bytes=1500) as store:
        assert put(store, 1, num_bytes=2000) == (PutOutcome.STORED,)  # more than may wait for the slow tier
        counts.note_tiers(store.stats().tiers)
        assert counts.take() == {"tier_dropped": {"slow": 1}}
        put(failing, 2, 3, 4)
        for number in (2, 3, 4):
            get(store, number)
        for expected in ({"tier_outages": {"slow": 1}}, {}):
            counts.note_tiers(store.stats().tiers)
            assert counts.take() == expected


def test_races_between_tiers_are_counted_by_the_tier_that_was_slow():
    counts = Counts()
    with TieredStore({name: MemoryStore(capacity_bytes=1 << 20) for name in ("fast", "slow")}) as store:
        for _ in range(2):
            assert store.tiers[0].begin_race()
            store.tiers[0].note_overtaken()
            for _ in range(40):
                store.tiers[0].begin_read(1)
            counts.note_tiers(store.stats().tiers)
            assert counts.take() == {"tier_raced": {"fast": 1}, "tier_overtaken": {"fast": 1}}


@pytest.mark.vllm
def test_every_counter_of_a_tier_is_a_metric():
    from cacheflow.vllm.prometheus import COUNTERS

    rows = (ROOT / "docs/vllm.md").read_text()
    for name in TIER_COUNTERS:
        assert COUNTERS[name][2] == "tier"
        assert f"`{COUNTERS[name][0]}_total{{tier}}`" in rows


@pytest.mark.vllm
def test_the_help_on_the_endpoint_is_that_text():
    from cacheflow.vllm.prometheus import COUNTERS

    for name in LABELS:
        metric, text, label = COUNTERS[name]
        assert metric + "_total" == f"vllm:cacheflow_{SERIES[name]}"
        assert text.endswith(described(name, ""))
        assert label
