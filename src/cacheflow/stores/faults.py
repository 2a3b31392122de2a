"""A store that fails on purpose, for tests and benchmarks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from threading import Condition, Lock

from cacheflow.errors import ConfigError
from cacheflow.stores.base import (
    Capabilities,
    GetHandle,
    GetRequest,
    PutHandle,
    PutOutcome,
    PutRequest,
    ReadTap,
    Store,
    StoreStats,
    byte_view,
)
from cacheflow.stores.held import FixedGate, Held, HeldHandle
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.wrapper import WrapperStore
from cacheflow.types import LoadOutcome

_NOW_S, _NEVER_S = float("-inf"), float("inf")


class Fault(Enum):
    """What goes wrong; all but ``PUT_ERROR`` happen to reads."""

    MISS = "miss"
    """The object is not found, though it may be there."""
    CORRUPT = "corrupt"
    """One bit of the record flips between the medium and the verification, which has to notice."""
    LATE = "late"
    """The bytes arrive in the buffer, but word of it only after the deadline (``FaultPlan.late_s`` without one)."""
    ERROR = "error"
    """The medium fails."""
    HANG = "hang"
    """Nothing happens until the deadline, or until the read is cancelled."""
    PUT_ERROR = "put_error"
    """A write fails and nothing is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRule:
    """When a fault strikes: conditions combine.

    Attributes:
        fault: What goes wrong.
        matches: Keys it may strike; None for all.
        every: Strikes every n-th operation on such a key, starting with the n-th.
        in_a_row: Strikes so many operations, the n-th and those after it: a store that fails and works by turns.
        probability: Chance to strike then, drawn from the plan's seed.
        limit: Strikes at most this often; None for no limit.
    """

    fault: Fault
    matches: Callable[[ObjectKey], bool] | None = None
    every: int = 1
    in_a_row: int = 1
    probability: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: ``every`` is below 1, ``in_a_row`` outside [1, every], or ``probability`` outside [0, 1].
        """
        if not 1 <= self.in_a_row <= self.every or not 0 <= self.probability <= 1:
            raise ConfigError(
                f"fault rule {self.fault.value}: every is {self.every} (at least 1), in_a_row {self.in_a_row} "
                f"(1 to every), probability {self.probability} (0 to 1)"
            )

    def is_due(self, num_seen: int) -> bool:
        """Whether it strikes the operation that is the ``num_seen``-th on such a key, by its count alone."""
        return num_seen >= self.every and num_seen % self.every < self.in_a_row


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Rules, of which the first that strikes decides; one seed, one sequence of faults.

    Attributes:
        rules: Tried in order for every item, in the order of submission.
        seed: Of the probabilities and of the bits that flip.
        late_s: How long a ``LATE`` read without a deadline is held back; it then ends as if nothing had happened.
    """

    rules: tuple[FaultRule, ...] = ()
    seed: int = 0
    late_s: float = 0.1


class FaultyStore(WrapperStore):
    """Injects the faults of a plan into the operations on a store, and counts them."""

    def __init__(self, inner: Store, plan: FaultPlan) -> None:
        """Wrap ``inner``, which is closed with this store."""
        super().__init__(inner)
        self._draw_lock = Lock()
        self.set_plan(plan)

    def set_plan(self, plan: FaultPlan) -> None:
        """Inject these faults from now on, counted from 0; operations under way end as they were to."""
        with self._draw_lock:
            self._plan = plan
            self._random = random.Random(plan.seed)
            self._seen = [0] * len(plan.rules)
            self._struck = [0] * len(plan.rules)

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``."""
        inner = self.inner.capabilities()
        return replace(inner, name=f"faulty({inner.name})")

    def injected(self) -> dict[Fault, int]:
        """How often each fault struck; every fault is a key."""
        counts: Counter[Fault] = Counter(dict.fromkeys(Fault, 0))
        with self._draw_lock:
            for rule, struck in zip(self._plan.rules, self._struck, strict=True):
                counts[rule.fault] += struck
        return dict(counts)

    def stats(self) -> StoreStats:
        """See ``Store.stats``."""
        return replace(super().stats(), injected={fault.value: count for fault, count in self.injected().items()})

    def submit_get(
        self, requests: Sequence[GetRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> GetHandle:
        """See ``Store.submit_get``."""
        sizes = [byte_view(request.buffer, writable=True).nbytes for request in requests]
        ledger = self._batches.reads(sizes, deadline_s)
        late_at_s = self._clock() + self._plan.late_s if deadline_s is None else _NEVER_S
        passed: list[GetRequest] = []
        items: list[Held[LoadOutcome]] = []
        releases_s: list[float] = []
        for request in requests:
            fault = self._draw(request.key, puts=False)
            releases_s.append({Fault.LATE: late_at_s, Fault.HANG: _NEVER_S}.get(fault, _NOW_S) if fault else _NOW_S)
            if fault in (Fault.MISS, Fault.ERROR, Fault.HANG):
                given = {Fault.MISS: LoadOutcome.MISS, Fault.ERROR: LoadOutcome.ERROR}
                items.append(Held(outcome=given.get(fault)))
                continue
            items.append(Held(len(passed)))
            passed.append(self._tapped(request) if fault is Fault.CORRUPT else request)
        inner = self.inner.submit_get(passed, priority=priority, deadline_s=deadline_s)
        gate = FixedGate(tuple(releases_s))
        return self._batches.track(
            HeldHandle(inner, items, gate, ledger=ledger, condition=Condition(), clock=self._clock)
        )  # fmt: skip

    def submit_put(
        self, requests: Sequence[PutRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> PutHandle:
        """See ``Store.submit_put``."""
        sizes = [sum(byte_view(buffer).nbytes for buffer in request.buffers) for request in requests]
        ledger = self._batches.writes(sizes, deadline_s)
        passed: list[PutRequest] = []
        items: list[Held[PutOutcome]] = []
        for request in requests:
            if self._draw(request.key, puts=True) is None:
                items.append(Held(len(passed)))
                passed.append(request)
            else:
                items.append(Held(outcome=PutOutcome.ERROR))
        inner = self.inner.submit_put(passed, priority=priority, deadline_s=deadline_s)
        gate = FixedGate((_NOW_S,) * len(items))
        return self._batches.track(
            HeldHandle(inner, items, gate, ledger=ledger, condition=Condition(), clock=self._clock)
        )  # fmt: skip

    def _draw(self, key: ObjectKey, *, puts: bool) -> Fault | None:
        """The fault that strikes this operation, if any; none once the store is closed."""
        with self._draw_lock:
            for index, rule in enumerate(self._plan.rules):
                if (rule.fault is Fault.PUT_ERROR) != puts or not (rule.matches is None or rule.matches(key)):
                    continue
                self._seen[index] += 1
                exhausted = rule.limit is not None and self._struck[index] >= rule.limit
                if self._closed or exhausted or not rule.is_due(self._seen[index]):
                    continue
                if self._random.random() < rule.probability:
                    self._struck[index] += 1
                    return rule.fault
        return None

    def _tapped(self, request: GetRequest) -> GetRequest:
        with self._draw_lock:
            return replace(request, tap=ReadTap(self._random.randrange(1 << 31)))
