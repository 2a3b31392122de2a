"""A prefix in (pinned) host memory, read through a paced link: the GPU benchmark's transfer port, without any store.

Provides ``restore.ports.TransferPort`` by structure. Needs torch and numpy only. On ``device="cpu"`` the link is a
numpy copy, so that the whole path runs without a GPU.
"""

from __future__ import annotations

import time

import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.plan.grid import Boundary, Cell, Piece, Tile
from cacheflow.stores.link import LinkSchedule
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.staging import GREATEST_SLAB_BYTES, PinnedSlabs
from cacheflow.types import Clock, LoadOutcome


class PinnedPrefix:
    """Keys and values of a prefix in host memory, each cell as its payload (see ``cells``)."""

    def __init__(self, geometry: CellGeometry, *, lane: CopyLane | None = None) -> None:
        """Reserve room for every cell of the grid, page-locked with a lane."""
        self.geometry = geometry
        cells = list(Tile(0, geometry.grid.num_chunks, 0, geometry.grid.num_blocks).cells())
        allocate = _pageable if lane is None else lane.streams.pinned
        slabs = PinnedSlabs(allocate, slab_bytes=min(sum(map(geometry.num_bytes, cells)), GREATEST_SLAB_BYTES))
        self._payloads = {cell: slabs.take(geometry.num_bytes(cell)) for cell in cells}

    @classmethod
    def save(cls, kv: KVBuffer, geometry: CellGeometry) -> PinnedPrefix:
        """Copy the grid's prefix out of a KV buffer; pinned when the buffer has a lane. Waits for the copies."""
        prefix, copied = cls(geometry, lane=kv.lane), None
        for cell, payload in prefix._payloads.items():
            values, kv_bytes = kv.cell(*geometry.extent(cell)), geometry.kv_bytes(cell)
            target = payload[:kv_bytes].view(values.dtype).view(values.shape)
            if kv.lane is not None:
                copied = kv.lane.download(target, values)
            else:
                target.copy_(values)
            if payload.numel() > kv_bytes:
                assert kv.checkpoint is not None, "only a model with recurrent layers has states to save"
                payload.numpy()[kv_bytes:] = kv.checkpoint.payload(geometry.layers(cell.block))
        if copied is not None:
            copied.wait()
        return prefix

    def payload(self, cell: Cell) -> torch.Tensor:
        """Bytes of one cell, uint8."""
        return self._payloads[cell]


def _pageable(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


class PinnedTicket:
    """One cell on the link; made by ``PinnedLinkPort.start``."""

    __slots__ = ("due_at_s", "extent", "kv_bytes", "late_at_s", "num_bytes", "payload")

    def __init__(self, *, geometry: CellGeometry, cell: Cell, payload: torch.Tensor) -> None:
        """Hold what the port needs to place or cancel the read."""
        self.extent = geometry.extent(cell)
        self.payload = payload
        self.kv_bytes = geometry.kv_bytes(cell)
        self.num_bytes = geometry.num_bytes(cell)
        self.due_at_s = 0.0
        self.late_at_s = float("inf")


class PinnedLinkPort:
    """Loads cells from a ``PinnedPrefix`` over a paced link. All methods on one thread.

    A cell has arrived when the link's schedule says so; on the CPU it is copied into a staging buffer when its read
    starts, on CUDA it is pinned already, and placing it queues its copy to the device.
    """

    def __init__(
        self,
        prefix: PinnedPrefix,
        *,
        kv: KVBuffer,
        bytes_per_s: float = float("inf"),
        clock: Clock = time.perf_counter,
    ) -> None:
        """Serve ``prefix`` into ``kv`` at ``bytes_per_s`` (``inf``: as fast as the copy goes); the link is free now.

        Raises:
            ConfigError: ``bytes_per_s`` is not above 0.
        """
        self._prefix = prefix
        self._geometry = prefix.geometry
        self._kv = kv
        self._clock = clock
        self._schedule = LinkSchedule(bytes_per_s)
        self._free: list[torch.Tensor] = []

    def start(self, piece: Piece, *, deadline_s: float) -> PinnedTicket:
        """See ``TransferPort.start``; on the CPU the copy into staging happens here."""
        assert not isinstance(piece, Boundary), "the first stage reads no boundary states"
        now_s = self._clock()
        payload = self._prefix.payload(piece)
        if self._kv.lane is None:
            staging = self._take()
            staging.numpy()[: payload.numel()] = payload.numpy()
            payload = staging
        ticket = PinnedTicket(geometry=self._geometry, cell=piece, payload=payload)
        transfer = self._schedule.submit(ticket.num_bytes, now_s=now_s)
        ticket.due_at_s = self._schedule.done_at_s(transfer)
        ticket.late_at_s = now_s + deadline_s
        return ticket

    def wait(self, ticket: PinnedTicket, *, timeout_s: float) -> LoadOutcome | None:
        """See ``TransferPort.wait``; what would have to queue for the device has not arrived yet."""
        until_s = min(self._clock() + timeout_s, ticket.late_at_s)
        while (now_s := self._clock()) < ticket.due_at_s:
            if now_s >= until_s:
                return LoadOutcome.LATE if now_s >= ticket.late_at_s else None
            time.sleep(max(0.0, min(ticket.due_at_s, until_s) - now_s))
        lane = self._kv.lane
        if lane is not None and not lane.has_room(max(0.0, until_s - now_s)):
            return LoadOutcome.LATE if self._clock() >= ticket.late_at_s else None
        return LoadOutcome.OK

    def place(self, ticket: PinnedTicket) -> None:
        """See ``TransferPort.place``."""
        self._kv.write_payload(ticket.payload[: ticket.kv_bytes], ticket.extent)
        if ticket.num_bytes > ticket.kv_bytes:
            states = self._kv.checkpoint
            assert states is not None, "only a model with recurrent layers has states to read"
            states.write_payload(ticket.payload.numpy()[ticket.kv_bytes : ticket.num_bytes], ticket.extent[:2])
        self._give(ticket)

    def cancel(self, ticket: PinnedTicket) -> None:
        """See ``TransferPort.cancel``; the bytes it was given on the link stay spent."""
        self._give(ticket)

    def _take(self) -> torch.Tensor:
        return self._free.pop() if self._free else _pageable(max(1, self._geometry.max_cell_bytes))

    def _give(self, ticket: PinnedTicket) -> None:
        if self._kv.lane is None:
            self._free.append(ticket.payload)
