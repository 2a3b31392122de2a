"""Reusable host buffers that reads land in before they are placed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True, eq=False)
class StagingBuffer:
    """Host memory as bytes; ``tensor`` and ``array`` are the same bytes, pinned when the pool is."""

    tensor: torch.Tensor
    array: npt.NDArray[np.uint8]


class StagingPool:
    """Hands out buffers of one size and takes them back; grows to what is in flight at once.

    ``take`` on one thread; ``give`` on any.
    """

    def __init__(self, num_bytes: int, *, pinned: bool = False) -> None:
        """Allocate nothing yet.

        Args:
            num_bytes: Size of every buffer.
            pinned: Page-locked memory, for asynchronous copies to a CUDA device.
        """
        self._num_bytes = max(1, num_bytes)
        self._pinned = pinned
        self._free: list[StagingBuffer] = []

    def take(self) -> StagingBuffer:
        """A buffer that nobody else holds; its content is whatever was there."""
        if self._free:
            return self._free.pop()
        tensor = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return StagingBuffer(tensor=tensor, array=tensor.numpy())

    def give(self, buffer: StagingBuffer) -> None:
        """Return a buffer; nothing may touch it any more."""
        self._free.append(buffer)
