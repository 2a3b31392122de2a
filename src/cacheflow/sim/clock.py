"""The event loop: a heap of events whose order is fixed by time, priority and a counter, so that a run repeats."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class EventLoop:
    """Runs callbacks at virtual times.

    Attributes:
        now_s: The virtual time; never goes backwards.
    """

    def __init__(self) -> None:
        """Start at time 0 with nothing to do."""
        self.now_s = 0.0
        self._heap: list[tuple[float, int, int, Callable[[], None]]] = []
        self._counter = itertools.count()

    def at(self, time_s: float, callback: Callable[[], None], *, priority: int = 0) -> None:
        """Call back at a time; of equal times the lower priority first, then the one asked for first.

        Raises:
            ValueError: The time is past.
        """
        if not time_s >= self.now_s:
            raise ValueError(f"an event at {time_s} s was asked for at {self.now_s} s")
        heapq.heappush(self._heap, (time_s, priority, next(self._counter), callback))

    def run(self, *, until_s: float = float("inf")) -> None:
        """Run events up to and including a time, or until none is left."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now_s, _, _, callback = heapq.heappop(heap)
            callback()
