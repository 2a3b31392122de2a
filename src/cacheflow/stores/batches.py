"""The batches that a store in front of others was given: how they ended, and which of them somebody may wait for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.handle import READS, WRITES, Ledger, O, Verdicts
from cacheflow.stores.meter import Meter
from cacheflow.types import Clock, LoadOutcome

H = TypeVar("H")


class Batches(Generic[H]):
    """Outcomes are counted as they become known, and handles remembered while somebody has them; thread-safe.

    Attributes:
        meter: Counts what callers saw.
    """

    def __init__(self, clock: Clock) -> None:
        """Start with none."""
        self.meter = Meter()
        self._clock = clock
        self._open: weakref.WeakSet[H] = weakref.WeakSet()
        self._lock = Lock()

    def reads(self, sizes: Sequence[int], deadline_s: float | None) -> Ledger[LoadOutcome]:
        """A ledger of reads that are submitted now, of so many bytes each; ``deadline_s`` seconds from now."""
        start_s = self._clock()

        def count(index: int, outcome: LoadOutcome, end_s: float) -> None:
            self.meter.record_get(outcome, sizes[index], start_s=start_s, end_s=end_s)

        return self._ledger(len(sizes), READS, deadline_s, count)

    def writes(self, sizes: Sequence[int], deadline_s: float | None) -> Ledger[PutOutcome]:
        """The same of writes."""

        def count(index: int, outcome: PutOutcome, _end_s: float) -> None:
            self.meter.record_put(outcome, sizes[index])

        return self._ledger(len(sizes), WRITES, deadline_s, count)

    def _ledger(
        self,
        num_items: int,
        verdicts: Verdicts[O],
        deadline_s: float | None,
        on_outcome: Callable[[int, O, float], None],
    ) -> Ledger[O]:
        deadline_at_s = float("inf") if deadline_s is None else self._clock() + deadline_s
        return Ledger(num_items, verdicts, deadline_at_s=deadline_at_s, on_outcome=on_outcome)

    def track(self, handle: H) -> H:
        """Remember a handle for as long as somebody has it."""
        with self._lock:
            self._open.add(handle)
        return handle

    def still_open(self) -> tuple[H, ...]:
        """The handles that somebody has, for the store that closes to end."""
        with self._lock:
            return tuple(self._open)
