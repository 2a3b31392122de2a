"""When running requests get their next token while others are being restored. Pure: time is passed in."""

from __future__ import annotations

from cacheflow.errors import ConfigError

MEMORY = 0.7
"""Weight that earlier rounds keep when one more was timed."""
SPARE = 1.2
"""A round is expected to take this many times its recent mean."""


class DecodePace:
    """Bounds the restoration work between two rounds of decoding; a round is one token for each request that decodes.

    Inter-token latency is at most the budget, one piece of work that is longer than the budget, and a round.
    """

    def __init__(self, *, budget_s: float = 0.05, itl_slo_s: float | None = None) -> None:
        """Start with nobody decoding.

        Args:
            budget_s: Seconds of restoration work between two rounds.
            itl_slo_s: Inter-token latency asked for; the budget is then what a round leaves of it.

        Raises:
            ConfigError: A value is out of range.
        """
        for key, value in (("budget_s", budget_s), ("itl_slo_s", itl_slo_s)):
            if value is not None and not value > 0:
                raise ConfigError(f"{key} is {value}, must be above 0 seconds")
        self._budget_s, self._itl_slo_s = budget_s, itl_slo_s
        self._round_s: float | None = None
        self._ended_s = float("-inf")

    @property
    def budget_s(self) -> float:
        """Seconds of restoration work between two rounds."""
        if self._itl_slo_s is None:
            return self._budget_s
        return max(0.0, self._itl_slo_s - SPARE * (self._round_s or 0.0))

    def begin(self, now_s: float) -> None:
        """Note that the first request has begun to decode."""
        self._ended_s = now_s

    def is_due(self, now_s: float, *, next_s: float) -> bool:
        """Whether a round comes before a piece of work that should take ``next_s``; ask once for each piece."""
        return now_s - self._ended_s + next_s > self.budget_s

    def note_round(self, start_s: float, end_s: float) -> None:
        """Note a round."""
        seconds = end_s - start_s
        self._round_s = seconds if self._round_s is None else MEMORY * self._round_s + (1.0 - MEMORY) * seconds
        self._ended_s = end_s
