"""Makes CacheFlow's log lines appear beside vLLM's, which configures its own logger alone."""

from __future__ import annotations

import logging


def log_beside_vllm() -> None:
    """Give ``cacheflow``'s logger vLLM's handlers and level, unless somebody has configured logging for it."""
    ours, theirs = logging.getLogger("cacheflow"), logging.getLogger("vllm")
    if ours.handlers or ours.level or logging.getLogger().handlers:
        return
    ours.handlers, ours.propagate = list(theirs.handlers), False
    ours.setLevel(theirs.level)
