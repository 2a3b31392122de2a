"""Rows of activations copied to the host before the forward that overwrites them, on the CPU and on CUDA.

Shapes: a tensor is ``[n, ...]``; its bytes are ``[n, bytes of a row]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from cacheflow.types import Bytes


class RowsUnderWay(Protocol):
    """Rows on their way to the host."""

    def arrived(self) -> bool:
        """Whether taking them does not wait."""
        ...

    def take(self) -> tuple[Bytes, ...]:
        """Each tensor's bytes, in the order given; waits for them."""
        ...


class RowCopies(Protocol):
    """Copies out what a later kernel of the calling thread's stream overwrites."""

    @property
    def immediate(self) -> bool:
        """Whether rows must be taken before anything else is computed: they are no copies."""
        ...

    def copy_out(self, *tensors: torch.Tensor) -> RowsUnderWay:
        """Begin to copy tensors of rows; does not wait for the device."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _CopiedRows:
    """Rows in host memory, complete once the event has passed; None: they are."""

    tensors: tuple[torch.Tensor, ...]
    event: torch.cuda.Event | None = None

    def arrived(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def take(self) -> tuple[Bytes, ...]:
        if self.event is not None:
            self.event.synchronize()
        return tuple(_bytes(each) for each in self.tensors)


class HostRows:
    """On the CPU the rows are there: their taker looks at the tensors themselves."""

    immediate = True

    def copy_out(self, *tensors: torch.Tensor) -> RowsUnderWay:
        """See ``RowCopies.copy_out``."""
        return _CopiedRows(tensors)


class DeviceRows:
    """Copies on the device in the stream that computes, and from there to pinned memory on a stream of their own.

    The kernels of the forward wait for the first copy alone, which takes what reading and writing the rows once takes.
    Both copies' memory is torch's to use again: the device's once the second copy is through, the host's once it was
    looked at.
    """

    immediate = False

    def __init__(self, device: torch.device) -> None:
        """Create the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy_out(self, *tensors: torch.Tensor) -> RowsUnderWay:
        """See ``RowCopies.copy_out``."""
        pinned = tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors)
        kept = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(kept, pinned, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _CopiedRows(pinned, event)


def row_copies(device: torch.device) -> RowCopies:
    """How rows leave this device."""
    return HostRows() if device.type == "cpu" else DeviceRows(device)


def _bytes(rows: torch.Tensor) -> Bytes:
    """``[n, ...]`` as bytes ``[n, bytes of a row]``, without a copy where it is contiguous."""
    flat = rows.detach().contiguous().view(len(rows), math.prod(rows.shape[1:]))
    view: Bytes = flat.view(torch.uint8).numpy()
    return view
