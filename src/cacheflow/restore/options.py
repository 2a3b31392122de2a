"""How restorations are carried out: how many reads are under way, when one is late, how long threads sleep."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cacheflow.errors import ConfigError
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.types import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorOptions:
    """How the executor drives its ports.

    Attributes:
        max_reads_in_flight: Reads kept under way, so that the link never waits for a verification or a copy.
        deadline: When a read is late.
        poll_s: Longest sleep of either thread while it waits for the other.
        clock: Monotonic seconds.
    """

    max_reads_in_flight: int = 3
    deadline: ReadDeadline = field(default_factory=ReadDeadline)
    poll_s: float = 0.02
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.max_reads_in_flight < 1:
            raise ConfigError(f"max_reads_in_flight is {self.max_reads_in_flight}, must be at least 1")
        if not self.poll_s > 0:
            raise ConfigError(f"poll_s is {self.poll_s}, must be above 0")
