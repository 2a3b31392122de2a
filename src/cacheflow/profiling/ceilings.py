"""What a device can do at best: copies as large as memory allows, and one large matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cacheflow.tensors.streams import DeviceStreams

COPY_BYTES = 1 << 30
"""Copies are timed with so many bytes: latency and launching do not show."""


def upload_bytes_per_s(streams: DeviceStreams, device: torch.device, *, num_bytes: int = COPY_BYTES) -> float:
    """Bandwidth of one copy from pinned host memory."""
    source, target = streams.pinned(num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / device_seconds(streams, lambda: streams.current().copy((target, source)))


def download_bytes_per_s(streams: DeviceStreams, device: torch.device, *, num_bytes: int = COPY_BYTES) -> float:
    """Bandwidth of one copy into pinned host memory."""
    target, source = streams.pinned(num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / device_seconds(streams, lambda: streams.current().copy((target, source)))


def memory_bytes_per_s(streams: DeviceStreams, device: torch.device, *, num_bytes: int = COPY_BYTES) -> float:
    """Bandwidth of the device's memory: bytes read and written by one copy within it."""
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * num_bytes / device_seconds(streams, lambda: streams.current().copy((target, source)))


def product_flops_per_s(
    streams: DeviceStreams, device: torch.device, *, size: int = 8192, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Rate of one square matrix product, of random numbers: zeros would draw less power, and run faster."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / device_seconds(streams, lambda: torch.mm(left, right))


def device_seconds(streams: DeviceStreams, work: Callable[[], object]) -> float:
    """Device seconds of work, done once before it is timed."""
    work()
    begin = streams.current().record(timed=True)
    work()
    end = streams.current().record(timed=True)
    end.wait()
    return end.seconds_after(begin)
