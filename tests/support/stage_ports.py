"""Ports of one rank of a pipeline stage without torch, for ``StepExecutor``."""

from __future__ import annotations

from collections import deque

from cacheflow.plan.grid import Boundary, Piece, Tile
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeBuffer, FakeCompute, FakeTicket, FakeTransfer


class StageBuffer(FakeBuffer):
    """A KV buffer with the boundary states beside it."""

    def __init__(self, grid) -> None:
        super().__init__(grid)
        self.boundaries: set[int] = set()


class StageCompute(FakeCompute):
    """Needs boundary states or what the stage below hands over; ``below`` and ``above`` are pipes."""

    def __init__(self, buffer: StageBuffer, *, stored: bool, below: deque | None, above: deque | None) -> None:
        super().__init__(buffer)
        self.stored, self.below, self.above = stored, below, above
        self.received: set[int] = set()

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        if self.stored:
            assert tile.chunk_lo in self.buffer.boundaries
        elif self.below is not None:
            assert tile.chunk_lo in self.received
        super().recompute(tile, kv_only_top=kv_only_top)

    def receive(self, chunk: int) -> None:
        sent, failed = self.below.popleft()
        assert sent == chunk
        if failed:
            raise RuntimeError("the stage below has failed")
        self.received.add(chunk)

    def send(self, chunk: int, *, failed: bool) -> None:
        assert failed or self.height[chunk] == self.buffer.grid.num_blocks
        self.above.append((chunk, failed))


class StageTransfer(FakeTransfer):
    """Reads boundary states too; ``boundary_outcome_of`` injects faults."""

    def __init__(self, buffer: StageBuffer, **kwargs) -> None:
        super().__init__(buffer, **kwargs)
        self.boundary_outcome_of = lambda chunk: LoadOutcome.OK

    def start(self, piece: Piece, *, deadline_s: float) -> FakeTicket:
        if not isinstance(piece, Boundary):
            return super().start(piece, deadline_s=deadline_s)
        outcome = self.boundary_outcome_of(piece.chunk)
        ticket = FakeTicket(piece, self.num_bytes, 0.0 if outcome else float("inf"), outcome or LoadOutcome.OK)
        self.tickets.append(ticket)
        return ticket

    def place(self, ticket: FakeTicket) -> None:
        if not isinstance(ticket.piece, Boundary):
            super().place(ticket)
            return
        assert ticket.outcome is LoadOutcome.OK
        ticket.freed = True
        self.buffer.boundaries.add(ticket.piece.chunk)
