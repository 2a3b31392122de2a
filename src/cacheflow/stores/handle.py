"""Handles: the outcomes of a batch, each set once, and the batch that worker threads carry out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from threading import TIMEOUT_MAX, Condition
from typing import Generic, TypeVar

from cacheflow.stores.base import PutOutcome
from cacheflow.types import Clock, LoadOutcome

O = TypeVar("O", bound=Enum)  # noqa: E741 - an outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts(Generic[O]):
    """The outcomes that reads and writes have in common."""

    done: O
    error: O
    late: O
    cancelled: O


READS = Verdicts(done=LoadOutcome.OK, error=LoadOutcome.ERROR, late=LoadOutcome.LATE, cancelled=LoadOutcome.CANCELLED)
WRITES = Verdicts(done=PutOutcome.STORED, error=PutOutcome.ERROR, late=PutOutcome.LATE, cancelled=PutOutcome.CANCELLED)


def wait_s(until_s: float, now_s: float) -> float | None:
    """Timeout for a ``Condition`` that ends at ``until_s``; None for ever."""
    return min(max(until_s - now_s, 0.0), TIMEOUT_MAX) if until_s != float("inf") else None


class Ledger(Generic[O]):
    """Outcomes of the items of one batch; not thread-safe, the handle that owns it holds a lock."""

    def __init__(
        self,
        num_items: int,
        verdicts: Verdicts[O],
        *,
        deadline_at_s: float,
        on_outcome: Callable[[int, O, float], None],
    ) -> None:
        """Start with every item pending.

        Args:
            num_items: Items in the batch.
            verdicts: The outcomes of its kind of operation.
            deadline_at_s: Time from which a pending item is late; ``inf`` for no deadline.
            on_outcome: Called once per item with its index, outcome and time; must not call the handle.
        """
        self.outcomes: list[O | None] = [None] * num_items
        self.num_pending = num_items
        self.deadline_at_s = deadline_at_s
        self.verdicts = verdicts
        self._on_outcome = on_outcome

    def settle(self, index: int, outcome: O, at_s: float) -> None:
        """Set the outcome of a pending item."""
        self.outcomes[index] = outcome
        self.num_pending -= 1
        self._on_outcome(index, outcome, at_s)

    def settle_all(self, outcome: O, at_s: float) -> None:
        """Set the outcome of every pending item."""
        for index, current in enumerate(self.outcomes):
            if current is None:
                self.settle(index, outcome, at_s)

    def expire(self, now_s: float) -> bool:
        """Make pending items late if the deadline has passed; whether it just did."""
        expired = self.num_pending > 0 and now_s >= self.deadline_at_s
        if expired:
            self.settle_all(self.verdicts.late, now_s)
        return expired


class OperationHandle(Generic[O]):
    """A batch carried out by workers, who ``begin`` and ``finish`` its items; callers poll, wait and cancel.

    A running item whose outcome is set (late or cancelled) keeps its buffer until its worker calls ``finish``;
    ``cancel`` waits for that.
    """

    def __init__(
        self,
        num_items: int,
        verdicts: Verdicts[O],
        *,
        deadline_s: float | None,
        clock: Clock,
        on_outcome: Callable[[int, O, float], None],
    ) -> None:
        """Create a batch with every item pending.

        Args:
            num_items: Items in the batch.
            verdicts: The outcomes of its kind of operation.
            deadline_s: Seconds from now; None for no deadline.
            clock: Monotonic clock.
            on_outcome: Called once per item with its index, outcome and time; must not call the handle.
        """
        self._condition = Condition()
        self._clock = clock
        self._num_running = 0
        self._ledger = Ledger(
            num_items,
            verdicts,
            deadline_at_s=float("inf") if deadline_s is None else clock() + deadline_s,
            on_outcome=on_outcome,
        )

    def poll(self) -> tuple[O | None, ...]:
        """See ``Handle.poll``."""
        with self._condition:
            self._expire()
            return tuple(self._ledger.outcomes)

    def wait(self, timeout_s: float | None = None) -> tuple[O | None, ...]:
        """See ``Handle.wait``."""
        until_s = float("inf") if timeout_s is None else self._clock() + timeout_s
        with self._condition:
            while self._ledger.num_pending:
                now_s = self._expire()
                if not self._ledger.num_pending or now_s >= until_s:
                    break
                self._condition.wait(wait_s(min(until_s, self._ledger.deadline_at_s), now_s))
            return tuple(self._ledger.outcomes)

    def cancel(self) -> None:
        """See ``Handle.cancel``."""
        self.abandon(self._ledger.verdicts.cancelled)
        with self._condition:
            while self._num_running:
                self._condition.wait()

    def abandon(self, outcome: O) -> None:
        """End every pending item with ``outcome``, without waiting for running transfers."""
        with self._condition:
            self._expire()
            self._ledger.settle_all(outcome, self._clock())
            self._condition.notify_all()

    def is_pending(self, index: int) -> bool:
        """Whether an item has no outcome, so far as anybody has looked; takes no lock."""
        return self._ledger.outcomes[index] is None

    def begin(self, index: int) -> bool:
        """A worker takes an item; False when it already has an outcome and must not be touched."""
        with self._condition:
            self._expire()
            if self._ledger.outcomes[index] is not None:
                return False
            self._num_running += 1
            return True

    def finish(self, index: int, outcome: O) -> None:
        """A worker has ended an item it began and no longer touches its buffer."""
        with self._condition:
            self._num_running -= 1
            now_s = self._expire()
            if self._ledger.outcomes[index] is None:
                self._ledger.settle(index, outcome, now_s)
            self._condition.notify_all()

    def _expire(self) -> float:
        now_s = self._clock()
        if self._ledger.expire(now_s):
            self._condition.notify_all()
        return now_s
