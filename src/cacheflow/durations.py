"""Durations as people write and read them."""

from __future__ import annotations

import re

MUST_BE = "must be a duration such as 90s, 30m, 12h or 7d"
"""What is said of a text that is none, after it."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?([smhd])", re.IGNORECASE | re.ASCII)
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float | None:
    """``90s``, ``30m``, ``12h``, ``1.5d`` in seconds; None of what is no finite duration with a unit."""
    found = _DURATION.fullmatch(text)
    if found is None:
        return None
    seconds = float(found[1]) * _SECONDS[found[2].lower()]
    return seconds if seconds < float("inf") else None


def text_of(seconds: float) -> str:
    """Seconds in the largest unit of which there are two, rounded: ``7 d``, ``90 s``; below 0 is ``0 s``."""
    for unit, length in _SECONDS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
