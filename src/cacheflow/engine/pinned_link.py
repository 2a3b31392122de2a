"""A prefix in (pinned) host memory, read through a paced link: the GPU benchmark's transfer port, without any store.

Provides ``restore.ports.TransferPort`` by structure. Needs torch and numpy only. On ``device="cpu"`` the link is a
numpy copy, so that the whole path runs without a GPU.
"""

from __future__ import annotations

import time

import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.cuda import CopyLane
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.plan.grid import Boundary, Cell, Piece, Tile
from cacheflow.stores.link import LinkSchedule
from cacheflow.types import Clock, LoadOutcome


class PinnedPrefix:
    """Keys and values of a prefix in host memory, cell after cell, each as its payload (see ``cells``)."""

    def __init__(self, geometry: CellGeometry, *, pinned: bool) -> None:
        """Reserve room for every cell of the grid, page-locked if ``pinned``."""
        self.geometry = geometry
        self._spans: dict[Cell, tuple[int, int]] = {}
        end = 0
        for cell in Tile(0, geometry.grid.num_chunks, 0, geometry.grid.num_blocks).cells():
            start, end = end, end + geometry.num_bytes(cell)
            self._spans[cell] = start, end
        self._bytes = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)

    @classmethod
    def save(cls, kv: KVBuffer, geometry: CellGeometry) -> PinnedPrefix:
        """Copy the grid's prefix out of a KV buffer; pinned when the buffer is on CUDA. Waits for the copies."""
        prefix = cls(geometry, pinned=kv.device.type == "cuda")
        for cell in prefix._spans:
            values, payload = kv.cell(*geometry.extent(cell)), prefix.payload(cell)
            kv_bytes = geometry.kv_bytes(cell)
            payload[:kv_bytes].view(values.dtype).view(values.shape).copy_(values)
            if payload.numel() > kv_bytes:
                assert kv.checkpoint is not None, "only a model with recurrent layers has states to save"
                payload.numpy()[kv_bytes:] = kv.checkpoint.payload(geometry.layers(cell.block))
        return prefix

    def payload(self, cell: Cell) -> torch.Tensor:
        """Bytes of one cell, a uint8 view."""
        start, end = self._spans[cell]
        return self._bytes[start:end]


class PinnedTicket:
    """One cell on the link; made by ``PinnedLinkPort.start``."""

    __slots__ = ("due_at_s", "event", "extent", "kv_bytes", "late_at_s", "num_bytes", "staging")

    def __init__(self, *, geometry: CellGeometry, cell: Cell, staging: torch.Tensor) -> None:
        """Hold what the port needs to place or cancel the read."""
        self.extent = geometry.extent(cell)
        self.staging = staging
        self.kv_bytes = geometry.kv_bytes(cell)
        self.num_bytes = geometry.num_bytes(cell)
        self.due_at_s = 0.0
        self.late_at_s = float("inf")
        self.event: torch.cuda.Event | None = None


class PinnedLinkPort:
    """Loads cells from a ``PinnedPrefix`` over a paced link. All methods on one thread.

    A cell is copied into a staging buffer on the KV buffer's device when its read starts (on CUDA asynchronously, on a
    stream of its own) and counts as arrived when the copy is through and the link's schedule says so, whichever is
    later. Placing it is a copy within the device.
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
        self._lane = CopyLane(kv.device) if kv.device.type == "cuda" else None
        self._free: list[torch.Tensor] = []

    def start(self, piece: Piece, *, deadline_s: float) -> PinnedTicket:
        """See ``TransferPort.start``; on the CPU the copy into staging happens here."""
        assert not isinstance(piece, Boundary), "the first stage reads no boundary states"
        now_s = self._clock()
        payload = self._prefix.payload(piece)
        staging = self._take()
        ticket = PinnedTicket(geometry=self._geometry, cell=piece, staging=staging)
        transfer = self._schedule.submit(ticket.num_bytes, now_s=now_s)
        ticket.due_at_s = self._schedule.done_at_s(transfer)
        ticket.late_at_s = now_s + deadline_s
        if self._lane is None:
            staging.numpy()[: ticket.num_bytes] = payload.numpy()
        else:
            ticket.event = self._lane.copy(staging[: ticket.num_bytes], payload)
        return ticket

    def wait(self, ticket: PinnedTicket, *, timeout_s: float) -> LoadOutcome | None:
        """See ``TransferPort.wait``."""
        until_s = min(self._clock() + timeout_s, ticket.late_at_s)
        while not self._arrived(ticket):
            now_s = self._clock()
            if now_s >= until_s:
                return LoadOutcome.LATE if now_s >= ticket.late_at_s else None
            time.sleep(max(0.0, min(ticket.due_at_s, until_s) - now_s))
        return LoadOutcome.OK

    def place(self, ticket: PinnedTicket) -> None:
        """See ``TransferPort.place``."""
        if self._lane is None:
            self._kv.write_payload(ticket.staging.numpy()[: ticket.kv_bytes], ticket.extent)
        else:
            target = self._kv.cell(*ticket.extent)
            source = ticket.staging[: ticket.kv_bytes].view(target.dtype).view(target.shape)
            self._lane.copy(target, source).synchronize()
        if ticket.num_bytes > ticket.kv_bytes:
            states = self._kv.checkpoint
            assert states is not None, "only a model with recurrent layers has states to read"
            states.write_payload(ticket.staging.numpy()[ticket.kv_bytes : ticket.num_bytes], ticket.extent[:2])
        self._free.append(ticket.staging)

    def cancel(self, ticket: PinnedTicket) -> None:
        """See ``TransferPort.cancel``; the bytes it was given on the link stay spent."""
        if ticket.event is not None:
            ticket.event.synchronize()
        self._free.append(ticket.staging)

    def _arrived(self, ticket: PinnedTicket) -> bool:
        if self._clock() < ticket.due_at_s:
            return False
        if ticket.event is not None:
            ticket.event.synchronize()  # microseconds: asking again after a sleep would cost more than the copy
        return True

    def _take(self) -> torch.Tensor:
        if self._free:
            return self._free.pop()
        num_bytes = max(1, self._geometry.max_cell_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8) if self._lane is None else self._lane.empty(num_bytes)
