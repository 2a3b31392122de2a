"""Two tiers asked for one object: where a read takes much longer than its tier's reads do, the faster answer counts.

The first read fills the caller's buffer, which nobody else may write to before its store has let go of it. So the
second one, the rival, fills a buffer of its own, and is copied once the first has ended or was cancelled. A store that
hangs inside the system does not let go; therefore, for a while after one of its reads was slow, a tier is read apart:
into a buffer of ours, from where each read is copied, so that its rival need not wait for it. A tier that is never slow
costs no copy.

As in ``held`` and ``routed`` no thread is needed to wait for either: the one that waits for the outcome looks at both.
Only the loser is cancelled on a thread of its own, since that may take as long as its store likes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Condition, Thread

import numpy as np

from cacheflow.stores.base import GetRequest, byte_view
from cacheflow.stores.handle import wait_s
from cacheflow.stores.loan import Loan
from cacheflow.stores.tier import Tier
from cacheflow.types import Clock, LoadOutcome

SLICE_S = 0.002
"""Longest wait for one of two reads, before the other is looked at."""
ENDED = (LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR)
"""Outcomes after which a store does not touch the buffer any more."""


class TierRead:
    """One object's read in one tier."""

    def __init__(
        self, tier: Tier, request: GetRequest, *, apart: bool, priority: int, left_s: float, clock: Clock
    ) -> None:
        """Submit it.

        Args:
            tier: Where it is read.
            request: What the caller asked for.
            apart: Into a buffer of its own; otherwise into the caller's.
            priority: In the tier's store.
            left_s: Seconds to its deadline; ``inf`` without one.
            clock: The tier's.
        """
        self.tier, self._request = tier, request
        self._target = np.frombuffer(byte_view(request.buffer, writable=True), np.uint8)
        self.begin_s, self.patience_s = clock(), tier.begin_read(self._target.nbytes)
        self._own = np.empty(self._target.nbytes, np.uint8) if apart else None
        self._loan = None if request.loan is None else Loan()
        own = replace(request, buffer=request.buffer if self._own is None else self._own, loan=self._loan)
        deadline_s = None if left_s == float("inf") else left_s
        self.handle = tier.store.submit_get([own], priority=priority, deadline_s=deadline_s)
        self._ended = self._has_let_go = False

    @property
    def apart(self) -> bool:
        """Whether it leaves the caller's buffer alone."""
        return self._own is not None

    def poll(self) -> LoadOutcome | None:
        """Its outcome."""
        (outcome,) = self.handle.poll()
        return outcome

    def deliver(self) -> None:
        """Give the caller what was read."""
        if self._loan is not None and self._request.loan is not None and self._loan.payload is not None:
            self._loan.move_to(self._request.loan)
        elif self._own is not None:
            np.copyto(self._target, self._own)

    def end(self, outcome: LoadOutcome) -> None:
        """Tell the tier how it ended; ``LATE`` where nobody waits for it any more. Again, nothing."""
        if not self._ended:
            self._ended = True
            self.tier.end_read(
                self._request.key, self._target.nbytes, outcome, start_s=self.begin_s, patience_s=self.patience_s
            )

    def cancel(self) -> None:
        """Give it up; on return its store touches neither buffer."""
        self.handle.cancel()
        self.end(LoadOutcome.LATE)
        if self._loan is not None:
            self._loan.end()
        self._has_let_go = True

    def lose(self) -> None:
        """Cancel it without waiting; not where it fills the caller's buffer and has not let go of it."""
        self.end(LoadOutcome.LATE)
        if self._has_let_go:
            return
        if self.poll() in ENDED:
            self.cancel()
            return
        Thread(target=self.cancel, name="cacheflow-tier-loser", daemon=True).start()


class RacedRead:
    """A handle of one object: its read in one tier, and the rival that it gets when it is slow."""

    def __init__(
        self, first: TierRead, new_rival: Callable[[], TierRead | None], *, race_after_s: float, clock: Clock
    ) -> None:
        """Wait for ``first``.

        Args:
            first: Its read.
            new_rival: Begins its read in another tier, apart; None where there is none. Called once at most.
            race_after_s: Seconds from the beginning of ``first`` after which that is done; ``inf`` for never.
            clock: Monotonic clock.
        """
        self.first, self._new_rival, self._clock = first, new_rival, clock
        self._race_at_s = first.begin_s + race_after_s
        self._rival: TierRead | None = None
        self._changed = Condition()
        self._outcome: LoadOutcome | None = None
        self._first_outcome: LoadOutcome | None = None
        self._leaving = self._overtaken = False
        self.winner = first
        """Whose bytes they are, once the outcome is ``OK``."""
        self.rival_failure: LoadOutcome | None = None
        """How the rival ended where it brought nothing."""

    @property
    def overtaken(self) -> bool:
        """Whether the rival was there first, and the first one has not said that it has nothing."""
        return self._overtaken

    def poll(self) -> tuple[LoadOutcome | None, ...]:
        """See ``Handle.poll``."""
        with self._changed:
            self._look()
            return (self._outcome,)

    def wait(self, timeout_s: float | None = None) -> tuple[LoadOutcome | None, ...]:
        """See ``Handle.wait``."""
        until_s = float("inf") if timeout_s is None else self._clock() + timeout_s
        while True:
            with self._changed:
                now_s = self._look()
                if self._outcome is not None or now_s >= until_s:
                    return (self._outcome,)
                legs = [leg for leg in (self.first, self._rival) if leg is not None and leg.poll() is None]
                wake_s = min(until_s, self._race_at_s, now_s + SLICE_S if len(legs) > 1 else float("inf"))
                timeout = wait_s(wake_s, now_s)
                if not legs:
                    self._changed.wait(timeout)
            if legs:
                legs[0].handle.wait(timeout)

    def cancel(self) -> None:
        """See ``Handle.cancel``; does not wait for a read that leaves the caller's buffer alone."""
        with self._changed:
            self._race_at_s = float("inf")
            self._look()
            if self._outcome is None:
                self._outcome = LoadOutcome.CANCELLED
            rival, self._rival = self._rival, None
            lets_go = self._outcome in (LoadOutcome.LATE, LoadOutcome.CANCELLED)
        if rival is not None:
            rival.lose()
        if lets_go:
            self.let_go()

    def give_up(self) -> None:
        """Note that nobody waits for the first read any more."""
        self.first.end(LoadOutcome.LATE)

    def let_go(self) -> None:
        """Give the first read up; returns once it does not touch the caller's buffer any more."""
        if self.first.apart:
            self.first.lose()
        else:
            self.first.cancel()

    def take_rival(self) -> TierRead | None:
        """The rival, where it is still under way or has what is wanted: its outcome is no longer this handle's."""
        with self._changed:
            self._race_at_s = float("inf")
            rival, self._rival = self._rival, None
            if rival is None and self._outcome is LoadOutcome.OK and self.winner is not self.first:
                return self.winner  # it was let in while somebody gave the first one up
            return rival

    def _look(self) -> float:
        """Take in what both have to say; returns the time."""
        now_s = self._clock()
        if self._outcome is None:
            self._look_at_first()
        if self._outcome is None and self._rival is not None:
            self._look_at_rival(self._rival)
        if self._outcome is None and self._rival is None and self._first_outcome is not None:
            self._outcome = self._first_outcome
            self.first.end(self._first_outcome)
        if self._outcome is None and now_s >= self._race_at_s:
            self._race_at_s = float("inf")
            self._rival = self._new_rival()
        return now_s

    def _look_at_first(self) -> None:
        if self._leaving:  # it has lost, whatever it says now
            return
        outcome = self.first.poll()
        if outcome is LoadOutcome.OK:
            self._settle(self.first)
        elif outcome is not None:
            self._first_outcome = outcome

    def _look_at_rival(self, rival: TierRead) -> None:
        outcome = rival.poll()
        if outcome is LoadOutcome.OK:
            if self._is_free():
                self._settle(rival)
            elif not self._leaving:
                self._leave()
        elif outcome is not None:
            rival.end(outcome)
            self._rival, self.rival_failure = None, outcome

    def _is_free(self) -> bool:
        """Whether nobody writes into the caller's buffer."""
        return self.first.apart or self._first_outcome in ENDED

    def _settle(self, winner: TierRead) -> None:
        winner.deliver()
        winner.end(LoadOutcome.OK)
        rival, self._rival = self._rival, None
        self.winner, self._outcome = winner, LoadOutcome.OK
        if winner is self.first:
            if rival is not None:
                rival.lose()
        elif self._first_outcome is not None:
            self.first.end(self._first_outcome)
        else:
            self._overtaken = True
            self.first.tier.note_overtaken()
            self.first.lose()

    def _leave(self) -> None:
        """Have a thread wait until the first one has let go of the caller's buffer."""
        self._leaving = True
        self.first.end(LoadOutcome.LATE)
        Thread(target=self._left, name="cacheflow-tier-leave", daemon=True).start()

    def _left(self) -> None:
        self.first.cancel()
        with self._changed:
            if self._outcome is None and self._rival is not None:
                self._settle(self._rival)
            self._changed.notify_all()
