"""How much restoration work may come between the tokens of requests that decode. Pure: time is passed in."""

from __future__ import annotations

import math

from cacheflow.errors import ConfigError

DECAY = 0.8
"""Weight that earlier rounds keep in the estimate of a round's own time."""
HEADROOM = 0.85
"""Part of what a bound leaves beside a round that other work may use: rounds vary."""


class DecodeLatency:
    """What a round of decoding takes by itself, as learnt, and what a bound on inter-token latency leaves beside it.

    A round is one token for each request that decodes: an engine step, inside vLLM.
    """

    def __init__(self, bound_s: float | None) -> None:
        """Know of no round yet; ``bound_s`` is the inter-token latency asked for, None for no bound."""
        self._bound_s = bound_s
        self.round_s: float | None = None
        """A round's own time, in recent rounds; None before the first."""

    def note(self, seconds: float) -> None:
        """Note what a round took by itself."""
        before_s = seconds if self.round_s is None else self.round_s
        self.round_s = DECAY * before_s + (1.0 - DECAY) * seconds

    @property
    def left_s(self) -> float:
        """Seconds of other work between two rounds; none until a round was timed, infinite without a bound."""
        if self._bound_s is None:
            return math.inf
        return 0.0 if self.round_s is None else max(0.0, HEADROOM * (self._bound_s - self.round_s))


class DecodePace:
    """Says when a round of decoding comes before more restoration work.

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
        self._budget_s = budget_s if itl_slo_s is None else math.inf
        self._latency = DecodeLatency(itl_slo_s)
        self._ended_s = -math.inf

    @property
    def budget_s(self) -> float:
        """Seconds of restoration work between two rounds."""
        return min(self._budget_s, self._latency.left_s)

    def begin(self, now_s: float) -> None:
        """Note that the first request has begun to decode."""
        self._ended_s = now_s

    def is_due(self, now_s: float, *, next_s: float) -> bool:
        """Whether a round comes before a piece of work that should take ``next_s``; ask once for each piece."""
        return now_s - self._ended_s + next_s > self.budget_s

    def note_round(self, start_s: float, end_s: float) -> None:
        """Note a round."""
        self._latency.note(end_s - start_s)
        self._ended_s = end_s
