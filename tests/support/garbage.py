"""vLLM collects garbage a dozen times as an engine starts and ends: half a second each, where a suite is loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Nobody collects meanwhile, whoever asks; the collector that comes by itself does."""
    collect = gc.collect
    gc.collect = lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = collect
