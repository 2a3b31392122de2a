"""Where CacheFlow keeps what it makes for itself: converted models, cost profiles."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$CACHEFLOW_CACHE``, else ``$XDG_CACHE_HOME/cacheflow``, else ``.cache/cacheflow`` in the home."""
    own = os.environ.get("CACHEFLOW_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cacheflow"
