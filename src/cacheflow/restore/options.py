"""How restorations are carried out: how many reads are under way, when one is late, how long threads sleep."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cacheflow.errors import ConfigError
from cacheflow.types import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDeadline:
    """When a read counts as late.

    Attributes:
        floor_s: A read may always take this long.
        factor: ... plus this many times what everything under way should take.
    """

    floor_s: float = 0.25
    factor: float = 8.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is not above 0.
        """
        if not (self.floor_s > 0 and self.factor > 0):
            raise ConfigError(f"deadline_floor_s is {self.floor_s}, deadline_factor {self.factor}: must be above 0")

    def after_s(self, expected_s: float) -> float:
        """Seconds after which a read is late that should take ``expected_s``."""
        return self.floor_s + self.factor * expected_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorOptions:
    """How the executor drives its ports.

    Attributes:
        max_reads_in_flight: Reads kept under way, so that the link never waits for a verification or a copy.
        deadline_floor_s: A read may always take this long.
        deadline_factor: ... plus this many times what everything in flight should take.
        poll_s: Longest sleep of either thread while it waits for the other.
        clock: Monotonic seconds.
    """

    max_reads_in_flight: int = 3
    deadline_floor_s: float = 0.25
    deadline_factor: float = 8.0
    poll_s: float = 0.02
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.max_reads_in_flight < 1:
            raise ConfigError(f"max_reads_in_flight is {self.max_reads_in_flight}, must be at least 1")
        for key in ("deadline_floor_s", "deadline_factor", "poll_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key} is {getattr(self, key)}, must be above 0")

    @property
    def deadline(self) -> ReadDeadline:
        """When a read is late."""
        return ReadDeadline(floor_s=self.deadline_floor_s, factor=self.deadline_factor)
