"""Stops asking a server that does not answer, for a moment."""

from __future__ import annotations

import errno

from cacheflow.types import Clock

SILENCE_S = 1.0
"""After a failed exchange further ones fail at once for so long, so that a server that hangs costs few timeouts."""


class Breaker:
    """Open after a failure, closed again a moment later; thread-safe, since a late look at it only costs a try."""

    def __init__(self, server: str, *, clock: Clock) -> None:
        """Start closed; ``server`` is what messages call it."""
        self._server, self._clock = server, clock
        self._open_until_s = float("-inf")

    def check(self) -> None:
        """Pass unless an exchange failed a moment ago.

        Raises:
            ConnectionError: One did.
        """
        if self._clock() < self._open_until_s:
            raise ConnectionError(errno.EHOSTDOWN, f"{self._server} did not answer a moment ago")

    def trip(self) -> None:
        """An exchange failed."""
        self._open_until_s = self._clock() + SILENCE_S
