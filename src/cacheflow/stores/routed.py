"""Handles of batches whose items are asked of one tier after another, or of two at once, until one settles them.

An item in one tier is a leg. Where it fails or hangs, the next leg begins; where it is slow another one, the rival,
begins beside it, and the first that has the object counts.

A buffer has one writer. A leg either fills the caller's buffer, as the item's ``holder``, or, apart, one of its own,
which is copied if it wins. Neither another leg nor that copy touches the caller's buffer before the holder's store has
let go of it: it has said how the leg ended, other than ``LATE`` or ``CANCELLED``, or its ``cancel`` has returned.

No thread is needed to wait for an outcome: as in ``held``, the thread that asks sends an item on. Only where a leg is
given up a thread waits for its store, which may hang, to let go.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Generic

from cacheflow.stores.base import Handle
from cacheflow.stores.handle import Ledger, O, wait_s
from cacheflow.stores.loan import Loan
from cacheflow.stores.record import RecordHeader
from cacheflow.stores.tier import Tier
from cacheflow.threads import start_thread
from cacheflow.types import Bytes, Clock

logger = logging.getLogger(__name__)

SLICE_S = 0.002
"""Longest wait for one leg of several, before the others are looked at."""
UNLEFT_S = 0.1
"""Time after which a thread is asked for again that could not be started."""


@dataclass(slots=True, eq=False, kw_only=True)
class Leg(Generic[O]):
    """One item in one tier; a write's has a tier and a handle, all else is of reads.

    Attributes:
        tier: The tier.
        handle: Of its store, a batch of the item alone.
        hangs_at_s: Time from which it is given up where there is another tier; ``inf`` for never.
        race_at_s: Time from which another tier is asked too; ``inf`` for never.
        begin_s: When it began.
        patience_s: Seconds after which its tier counts as hung.
        own: Its own buffer; None where it fills the caller's.
        loan: Takes what the store lends.
        headers: Takes the record's header.
    """

    tier: Tier
    handle: Handle[O]
    hangs_at_s: float = float("inf")
    race_at_s: float = float("inf")
    begin_s: float = 0.0
    patience_s: float = float("inf")
    own: Bytes | None = None
    loan: Loan | None = None
    headers: list[RecordHeader] = field(default_factory=list)


class Route(ABC, Generic[O]):
    """The way of one item. Every method is called with its handle's lock held; none of them waits for a store.

    Attributes:
        legs: Those that somebody waits for, the oldest first: one, or two while they race.
        holder: The leg whose store may touch the caller's buffer.
        winner: The leg that has settled the item, and how; the outcome is known once nobody holds the buffer.
    """

    def __init__(self) -> None:
        """Begin nothing yet."""
        self.legs: list[Leg[O]] = []
        self.holder: Leg[O] | None = None
        self.winner: tuple[Leg[O], O] | None = None

    @property
    def race_at_s(self) -> float:
        """Time from which a rival is wanted."""
        return self.legs[0].race_at_s if len(self.legs) == 1 else float("inf")

    @property
    @abstractmethod
    def failure(self) -> O:
        """The item's outcome where no leg has settled it."""

    @property
    def goes_on(self) -> bool:
        """Whether there is a tier to go on to from one that hangs."""
        return False

    @abstractmethod
    def next_leg(self, left_s: float) -> Leg[O] | None:
        """Submit the item to the next tier; None at the end of the way.

        Called while nobody holds the caller's buffer.

        Args:
            left_s: Seconds to the item's deadline; ``inf`` without one.

        Raises:
            ValueError: The store does not take it (a caller's bug).
        """

    def rival(self, left_s: float) -> Leg[O] | None:
        """As ``next_leg``, apart and beside the leg under way; None where that may not be."""
        del left_s
        return None

    @abstractmethod
    def end(self, leg: Leg[O], outcome: O) -> bool:
        """Take note that a leg is waited for no longer, once for each; whether the item is settled by its outcome.

        ``legs`` has the others then. An outcome that the store has not said is ``LATE`` or ``CANCELLED``.
        """

    def deliver(self, leg: Leg[O]) -> None:
        """Give the caller what the winner brought; nobody holds the caller's buffer."""
        del leg


class RoutedHandle(Generic[O]):
    """A batch, each item of which goes its own way."""

    def __init__(self, routes: Sequence[Route[O]], *, ledger: Ledger[O], clock: Clock) -> None:
        """Begin every route.

        Args:
            routes: One for each item.
            ledger: Where outcomes are written; one per handle.
            clock: Monotonic clock.

        Raises:
            ValueError: A store does not take an item (a caller's bug); none is under way then.
        """
        self._routes, self._ledger, self._clock = routes, ledger, clock
        self._unsaid = (ledger.verdicts.late, ledger.verdicts.cancelled)
        self._changed = Condition()
        self._unleft: list[tuple[int, Leg[O]]] = []
        try:
            with self._changed:
                self._update()
        except BaseException:  # nobody gets the handle, to wait or to cancel
            with self._changed:
                self._settle_pending(ledger.verdicts.cancelled, clock())
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
                routes = [self._routes[index] for index in self._pending()]
                legs = [leg for route in routes for leg in route.legs]
                wake_s = min(
                    until_s,
                    self._ledger.deadline_at_s,
                    now_s + SLICE_S if max(len(routes), len(legs)) > 1 else float("inf"),
                    now_s + UNLEFT_S if self._unleft else float("inf"),
                    *(route.race_at_s for route in routes),
                    *(leg.hangs_at_s for leg in legs),
                )
                timeout = wait_s(wake_s, now_s)
                if not legs:
                    self._changed.wait(timeout)
            if legs:
                legs[0].handle.wait(timeout)

    def abandon(self) -> None:
        """End every pending item as cancelled, without waiting for transfers under way."""
        with self._changed:
            now_s = self._update()
            self._settle_pending(self._ledger.verdicts.cancelled, now_s)
            self._changed.notify_all()

    def cancel(self) -> None:
        """See ``Handle.cancel``; does not wait for legs that leave the callers' buffers alone."""
        self.abandon()
        for index, route in enumerate(self._routes):
            holder = route.holder
            if holder is not None:
                self._let_go(index, holder)

    def _pending(self) -> list[int]:
        return [index for index, outcome in enumerate(self._ledger.outcomes) if outcome is None]

    def _update(self) -> float:
        """Send on what has to go on, and settle what is late; returns the time."""
        now_s = self._clock()
        unleft, self._unleft = self._unleft, []
        for index, leg in unleft:
            self._leave(index, leg)
        for index in self._pending():
            self._take_in(index, now_s)
            if self._ledger.outcomes[index] is None:
                self._go_on(index, now_s)
        if now_s >= self._ledger.deadline_at_s:
            self._settle_pending(self._ledger.verdicts.late, now_s)
        return now_s

    def _take_in(self, index: int, now_s: float) -> None:
        """Look what the legs of a pending item have to say."""
        route = self._routes[index]
        for leg in tuple(route.legs):
            (outcome,) = leg.handle.poll()
            if outcome in self._unsaid and len(route.legs) == 1:
                self._settle(index, outcome, now_s)
                return
            if outcome is None and now_s >= leg.hangs_at_s:
                leg.hangs_at_s = float("inf")
                if route.goes_on or len(route.legs) > 1:
                    outcome = self._ledger.verdicts.late
            if outcome is not None and self._end(index, leg, outcome):
                for loser in tuple(route.legs):
                    self._end(index, loser, self._ledger.verdicts.late)
                route.winner = leg, outcome
                return

    def _go_on(self, index: int, now_s: float) -> None:
        """Deliver what the winner of a pending item brought, or begin a leg where one is wanted."""
        route, left_s = self._routes[index], max(0.0, self._ledger.deadline_at_s - now_s)
        if now_s >= route.race_at_s:
            route.legs[0].race_at_s = float("inf")
            rival = route.rival(left_s)
            if rival is not None:
                route.legs.append(rival)
        if route.legs or route.holder is not None:
            return
        if route.winner is not None:
            winner, outcome = route.winner
            route.deliver(winner)
            self._ledger.settle(index, outcome, now_s)
            return
        leg = route.next_leg(left_s)
        if leg is None:
            self._ledger.settle(index, route.failure, now_s)
            return
        route.legs.append(leg)
        if leg.own is None:
            route.holder = leg

    def _end(self, index: int, leg: Leg[O], outcome: O) -> bool:
        """Wait for a leg of a pending item no longer; whether its outcome settles the item."""
        route = self._routes[index]
        route.legs.remove(leg)
        settles = route.end(leg, outcome)
        if outcome in self._unsaid:
            self._leave(index, leg)
        elif route.holder is leg:
            route.holder = None
        return settles

    def _settle_pending(self, outcome: O, now_s: float) -> None:
        for index in self._pending():
            self._settle(index, outcome, now_s)

    def _settle(self, index: int, outcome: O, now_s: float) -> None:
        """Settle an item that is late or cancelled; whoever holds the caller's buffer is left to ``cancel``."""
        route = self._routes[index]
        legs = tuple(route.legs)
        route.legs.clear()
        for leg in legs:
            route.end(leg, outcome)
        self._ledger.settle(index, outcome, now_s)
        for leg in legs:
            if leg is not route.holder:
                self._leave(index, leg)

    def _leave(self, index: int, leg: Leg[O]) -> None:
        """Have a thread wait until the store of a leg that was given up has let go of it."""
        if start_thread(self._let_go, args=(index, leg), name="cacheflow-tier-leave") is None:
            self._unleft.append((index, leg))

    def _let_go(self, index: int, leg: Leg[O]) -> None:
        leg.handle.cancel()
        with self._changed:
            route = self._routes[index]
            held = route.holder is leg
            if held:
                route.holder = None
            try:
                if leg.loan is not None:
                    leg.loan.end()
                if held:
                    self._update()
            except Exception:  # nobody is above this thread: a caller who waits asks the next tier himself
                logger.exception("bug in a store: an item could not go on to the next tier")
            self._changed.notify_all()
