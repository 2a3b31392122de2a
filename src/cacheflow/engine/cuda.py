"""Copies between host and CUDA device memory on a stream of their own.

Ordering: compute may read what a copy wrote once the copy's event was synchronised on the host, because kernels
launched after that see it. So a placed cell needs no event on the compute stream.
"""

from __future__ import annotations

import torch


class CopyLane:
    """A copy stream of one device; used by one thread. Never synchronises the device, only its own events."""

    def __init__(self, device: torch.device) -> None:
        """Create the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, payload: torch.Tensor, target: torch.Tensor) -> None:
        """Copy pinned bytes into a cell of the KV buffer and wait for it.

        Args:
            payload: Pinned uint8, the bytes of ``target`` in C order.
            target: ``[layers, 2, n, H, D]`` on the device, contiguous in the last three axes: one copy for each
                layer's keys and each layer's values, all queued at once.
        """
        source = payload.view(target.dtype).view(target.shape)
        with torch.cuda.stream(self._stream):
            for layer_to, layer_from in zip(target.unbind(0), source.unbind(0), strict=True):
                layer_to[0].copy_(layer_from[0], non_blocking=True)
                layer_to[1].copy_(layer_from[1], non_blocking=True)
        self.mark().synchronize()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """Queue one copy (pinned host to device, or within the device) and return its event."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self.mark()

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Device memory of this stream's own pool.

        Memory of the compute stream's pool may still be read by kernels queued there when it is handed out again; that
        stream's kernels run after them, a copy on this one would not.
        """
        with torch.cuda.stream(self._stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> torch.cuda.Event:
        """An event after everything queued so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event
