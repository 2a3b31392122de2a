"""Stops asking a server that does not answer, for a moment."""

from __future__ import annotations

import errno

from cacheflow.types import Clock

SILENCE_S = 1.0
"""After a failed exchange further ones fail at once for so long, so that a server that hangs costs few timeouts."""


class Breaker:
    """Open after a failure, closed again a moment later; thread-safe, since a late look at it only costs a try."""

    def __init__(
        self, server: str, *, clock: Clock, silence_s: float = SILENCE_S, longest_s: float | None = None
    ) -> None:
        """Start closed.

        Args:
            server: What messages call it.
            clock: Monotonic clock.
            silence_s: How long it stays open after a failure.
            longest_s: Each failure without a success since the last one doubles that time, up to so long; None: it
                stays the same.
        """
        self._server, self._clock = server, clock
        self._first_s = self._silence_s = silence_s
        self._longest_s = silence_s if longest_s is None else longest_s
        self._open_until_s = float("-inf")

    @property
    def left_s(self) -> float:
        """Seconds until it closes; 0 while it is closed."""
        return max(0.0, self._open_until_s - self._clock())

    def check(self) -> None:
        """Pass unless an exchange failed a moment ago.

        Raises:
            ConnectionError: One did.
        """
        if self.left_s:
            raise ConnectionError(errno.EHOSTDOWN, f"{self._server} did not answer a moment ago")

    def trip(self) -> None:
        """An exchange failed."""
        self._open_until_s = self._clock() + self._silence_s
        self._silence_s = min(2 * self._silence_s, self._longest_s)

    def reset(self) -> None:
        """An exchange succeeded."""
        self._open_until_s, self._silence_s = float("-inf"), self._first_s
