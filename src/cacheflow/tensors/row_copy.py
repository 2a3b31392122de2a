"""Rows of activations copied to the host before the forward that overwrites them, on the CPU and on CUDA.

Shapes: a tensor is ``[n, ...]``; its bytes are ``[n, bytes of a row]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
TakeRows = Callable[[], tuple[Bytes, ...]]
"""Waits for the copies and returns each tensor's bytes, in the order given."""


class RowCopies(Protocol):
    """Copies out what a later kernel of the calling thread's stream overwrites."""

    @property
    def immediate(self) -> bool:
        """Whether rows must be taken before anything else is computed: they are no copies."""
        ...

    def copy_out(self, *tensors: torch.Tensor) -> TakeRows:
        """Begin to copy tensors of rows; does not wait for the device."""
        ...


class HostRows:
    """On the CPU the rows are there: whoever takes them looks at the tensors themselves."""

    immediate = True

    def copy_out(self, *tensors: torch.Tensor) -> TakeRows:
        """See ``RowCopies.copy_out``."""
        rows = tuple(_bytes(tensor) for tensor in tensors)
        return lambda: rows


class DeviceRows:
    """Copies on the device in the stream that computes, and from there to pinned memory on a stream of their own.

    The forward waits for the first copy alone, which takes what reading and writing the rows once takes.
    """

    immediate = False

    def __init__(self, device: torch.device) -> None:
        """Create the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy_out(self, *tensors: torch.Tensor) -> TakeRows:
        """See ``RowCopies.copy_out``."""
        kept = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pinned = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in kept]
            for source, target in zip(kept, pinned, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)

        def take() -> tuple[Bytes, ...]:
            event.synchronize()
            return tuple(_bytes(each) for each in pinned)

        return take


def row_copies(device: torch.device) -> RowCopies:
    """How rows leave this device."""
    return HostRows() if device.type == "cpu" else DeviceRows(device)


def _bytes(rows: torch.Tensor) -> Bytes:
    """``[n, ...]`` as bytes ``[n, bytes of a row]``, without a copy where it is contiguous."""
    flat = rows.detach().contiguous().view(len(rows), -1)
    view: Bytes = flat.view(torch.uint8).numpy()
    return view
