"""Page-locked memory of a device, as stores ask for it that lend to it what they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.tensors.streams import DeviceStreams


class PinnedMemory:
    """Provides ``stores.loan.DeviceReader`` by structure."""

    def __init__(self, streams: DeviceStreams) -> None:
        """Of the device behind these streams."""
        self._streams = streams

    def new_memory(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """See ``DeviceReader.new_memory``."""
        try:
            memory: npt.NDArray[np.uint8] = self._streams.pinned(num_bytes).numpy()
        except RuntimeError as error:  # what torch makes of CUDA's refusal
            raise MemoryError(f"{num_bytes} bytes of page-locked memory: {error}") from error
        return memory

    def pin(self, memory: npt.NDArray[np.uint8]) -> bool:
        """See ``DeviceReader.pin``."""
        return self._streams.pin(torch.from_numpy(memory))

    def unpin(self, memory: npt.NDArray[np.uint8]) -> None:
        """See ``DeviceReader.unpin``."""
        self._streams.unpin(torch.from_numpy(memory))
