"""Handles of batches whose items go from one store to the next until one of them settles it.

They need no thread of their own, as in ``held``: the thread that waits for an outcome sends an item on. Only where a
store hangs a thread waits until it has let go of the item's buffer; before that nobody else may fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread
from typing import Generic, Protocol, TypeVar

from cacheflow.stores.base import Handle
from cacheflow.stores.handle import Ledger, O, wait_s
from cacheflow.types import Clock

SLICE_S = 0.002
"""Longest wait for one item of several, before the others are looked at."""

R = TypeVar("R")


class Route(Protocol[R]):
    """The way of one item. Every method but ``let_go`` is called with its handle's lock held; none of those waits."""

    @property
    def handle(self) -> Handle[R] | None:  # type: ignore[type-var]
        """Of the store where the item is, a batch of it alone; None at the end of the way."""
        ...

    @property
    def failure(self) -> R:
        """The item's outcome where no store has settled it."""
        ...

    def begin(self, left_s: float) -> float:
        """Submit the item to the next store, with so many seconds to its deadline, ``inf`` without one.

        Returns:
            Seconds after which the store counts as hung and the item goes on; ``inf`` for never.
        """
        ...

    def end(self, outcome: R) -> bool:
        """Take note of the store's outcome; whether it is the item's too."""
        ...

    def give_up(self) -> None:
        """Take note that nobody waits for the store any more."""
        ...

    def let_go(self) -> None:
        """After ``give_up``, without the lock: wait until the store has let go of the item's buffer."""
        ...


@dataclass(slots=True, eq=False)
class _Item(Generic[O]):
    route: Route[O]
    go_on_at_s: float = float("inf")
    leaving: bool = False
    """A thread waits until the store has let go of the buffer."""


class RoutedHandle(Generic[O]):
    """A batch, each item of which is in one store at a time."""

    def __init__(self, routes: Sequence[Route[O]], *, ledger: Ledger[O], clock: Clock) -> None:
        """Begin every route.

        Args:
            routes: One for each item.
            ledger: Where outcomes are written; one per handle.
            clock: Monotonic clock.

        Raises:
            ValueError: A store does not take an item (a caller's bug); none is under way then.
        """
        self._items = [_Item(route) for route in routes]
        self._ledger, self._clock = ledger, clock
        self._changed = Condition()
        try:
            with self._changed:
                for index in range(len(self._items)):
                    self._begin(index)
        except ValueError:
            self.cancel()
            raise

    def poll(self) -> tuple[O | None, ...]:
        """See ``Handle.poll``."""
        with self._changed:
            self._update()
            return tuple(self._ledger.outcomes)

    def wait(self, timeout_s: float | None = None) -> tuple[O | None, ...]:
        """See ``Handle.wait``."""
        until_s = float("inf") if timeout_s is None else self._clock() + timeout_s
        while True:
            with self._changed:
                now_s = self._update()
                if not self._ledger.num_pending or now_s >= until_s:
                    return tuple(self._ledger.outcomes)
                pending = [self._items[index] for index in self._pending()]
                wake_s = min(until_s, self._ledger.deadline_at_s, *(item.go_on_at_s for item in pending))
                if len(pending) > 1:
                    wake_s = min(wake_s, now_s + SLICE_S)
                timeout = wait_s(wake_s, now_s)
                handle = next((item.route.handle for item in pending if not item.leaving), None)
                if handle is None:
                    self._changed.wait(timeout)
            if handle is not None:
                handle.wait(timeout)

    def abandon(self) -> None:
        """End every pending item as cancelled, without waiting for transfers under way."""
        with self._changed:
            self._update()
            for index in self._pending():
                self._settle(index, self._ledger.verdicts.cancelled, self._clock())
            self._changed.notify_all()

    def cancel(self) -> None:
        """See ``Handle.cancel``."""
        self.abandon()
        handles = [item.route.handle for item in self._items]
        for handle in handles:
            if handle is not None:
                handle.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not any(item.leaving for item in self._items))

    def _pending(self) -> list[int]:
        return [index for index, outcome in enumerate(self._ledger.outcomes) if outcome is None]

    def _update(self) -> float:
        """Send on what has to go on, and settle the rest; returns the time."""
        now_s = self._clock()
        for index in self._pending():
            item = self._items[index]
            if item.leaving or item.route.handle is None:
                continue
            (outcome,) = item.route.handle.poll()
            if outcome is not None:
                if item.route.end(outcome):
                    self._ledger.settle(index, outcome, now_s)
                else:
                    self._begin(index)
            elif now_s >= item.go_on_at_s:
                self._leave(index)
        if now_s >= self._ledger.deadline_at_s:
            for index in self._pending():
                self._settle(index, self._ledger.verdicts.late, now_s)
        return now_s

    def _begin(self, index: int) -> None:
        item, now_s = self._items[index], self._clock()
        item.go_on_at_s = now_s + item.route.begin(max(0.0, self._ledger.deadline_at_s - now_s))
        if item.route.handle is None:
            self._ledger.settle(index, item.route.failure, now_s)

    def _settle(self, index: int, outcome: O, now_s: float) -> None:
        """Settle an item that is still in a store."""
        item = self._items[index]
        if item.route.handle is not None and not item.leaving:
            item.route.give_up()
        self._ledger.settle(index, outcome, now_s)

    def _leave(self, index: int) -> None:
        """Have a thread wait until a store that hangs has let go of the buffer; then the item goes on."""
        item = self._items[index]
        item.route.give_up()
        item.leaving, item.go_on_at_s = True, float("inf")
        Thread(target=partial(self._go_on, index), name="cacheflow-tier-leave", daemon=True).start()

    def _go_on(self, index: int) -> None:
        self._items[index].route.let_go()
        with self._changed:
            self._items[index].leaving = False
            if self._ledger.outcomes[index] is None:
                self._begin(index)
            self._changed.notify_all()
