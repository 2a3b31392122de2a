"""A pace for bytes that are really moved: when the next piece may go, on an absolute schedule."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cacheflow.errors import ConfigError
from cacheflow.types import Clock

Sleep = Callable[[float], None]


class Pacer:
    """A link of a given bandwidth that serves pieces one after the other; safe for several threads.

    A piece passes when its last byte would have arrived: its bytes over the bandwidth after the later of the end of the
    piece before and the time at which the piece itself was there to be sent. Ends lie on an absolute schedule, so that
    late wake-ups do not add up; a link that was idle saves up nothing.
    """

    def __init__(self, bytes_per_s: float, *, clock: Clock = time.perf_counter, sleep: Sleep = time.sleep) -> None:
        """Create an idle link; ``inf`` never waits.

        Raises:
            ConfigError: The bandwidth is not above 0.
        """
        if not bytes_per_s > 0:
            raise ConfigError(f"link bytes_per_s is {bytes_per_s}, must be above 0")
        self.bytes_per_s = bytes_per_s
        self.passed_bytes = 0
        self._clock, self._sleep = clock, sleep
        self._busy_until_s = float("-inf")
        self._lock = threading.Lock()

    def pass_bytes(self, num_bytes: int, *, there_since_s: float) -> None:
        """Wait until ``num_bytes`` have come over the link.

        Args:
            num_bytes: Of the piece.
            there_since_s: When the sender had it, on the pacer's clock; ``-inf`` when it was waiting for the link.
        """
        with self._lock:
            self.passed_bytes += num_bytes
            start_s = max(self._busy_until_s, there_since_s)
            if start_s == float("-inf"):
                start_s = self._clock()  # the first piece of all
            self._busy_until_s = start_s + num_bytes / self.bytes_per_s
            wait_s = self._busy_until_s - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
