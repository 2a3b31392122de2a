"""A link: serves reads one after the other, each after its latency, which overlaps with the reads before it.

Several links may share a further one (a store's own bandwidth). It serves their reads in the order in which
they were asked for, each at its full rate; as every device keeps few reads in flight, that is fair to within as many.
"""

from __future__ import annotations

from collections.abc import Callable

from cacheflow.errors import ConfigError
from cacheflow.plan.problem import LinkCost
from cacheflow.sim.clock import EventLoop


class SharedBandwidth:
    """What several links draw from, first come, first served.

    Attributes:
        busy_s: Seconds it has moved bytes, those still to come of reads under way included.
    """

    def __init__(self, bytes_per_s: float) -> None:
        """Start idle.

        Raises:
            ConfigError: The bandwidth is not above 0.
        """
        if not bytes_per_s > 0:
            raise ConfigError(f"shared bytes_per_s is {bytes_per_s}, must be above 0")
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self.busy_s = 0.0

    def reserve(self, num_bytes: int, now_s: float) -> float:
        """Take the next free slot for so many bytes; returns when it ends."""
        busy_s = num_bytes / self._bytes_per_s
        self._free_at_s = max(self._free_at_s, now_s) + busy_s
        self.busy_s += busy_s
        return self._free_at_s


class SimulatedLink:
    """First come, first served.

    Attributes:
        busy_s: Seconds it has moved bytes, those still to come of reads under way included.
        moved_bytes: Bytes of every read that was started.
    """

    def __init__(self, loop: EventLoop, cost: LinkCost, *, shared: SharedBandwidth | None = None) -> None:
        """Start idle.

        Args:
            loop: The virtual clock.
            cost: Its own latency and bandwidth.
            shared: What it draws from together with other links.
        """
        self._loop, self._cost, self._shared = loop, cost, shared
        self._free_at_s = float("-inf")
        self.busy_s = 0.0
        self.moved_bytes = 0

    def read(self, num_bytes: int, done: Callable[[float], None], *, follows: bool = False) -> None:
        """Move bytes, then call back with the seconds the link worked on them.

        Args:
            num_bytes: How many.
            done: Called at the end.
            follows: The read was asked for before the one that ends now did, so that its latency is over. For readers
                that take many small reads as one.
        """
        now_s = self._loop.now_s
        busy_s = num_bytes / self._cost.bytes_per_s
        idle = self._free_at_s < now_s if follows else self._free_at_s <= now_s
        asked_at_s = now_s + (self._cost.latency_s if idle else 0.0)
        start_s = max(self._free_at_s, asked_at_s)
        self._free_at_s = start_s + busy_s
        self.busy_s += busy_s
        self.moved_bytes += num_bytes
        if self._shared is not None:
            # The store sends as soon as it can: it does not wait for this link.
            self._free_at_s = max(self._free_at_s, self._shared.reserve(num_bytes, asked_at_s))
            busy_s = max(busy_s, self._free_at_s - start_s)
        self._loop.at(self._free_at_s, lambda: done(busy_s))
