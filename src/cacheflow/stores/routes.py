"""The ways through tiers: of a read, to the first tier that has the object, and of a write, to the first that takes it.

A read fills its caller's buffer, so that a tier that is never slow costs no copy; a rival reads apart. A store that
hangs inside the system does not let go of a buffer; therefore, for a while after one of its reads was slow, a tier is
read apart too, and its rivals need not wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cacheflow.stores.base import GetRequest, PutOutcome, PutRequest, byte_view
from cacheflow.stores.copy_queue import copy_of
from cacheflow.stores.loan import Loan
from cacheflow.stores.record import RecordHeader
from cacheflow.stores.routed import Leg, Route
from cacheflow.stores.tier import CHANGING, Tier
from cacheflow.types import Clock, LoadOutcome

_WORSE = (
    None, LoadOutcome.MISS, LoadOutcome.CANCELLED, LoadOutcome.LATE, LoadOutcome.ERROR, LoadOutcome.CORRUPT,
)  # fmt: skip
"""What a read says where no tier had the object: the last of these that a tier said, LATE for one that was given up."""


class ReadRoute(Route[LoadOutcome]):
    """Through the tiers in service, until one has the object; two of them at once where one is slow."""

    def __init__(self, request: GetRequest, tiers: Sequence[Tier], *, priority: int, clock: Clock) -> None:
        """Prepare the way.

        Args:
            request: What to read.
            tiers: Where, in this order.
            priority: In the tiers' stores.
            clock: The tiers'.

        Raises:
            ValueError: The buffer is read-only, empty or not contiguous.
        """
        super().__init__()
        self._request, self._tiers, self._priority, self._clock = request, tiers, priority, clock
        self._target = np.frombuffer(byte_view(request.buffer, writable=True), np.uint8)
        self._is_cell = request.tap is None and request.key.kind not in CHANGING
        """It never changes: it may be read twice, and copied to other tiers."""
        self._left = deque(tiers)
        self._lacking: Sequence[Tier] = ()
        self._worst: LoadOutcome | None = None

    @property
    def failure(self) -> LoadOutcome:
        """See ``Route``."""
        return LoadOutcome.ERROR if self._worst is None else self._worst

    @property
    def goes_on(self) -> bool:
        """See ``Route``."""
        return self._next_tier() is not None

    def next_leg(self, left_s: float) -> Leg[LoadOutcome] | None:
        """See ``Route``."""
        while self._left:
            tier = self._left.popleft()
            if not tier.delivers:
                self._note(LoadOutcome.ERROR)
            elif not self._may_have_it(tier):
                self._note(LoadOutcome.MISS)
            else:
                return self._begin(tier, left_s, apart=tier.reads_apart and self._is_cell and self.goes_on)
        return None

    def rival(self, left_s: float) -> Leg[LoadOutcome] | None:
        """See ``Route``."""
        tier = self._next_tier()
        if tier is None or not self._may_have_it(tier) or not self.legs[0].tier.begin_race():
            return None
        self._left.remove(tier)
        return self._begin(tier, left_s, apart=True)

    def end(self, leg: Leg[LoadOutcome], outcome: LoadOutcome) -> bool:
        """See ``Route``."""
        leg.tier.end_read(
            self._request.key, self._target.nbytes, outcome, start_s=leg.begin_s, patience_s=leg.patience_s
        )
        if outcome is not LoadOutcome.OK:
            self._note(outcome)
            return False
        faster = self._tiers[: self._tiers.index(leg.tier)]
        overtaken = [other.tier for other in self.legs if other.tier in faster]
        for tier in overtaken:
            tier.note_overtaken()
        if self._is_cell:
            self._lacking = [tier for tier in faster if tier not in overtaken]  # which may have it
        return True

    def deliver(self, leg: Leg[LoadOutcome]) -> None:
        """See ``Route``; the faster tiers get it too, as far as they do not have it."""
        request, header = self._request, leg.headers[0] if leg.headers else None
        if leg.loan is not None and request.loan is not None and leg.loan.payload is not None:
            leg.loan.move_to(request.loan)
        elif leg.own is not None:
            np.copyto(self._target, leg.own)
        if header is not None and request.tell is not None:
            request.tell(header)
        for tier in self._lacking:
            if tier.delivers:
                tier.copies.offer(copy_of(request.key, request.buffer, header), promotes=True)

    def _begin(self, tier: Tier, left_s: float, *, apart: bool) -> Leg[LoadOutcome]:
        begin_s, headers = self._clock(), list[RecordHeader]()
        own = np.empty(self._target.nbytes, np.uint8) if apart else None
        # Only the fastest lends: what comes from another is promoted from the buffer, as its record describes it.
        loan = None if self._request.loan is None or tier is not self._tiers[0] else Loan()
        buffer = self._request.buffer if own is None else own
        request = replace(self._request, buffer=buffer, loan=loan, tell=headers.append)
        deadline_s = None if left_s == float("inf") else left_s
        try:
            handle = tier.store.submit_get([request], priority=self._priority, deadline_s=deadline_s)
        except BaseException:
            self._note(LoadOutcome.ERROR)  # for whoever goes on with the item after that
            raise
        patience_s = tier.begin_read(self._target.nbytes)
        return Leg(
            tier=tier,
            handle=handle,
            hangs_at_s=begin_s + min(patience_s, left_s / 2),
            race_at_s=begin_s + tier.race_after_s() if self._is_cell else float("inf"),
            begin_s=begin_s,
            patience_s=patience_s,
            own=own,
            loan=loan,
            headers=headers,
        )

    def _next_tier(self) -> Tier | None:
        return next((each for each in self._left if each.delivers), None)

    def _may_have_it(self, tier: Tier) -> bool:
        """Without a detour through the store's threads where it is certain."""
        return tier.may_hang or tier.store.contains([self._request.key])[0]

    def _note(self, outcome: LoadOutcome) -> None:
        self._worst = max(self._worst, outcome, key=_WORSE.index)


class WriteRoute(Route[PutOutcome]):
    """To the first tier in service that takes the object, and from there to the slower ones.

    It is never given up: writes that are late do not tell a tier that hangs from one with much to do.
    """

    def __init__(self, request: PutRequest, tiers: Sequence[Tier], *, priority: int) -> None:
        """Prepare the way.

        Args:
            request: What to write.
            tiers: Where, in this order.
            priority: In the tiers' stores.
        """
        super().__init__()
        self._request, self._priority = request, priority
        self._left = deque(tiers)
        self._failure = PutOutcome.ERROR
        self._offered = request.key.kind in CHANGING

    @property
    def failure(self) -> PutOutcome:
        """See ``Route``."""
        return self._failure

    def next_leg(self, left_s: float) -> Leg[PutOutcome] | None:
        """See ``Route``."""
        while self._left:
            tier = self._left.popleft()
            if tier.delivers:
                deadline_s = None if left_s == float("inf") else left_s
                handle = tier.store.submit_put([self._request], priority=self._priority, deadline_s=deadline_s)
                self._offer()
                return Leg(tier=tier, handle=handle)
        return None

    def end(self, leg: Leg[PutOutcome], outcome: PutOutcome) -> bool:
        """See ``Route``."""
        self._failure = outcome
        return outcome in (PutOutcome.STORED, PutOutcome.EXISTS)

    def _offer(self) -> None:
        """Copies to the slower tiers, once: now, and not at the end, of which nobody may ask."""
        if not self._offered:
            for tier in self._left:
                tier.copies.offer(self._request, promotes=False)
        self._offered = True
