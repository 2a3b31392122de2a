"""A link: serves reads one after the other, each after its latency, which overlaps with the reads before it."""

from __future__ import annotations

from collections.abc import Callable

from cacheflow.plan.problem import LinkCost
from cacheflow.sim.clock import EventLoop


class SimulatedLink:
    """First come, first served.

    Attributes:
        busy_s: Seconds it has moved bytes, those still to come of reads under way included.
        moved_bytes: Bytes of every read that was started.
    """

    def __init__(self, loop: EventLoop, cost: LinkCost) -> None:
        """Start idle."""
        self._loop, self._cost = loop, cost
        self._free_at_s = 0.0
        self.busy_s = 0.0
        self.moved_bytes = 0

    def read(self, num_bytes: int, done: Callable[[float], None]) -> None:
        """Move bytes, then call back with the seconds the link worked on them."""
        now_s = self._loop.now_s
        busy_s = num_bytes / self._cost.bytes_per_s
        idle = self._free_at_s <= now_s
        self._free_at_s = max(self._free_at_s, now_s + (self._cost.latency_s if idle else 0.0)) + busy_s
        self.busy_s += busy_s
        self.moved_bytes += num_bytes
        self._loop.at(self._free_at_s, lambda: done(busy_s))
