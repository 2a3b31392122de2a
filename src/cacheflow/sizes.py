"""Sizes as people write them."""

from __future__ import annotations

import re

MUST_BE = "must be a size such as 4GiB, 500MB or 1000000, above 0"
"""What is said of a text that is none, after it."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)


def bytes_of(text: str) -> int | None:
    """``4GiB``, ``500MB``, ``1.5G`` or a number, in bytes; None of what is no size of at least a byte."""
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        return None
    size = float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    return int(size) if 1 <= size < float("inf") else None
