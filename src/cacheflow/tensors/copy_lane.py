"""Copies between host memory and the KV of one engine, while it computes.

The rules, which ``tests/engine/test_engine_copy_lane.py`` holds under random interleavings of host and device:

1. A cell is uploaded only once what compute did to its buffer before (poison, a copy) is done: the lane waits.
2. Compute reads no cell before its upload is done: the compute stream waits before the next tile, the host never does.
3. Host memory is written again only once the copy that reads it is done, and read only once the copy into it is.
4. At most ``MAX_QUEUED`` uploads are queued: a read that would be one more has not arrived yet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from cacheflow.tensors.staging import PinnedSlabs, StagingPool
from cacheflow.tensors.streams import DeviceStream, DeviceStreams, StreamEvent, streams_of

MAX_QUEUED = 8
"""Uploads that the device has not done yet; more would count as resident long before they are."""
ROOM_POLL_S = 5e-5
"""Sleep between two looks at the oldest upload."""
SLAB_BYTES = 64 << 20
"""Staging buffers are pinned so many bytes at once, or one buffer where that is larger."""


class CopyLane:
    """A stream for each direction, and the pinned memory both copy from and to; one for an engine.

    Threads: uploads and ``has_room`` on the I/O thread, a ``download`` that is told what to come after on any one
    thread, the rest on the thread that computes.
    """

    def __init__(self, streams: DeviceStreams) -> None:
        """Create both streams; pin nothing yet."""
        self.streams = streams
        self._up, self._down = streams.new_stream(), streams.new_stream()
        self._queued: deque[StreamEvent] = deque()
        self._uploaded: StreamEvent | None = None
        self._waited: StreamEvent | None = None
        self._pools: dict[int, StagingPool] = {}

    def adopt(self, tensor: torch.Tensor) -> None:
        """Keep a KV buffer's memory until the copies queued for it are done, even if nobody holds it any more."""
        for stream in (self._up, self._down):
            self.streams.share(tensor, stream)

    def staging(self, num_bytes: int, *, num_buffers: int = 1) -> StagingPool:
        """Pinned buffers of at least ``num_bytes``; the same pool for all that need about as many.

        So many of them, where the pool is new, are pinned here: no read should wait for that.
        """
        size = 1 << max(16, (num_bytes - 1).bit_length())
        if size not in self._pools:
            slabs = PinnedSlabs(self.streams.pinned, slab_bytes=SLAB_BYTES)
            pool = self._pools[size] = StagingPool(size, allocate=slabs.take)
            for buffer in [pool.take() for _ in range(num_buffers)]:
                pool.give(buffer)
        return self._pools[size]

    def after_compute(self) -> None:
        """Have later copies wait for all that compute was asked so far."""
        event = self.streams.current().record()
        self._up.wait_for(event)
        self._down.wait_for(event)

    def before_compute(self) -> None:
        """Have what compute is asked next wait for every upload so far."""
        uploaded = self._uploaded
        if uploaded is not None and uploaded is not self._waited:
            self.streams.current().wait_for(uploaded)
            self._waited = uploaded

    def settle(self) -> None:
        """Have the calling thread wait until all that compute was asked, and every upload so far, is done."""
        self.before_compute()
        self.streams.current().record().wait()

    def has_room(self, timeout_s: float) -> bool:
        """Whether another upload may be queued, within ``timeout_s``."""
        until_s = time.monotonic() + timeout_s
        while True:
            while self._queued and self._queued[0].done():
                self._queued.popleft()
            if len(self._queued) < MAX_QUEUED:
                return True
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(ROOM_POLL_S, left_s))

    def upload(self, payload: torch.Tensor, target: torch.Tensor) -> StreamEvent:
        """Queue the copy of pinned bytes into a cell; returns the event after which they may be written again.

        Args:
            payload: Pinned uint8, the bytes of ``target`` in C order.
            target: ``[layers, 2, n, H, D]`` on the device, contiguous in the last three axes: one copy for each
                layer's keys and each layer's values.
        """
        runs = target.view(-1, *target.shape[2:])  # not flatten: it would copy rather than fail
        pairs = zip(runs.unbind(0), payload.view(target.dtype).view(runs.shape).unbind(0), strict=True)
        return self.upload_by(lambda up: up.copy(*pairs))

    def upload_new(self, payload: torch.Tensor) -> tuple[torch.Tensor, StreamEvent]:
        """Queue the copy of pinned bytes into memory of their own, which compute may read after ``before_compute``.

        Returns:
            The memory, uint8, which compute must share (``DeviceStreams.share``) before it drops it; the event after
            which ``payload`` may be written again.
        """
        brought = self._up.memory(payload.numel())
        return brought, self.upload_by(lambda up: up.copy((brought, payload)))

    def upload_by(self, ask: Callable[[DeviceStream], None], *, after: StreamEvent | None = None) -> StreamEvent:
        """Queue what ``ask`` asks the stream of uploads for; returns the event after which its source may be written.

        Args:
            ask: Copies from pinned memory to where compute reads.
            after: What compute must have done before; None for what an ``after_compute`` has seen to.
        """
        if after is not None:
            self._up.wait_for(after)
        ask(self._up)
        event = self._up.record()
        self._queued.append(event)
        self._uploaded = event  # last: compute may look at any time
        return event

    def download(self, target: torch.Tensor, source: torch.Tensor, *, after: StreamEvent | None = None) -> StreamEvent:
        """Queue the copy of device memory into pinned memory; read it after the event.

        ``after`` is an event after which the source is what is wanted; None: as compute leaves it now.
        """
        if after is None:
            self.after_compute()
        else:
            self._down.wait_for(after)
        self._down.copy((target, source))
        return self._down.record()

    def wait_downloads(self) -> None:
        """Have what compute is asked next wait for every download so far: it may write over what they read."""
        self.streams.current().wait_for(self._down.record())


def lane_of(device: torch.device) -> CopyLane | None:
    """A lane of a device of its own; None for the CPU, whose copies are done when a call returns."""
    streams = streams_of(device)
    return None if streams is None else CopyLane(streams)
