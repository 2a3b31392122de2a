"""Waiting for what another thread does."""

import time
from collections.abc import Callable

PATIENCE_S = 30.0  # for what should take milliseconds: a hang fails, a slow machine does not


def eventually(holds: Callable[[], bool], *, patience_s: float = PATIENCE_S) -> None:
    end_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end_s, f"it did not come true within {patience_s} s"
        time.sleep(0.001)
