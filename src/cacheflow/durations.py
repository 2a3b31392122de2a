"""Durations as people write them."""

from __future__ import annotations

import re

MUST_BE = "must be a duration such as 90s, 30m, 12h or 7d"
"""What is said of a text that is none, after it."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?([smhd])", re.IGNORECASE | re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float | None:
    """``90s``, ``30m``, ``12h``, ``1.5d`` in seconds; None of what is no finite duration with a unit."""
    found = _DURATION.fullmatch(text)
    if found is None:
        return None
    seconds = float(found[1]) * _SECONDS[found[2].lower()]
    return seconds if seconds < float("inf") else None
