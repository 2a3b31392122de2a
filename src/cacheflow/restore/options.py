"""How restorations are carried out: how many reads are under way, when one is late, how long threads sleep."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cacheflow.errors import ConfigError
from cacheflow.plan.read_window import MAX_BYTES, ReadWindow
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.types import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorOptions:
    """How the executor drives its ports.

    Attributes:
        least_reads_in_flight: Reads of a tier kept under way at least, so that the link never waits for a verification
            or a copy; more where its latency calls for them, see ``ReadWindow``.
        max_reads_in_flight: So many at any time instead; None: as its latency calls for.
        deadline: When a read is late.
        poll_s: Longest sleep of either thread while it waits for the other.
        clock: Monotonic seconds.
    """

    least_reads_in_flight: int = 3
    max_reads_in_flight: int | None = None
    deadline: ReadDeadline = field(default_factory=ReadDeadline)
    poll_s: float = 0.02
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.max_reads_in_flight is not None and self.max_reads_in_flight < 1:
            raise ConfigError(f"max_reads_in_flight is {self.max_reads_in_flight}, must be at least 1")
        if self.least_reads_in_flight < 1:
            raise ConfigError(f"least_reads_in_flight is {self.least_reads_in_flight}, must be at least 1")
        if not self.poll_s > 0:
            raise ConfigError(f"poll_s is {self.poll_s}, must be above 0")

    def reads_in_flight(self, window: ReadWindow, num_bytes: int) -> int:
        """Reads of a tier to keep under way, while all that is under way brings so many bytes."""
        if self.max_reads_in_flight is not None:
            return self.max_reads_in_flight
        least = self.least_reads_in_flight
        return window.reads(least=least) if num_bytes < MAX_BYTES else least
