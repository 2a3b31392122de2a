"""Copies on the device of what later kernels overwrite, on their way to the host.

The stream that computes makes the copy, which takes what reading and writing the bytes once takes, and goes on. From
there they come to the host beside it, at the pace of whoever takes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.streams import StreamEvent


class Snapshot:
    """Bytes in a slot of a room, complete once the event has passed; made by ``SnapshotRoom.take_snapshot``."""

    def __init__(self, room: SnapshotRoom, slot: torch.Tensor, num_bytes: int, event: StreamEvent) -> None:
        """Own the slot."""
        self._room, self._slot, self._num_bytes, self._event = room, slot, num_bytes, event

    def take(self) -> npt.NDArray[np.uint8]:
        """The bytes, in memory of their own; waits for them and frees the slot. Once, on the thread that takes all."""
        return self._room.download(self._slot, self._num_bytes, after=self._event)


class SnapshotRoom:
    """Device memory for so many snapshots at once. They are made on the thread that computes and taken on another."""

    def __init__(self, lane: CopyLane, device: torch.device, *, slot_bytes: int, num_slots: int) -> None:
        """Get all of the memory, and one pinned buffer."""
        slot_bytes = -(-slot_bytes // 64) * 64  # as aligned as whatever is copied there
        with torch.inference_mode(False):
            memory = torch.empty((num_slots, slot_bytes), dtype=torch.uint8, device=device)
        self.slot_bytes, self.num_slots = slot_bytes, num_slots
        self._free = list(memory.unbind(0))
        self._lock = threading.Lock()
        self._lane = lane
        self._staging = lane.staging(slot_bytes)

    def take_snapshot(self, num_bytes: int, copy: Callable[[torch.Tensor], None]) -> Snapshot | None:
        """Have the stream that computes make a copy; None where there is no room now.

        Args:
            num_bytes: At most ``slot_bytes``.
            copy: Asks the stream that computes to write so many bytes into what it is given.
        """
        with self._lock:
            if not self._free:
                return None
            slot = self._free.pop()
        copy(slot[:num_bytes])
        return Snapshot(self, slot, num_bytes, self._lane.streams.current().record())

    def download(self, slot: torch.Tensor, num_bytes: int, *, after: StreamEvent) -> npt.NDArray[np.uint8]:
        """The bytes of a slot as they are after an event; waits for them and frees the slot."""
        staging = self._staging.take()
        self._lane.download(staging.tensor[:num_bytes], slot[:num_bytes], after=after).wait()
        with self._lock:
            self._free.append(slot)
        own = staging.array[:num_bytes].copy()
        self._staging.give(staging)
        return own
