"""Small values that cross module lines.

Units are in the names: ``*_s`` seconds, ``*_bytes`` bytes, ``*_bytes_per_s`` rates, ``num_*`` counts.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
"""Plain bytes in contiguous memory, of one dimension where nothing else is said."""


class Clock(Protocol):
    """A monotonic clock; live code passes ``time.perf_counter``, the simulator a virtual one."""

    def __call__(self) -> float:
        """Return the time in seconds since an arbitrary origin; never goes backwards."""
        ...


class Passing(Protocol):
    """Something that has happened or not, such as an event of a stream."""

    def done(self) -> bool:
        """Whether it has; does not wait."""
        ...


class LoadOutcome(Enum):
    """How one read from a store ended; everything but ``OK`` is recomputed and counted."""

    OK = "ok"
    MISS = "miss"
    CORRUPT = "corrupt"
    ERROR = "error"
    LATE = "late"
    CANCELLED = "cancelled"
