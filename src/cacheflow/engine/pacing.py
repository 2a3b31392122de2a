"""A link's schedule: when a transfer of so many bytes is allowed to end."""

from __future__ import annotations

import time

from cacheflow.errors import ConfigError
from cacheflow.types import Clock


class LinkSchedule:
    """An absolute schedule, so that late wake-ups do not add up: transfers follow each other without gaps.

    One thread at a time.
    """

    def __init__(self, bytes_per_s: float = float("inf"), *, clock: Clock = time.perf_counter) -> None:
        """A link of ``bytes_per_s``, free from now; ``inf`` does not pace.

        Raises:
            ConfigError: ``bytes_per_s`` is not above 0.
        """
        if not bytes_per_s > 0:
            raise ConfigError(f"link bytes_per_s is {bytes_per_s}, must be above 0")
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at_s = clock()

    def reserve(self, num_bytes: int) -> float:
        """Queue a transfer behind those before it; the time on the clock before which it must not end."""
        self._free_at_s = max(self._clock(), self._free_at_s) + num_bytes / self._bytes_per_s
        return self._free_at_s
