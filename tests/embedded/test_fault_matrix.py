"""Every kind of trouble on every store under every policy: the answer and its KV are those of full recomputation.

`make test` plays cells in which each pair of trouble, store and policy meets; with ``--long`` it plays all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from cacheflow.embedded import Reply
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import ObjectKey, ObjectKind
from cacheflow.stores.opening import open_store
from cacheflow.stores.throttled import ThrottledStore
from support.damage import DAMAGES, Damage
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
from support.kv_like import codec_of
from support.patience import PATIENT
from support.store_kinds import ALL, url_of

CAPACITY = 64 << 20
HASTY = ExecutorOptions(deadline=ReadDeadline(floor_s=0.03, factor=0.1))


def is_cell(key: ObjectKey) -> bool:
    return key.kind is ObjectKind.KV


def of_middle_layer(key: ObjectKey) -> bool:
    return is_cell(key) and key.layer_lo == 1


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What a store does from the first eviction to the second.

    Attributes:
        seen_as: How failed reads are counted; empty where none fails.
        rules: Faults injected.
        damage: Done to the record of the middle layer of each chunk.
        latency_s: Of each read.
        executor: How long a read may take.
    """

    seen_as: frozenset[str]
    rules: tuple[FaultRule, ...] = ()
    damage: Damage | None = None
    latency_s: float = 0.0
    executor: ExecutorOptions = PATIENT


def injected(seen_as: str, *rules: FaultRule, **options: ExecutorOptions) -> Trouble:
    return Trouble(seen_as=frozenset({seen_as}), rules=rules, **options)


TROUBLES = {
    "miss": injected("miss", FaultRule(fault=Fault.MISS, matches=is_cell, every=4)),
    **{name: Trouble(seen_as=frozenset({"corrupt"}), damage=damage) for name, damage in DAMAGES.items()},
    "late": injected("late", FaultRule(fault=Fault.LATE, matches=is_cell, every=3, limit=4), executor=HASTY),
    "hang": injected("late", FaultRule(fault=Fault.HANG, matches=is_cell, every=3, limit=4), executor=HASTY),
    "error": injected("error", FaultRule(fault=Fault.ERROR, matches=is_cell, every=4)),
    "partial outage": injected(
        "error",
        FaultRule(fault=Fault.ERROR, matches=of_middle_layer),
        FaultRule(fault=Fault.PUT_ERROR, matches=of_middle_layer),
    ),
    "slow": Trouble(seen_as=frozenset(), latency_s=0.004),
    "flapping": injected(
        "error",
        FaultRule(fault=Fault.ERROR, matches=is_cell, every=5, in_a_row=3),
        FaultRule(fault=Fault.PUT_ERROR, matches=is_cell, every=5, in_a_row=3),
    ),
}


def cells_of_the_matrix() -> Iterator[object]:
    for row, trouble in enumerate(TROUBLES):
        for column, policy in enumerate(RESTORE_POLICIES):
            for number, backend in enumerate(ALL):
                is_chosen = (row + column) % len(ALL) == number
                yield pytest.param(trouble, policy, backend, "", marks=() if is_chosen else pytest.mark.long)
    for trouble in ("miss", "late", "error", *DAMAGES):
        for policy in ("load", "cacheflow"):
            yield trouble, policy, "file", "zstd"


def strike(trouble: Trouble, store: FaultyStore, cells: list[ObjectKey]) -> None:
    store.set_plan(FaultPlan(rules=trouble.rules))
    if trouble.damage is not None:
        for key in filter(of_middle_layer, cells):
            other = next(each for each in cells if each.chain_hash == key.chain_hash and each.layer_lo == 2)
            trouble.damage(store.inner, key, other)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "policy", "backend", "codec"), list(cells_of_the_matrix()))
def test_trouble_costs_time_alone(name, policy, backend, codec, request, tmp_path):
    model, trouble = tiny("llama", "bfloat16"), TROUBLES[name]
    cells: list[ObjectKey] = []

    def noted(key: ObjectKey) -> bool:
        if is_cell(key):
            cells.append(key)
        return False

    url = url_of(backend, request, tmp_path / "store")
    inner = open_store(f"{url}?codec={codec_of(codec).name}" if codec else url, capacity_bytes=CAPACITY)
    faulty = FaultyStore(inner, FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR, matches=noted),)))
    with ThrottledStore(faulty, 1e12, trouble.latency_s) as store:
        engine = make_engine(model, store, policy=policy, executor=trouble.executor)
        session = engine.session()
        saved = answer(session, turns()[0])
        assert saved.reply.saved.complete
        assert_same(saved, never_evicted(model)[0])

        strike(trouble, faulty, cells)
        session.evict()
        troubled = answer(session, turns()[1], sampling=sampling_of(1))
        assert_nothing_runs()
        assert_same(troubled, never_evicted(model)[1])

        faulty.set_plan(FaultPlan())
        session.evict()
        after = answer(session, turns()[2])
        assert_nothing_runs()
        assert_same(after, never_evicted(model)[2])

    assert troubled.reply.restored_tokens == 118
    seen = failed_loads(troubled.reply)
    if policy == "load":  # the others may be through before the trouble
        assert seen == trouble.seen_as
        if trouble.executor is PATIENT:
            # Of two that were swapped one was let go unread, where the chunk of the other was recomputed by then.
            assert failed_loads(after.reply) <= (trouble.seen_as if name == "swapped record" else set())
            assert after.reply.report.loaded_cells > 0
    else:
        assert seen <= trouble.seen_as


def failed_loads(reply: Reply) -> set[str]:
    """How reads failed; one that was cancelled, since compute was faster, did not."""
    return set(reply.report.failed_loads) - {"cancelled"} if reply.report else set()
