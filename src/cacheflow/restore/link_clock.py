"""How long a link worked on each of the reads that share it."""

from __future__ import annotations


class LinkClock:
    """Tells working from waiting in line: a read's own time begins when it started and the one before it had ended."""

    def __init__(self) -> None:
        """No read has ended yet."""
        self._last_end_s = 0.0

    def end(self, started_s: float, now_s: float) -> float:
        """Note that a read started at ``started_s`` ended now; returns the seconds the link worked on it."""
        begin_s = max(started_s, self._last_end_s)
        self._last_end_s = max(self._last_end_s, now_s)
        return max(0.0, now_s - begin_s)
