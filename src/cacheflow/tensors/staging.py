"""Reusable host buffers that reads land in before they are placed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.types import Passing

GREATEST_SLAB_BYTES = 1 << 30
"""Larger page-locked allocations are rounded up to a power of two, and take seconds."""
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class StagingBuffer:
    """Host memory as bytes; ``tensor`` and ``array`` are the same bytes."""

    tensor: torch.Tensor
    array: npt.NDArray[np.uint8]


class PinnedSlabs:
    """Host memory that is got in slabs and handed out in pieces; nothing is given back before all of it is dropped."""

    def __init__(self, allocate: Callable[[int], torch.Tensor], *, slab_bytes: int) -> None:
        """Get nothing yet; ``allocate`` returns that many bytes as uint8, ``slab_bytes`` of them at a time."""
        self._allocate = allocate
        self._slab_bytes = min(slab_bytes, GREATEST_SLAB_BYTES)
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory that nobody else has."""
        if self._used + num_bytes > self._slab.numel():
            self._slab, self._used = self._allocate(max(num_bytes, self._slab_bytes)), 0
        piece = self._slab[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece


class StagingPool:
    """Hands out buffers of one size and takes them back; grows to what is in flight at once. Any thread."""

    def __init__(self, num_bytes: int, *, allocate: Callable[[int], torch.Tensor] | None = None) -> None:
        """Allocate nothing yet.

        Args:
            num_bytes: Size of every buffer.
            allocate: Where the memory of a buffer comes from, as uint8; None: ordinary memory.
        """
        self._num_bytes = max(1, num_bytes)
        self._allocate = allocate or _new
        self._free: list[tuple[StagingBuffer, Passing | None]] = []
        self._lock = threading.Lock()

    def take(self) -> StagingBuffer:
        """A buffer that nobody else holds; its content is whatever was there."""
        with self._lock:
            for index in reversed(range(len(self._free))):  # the one just used first
                buffer, after = self._free[index]
                if after is None or after.done():
                    del self._free[index]
                    return buffer
            tensor = self._allocate(self._num_bytes)
        return StagingBuffer(tensor=tensor, array=tensor.numpy())

    def give(self, buffer: StagingBuffer, *, after: Passing | None = None) -> None:
        """Return a buffer; nothing may touch it any more, or nothing once ``after`` is done."""
        with self._lock:
            self._free.append((buffer, after))


def _new(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)
