"""What the two threads of one restoration share."""

from __future__ import annotations

import threading

from cacheflow.plan.explain import Span
from cacheflow.plan.pointers import RestoreState
from cacheflow.types import Clock


class Shared:
    """What the two threads of one restoration share; ``changed`` guards ``state`` and ``spans``."""

    def __init__(self, state: RestoreState, clock: Clock) -> None:
        """Start the restoration's clock."""
        self.state = state
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.spans: list[Span] = []
        self.restored_at_s: float | None = None
        self._clock, self._origin_s = clock, clock()

    def now_s(self) -> float:
        """Seconds since the restoration started."""
        return self._clock() - self._origin_s

    def note_restored(self) -> None:
        """Remember when the last cell became resident; called under the lock after a completion."""
        if self.restored_at_s is None and self.state.restored:
            self.restored_at_s = self.now_s()
