"""vLLM collects garbage a dozen times as an engine starts and ends: half a second each, where a suite is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[Callable[[], int]]:
    """Nobody collects meanwhile, whoever asks, but by the function yielded; the collector that comes by itself does."""
    collect = gc.collect
    gc.collect = lambda generation=2: 0
    try:
        yield collect
    finally:
        gc.collect = collect
