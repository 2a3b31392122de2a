"""A hundred thousand faults: no wrong token, no wrong bit of KV, no read that outlives its deadline, no crash.

::

    pytest --long tests/embedded/test_fault_soak.py

prints how many of each kind struck; ``CACHEFLOW_SOAK_FAULTS`` sets how many there are in all.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections import Counter
from collections.abc import Sequence

import pytest

from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import ObjectKey, ObjectKind
from cacheflow.stores.opening import open_store
from cacheflow.types import LoadOutcome
from support.damage import DAMAGES
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

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(7200)]

NUM_FAULTS = int(os.environ.get("CACHEFLOW_SOAK_FAULTS", "100000"))
SEED = int(os.environ.get("CACHEFLOW_SOAK_SEED", "0"))
CAPACITY = 64 << 20
CHUNK = 8
"""Tokens: small, so that a restoration has many cells to fail."""

SESSIONS = 3
"""Of one engine, before the next one opens the store."""

DAMAGED = 12
"""Records damaged on the medium before each turn."""

REPORTED = 5000
"""Faults after which it says how far it is."""

BACKENDS = ("memory", "file", "shm")
POLICIES = tuple(name for name in RESTORE_POLICIES if name != "recompute")  # which reads nothing
HASTY = ExecutorOptions(max_reads_in_flight=6, deadline=ReadDeadline(floor_s=0.003, factor=0.5))


def is_cell(key: ObjectKey) -> bool:
    return key.kind is ObjectKind.KV


def are_beside(one: ObjectKey, other: ObjectKey) -> bool:
    """Whether they hold the same chunk in different layers."""
    return one.chain_hash == other.chain_hash and one.layer_lo != other.layer_lo


class Soak:
    """One store after another, failing all the time, and what struck."""

    def __init__(self, model):
        self.model = model
        self.reference = never_evicted(model, CHUNK)
        self.random = random.Random(SEED)
        self.struck: Counter[str] = Counter()

    def __str__(self):
        of_kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.struck.items()))
        return f"{self.struck.total()} faults ({of_kinds})"

    def rules(self) -> tuple[FaultRule, ...]:
        """Everything at once; one layer is out altogether for now and then."""
        lost = self.random.randrange(3)
        return (
            *(FaultRule(fault=fault, probability=0.14) for fault in Fault if fault not in (Fault.LATE, Fault.HANG)),
            *(FaultRule(fault=fault, matches=is_cell, probability=0.02) for fault in (Fault.LATE, Fault.HANG)),
            FaultRule(fault=Fault.ERROR, matches=is_cell, every=20, in_a_row=3),
            FaultRule(fault=Fault.ERROR, matches=lambda key: is_cell(key) and key.layer_lo == lost, probability=0.2),
        )

    def play(self, url: str, policy: str) -> None:
        """Some sessions with one engine."""
        cells: dict[ObjectKey, None] = {}

        def noted(key: ObjectKey) -> bool:
            if is_cell(key):
                cells[key] = None
            return False

        notes = FaultRule(fault=Fault.MISS, matches=noted), FaultRule(fault=Fault.PUT_ERROR, matches=noted)
        plan = FaultPlan(rules=(*notes, *self.rules()), seed=self.random.randrange(1 << 31))
        with FaultyStore(open_store(url, capacity_bytes=CAPACITY), plan) as store:
            engine = make_engine(
                self.model, store, policy=policy, chunk_tokens=CHUNK, executor=HASTY, lookup_deadline_s=0.2
            )
            for _ in range(SESSIONS):
                session = engine.session()
                for turn, tokens in enumerate(turns()):
                    session.evict()
                    self.damage(store, list(cells))
                    played = answer(session, tokens, sampling=sampling_of(turn))
                    assert_nothing_runs()
                    assert_same(played, self.reference[turn])
            by_kind = {fault.value: count for fault, count in store.injected().items()}
            self.struck.update(by_kind)
            met = store.inner.stats().get_outcomes[LoadOutcome.CORRUPT] - by_kind["corrupt"]
            self.struck["damaged record"] += max(0, met)

    def damage(self, store: FaultyStore, cells: Sequence[ObjectKey]) -> None:
        for key in self.random.sample(cells, min(DAMAGED, len(cells))):
            other = next((each for each in cells if are_beside(each, key)), key)
            if all(store.inner.contains([key, other])):
                self.random.choice(list(DAMAGES.values()))(store.inner, key, other)


def test_so_many_faults_cost_time_alone(request, tmp_path, capsys):
    soak = Soak(tiny("llama", "bfloat16"))
    urls = {backend: url_of(backend, request, tmp_path / "store") for backend in BACKENDS}
    num_answers = 0
    for backend, policy in itertools.cycle(itertools.product(BACKENDS, POLICIES)):
        num_before = soak.struck.total()
        soak.play(urls[backend], policy)
        num_answers += SESSIONS * len(turns())
        done = soak.struck.total() >= NUM_FAULTS
        if done or num_before // REPORTED < soak.struck.total() // REPORTED:
            with capsys.disabled():
                sys.stdout.write(f"\n{soak} in {num_answers} answers, all of them right")
        if done:
            break
    assert all(soak.struck[kind] for kind in (*(fault.value for fault in Fault), "damaged record"))
