"""vLLM collects garbage a dozen times as an engine starts and ends: half a second each, where a suite is loaded."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

atexit.register(gc.unfreeze)  # the interpreter's own end looks through everything, or libraries report leaks


@contextmanager
def uncollected() -> Iterator[Callable[[], None]]:
    """Nobody collects meanwhile, whoever asks, but by the function yielded; the collector that comes by itself does.

    What that leaves, which is mostly modules, it does not look through again; vLLM would have it do so.
    """
    collect, freeze, unfreeze = gc.collect, gc.freeze, gc.unfreeze

    def once() -> None:
        collect()
        freeze()

    gc.collect, gc.freeze, gc.unfreeze = (lambda generation=2: 0), (lambda: None), (lambda: None)
    try:
        yield once
    finally:
        gc.collect, gc.freeze, gc.unfreeze = collect, freeze, unfreeze
