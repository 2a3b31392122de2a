"""Ports without torch: real threads, real waiting, cells as numbers in an array."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from cacheflow.plan.grid import Grid, Piece, Tile
from cacheflow.types import LoadOutcome


def expected_value(chunk: int, block: int) -> int:
    return 1000 + chunk * 100 + block


@dataclass
class FakeBuffer:
    grid: Grid
    cells: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.cells = np.full((self.grid.num_chunks, self.grid.num_blocks), -1)

    def is_right(self) -> bool:
        k, b = np.indices(self.cells.shape)
        return bool((self.cells == 1000 + k * 100 + b).all())


class FakeCompute:
    """Writes what a transformer would, and refuses orders a transformer could not carry out."""

    def __init__(self, buffer: FakeBuffer, *, cell_s: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self.buffer, self.cell_s, self.sleep = buffer, cell_s, sleep
        self.height = [0] * buffer.grid.num_chunks
        self.suffix_next = 0
        self.finished = False
        self.thread_ids: set[int] = set()
        self.on_recompute: Callable[[Tile], None] = lambda tile: None

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        self.thread_ids.add(threading.get_ident())
        self.on_recompute(tile)
        chunk = tile.chunk_lo
        assert tile.chunk_hi == chunk + 1
        assert self.height[chunk] == tile.block_lo
        for block in range(tile.block_lo, tile.block_hi):
            assert all(self.buffer.cells[k, block] == expected_value(k, block) for k in range(chunk))
            self.sleep(self.cell_s)
            self.buffer.cells[chunk, block] = expected_value(chunk, block)
        self.height[chunk] = -1 if kv_only_top else tile.block_hi

    def restart(self, chunk: int) -> None:
        self.height[chunk] = 0

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        assert block_lo == self.suffix_next
        for block in range(block_lo, block_hi):
            assert all(
                self.buffer.cells[k, block] == expected_value(k, block) for k in range(self.buffer.grid.num_chunks)
            )
        self.suffix_next = block_hi

    def finish(self) -> None:
        self.finished = True


@dataclass
class FakeTicket:
    piece: Piece
    num_bytes: int
    ready_s: float
    outcome: LoadOutcome
    freed: bool = False


class FakeTransfer:
    """A link of one read after another; ``outcome_of`` injects faults, ``hang`` never answers."""

    def __init__(self, buffer: FakeBuffer, *, cell_s: float = 0.0, num_bytes: int = 1000) -> None:
        self.buffer, self.cell_s, self.num_bytes = buffer, cell_s, num_bytes
        self.tickets: list[FakeTicket] = []
        self.outcome_of: Callable[[Piece], LoadOutcome | None] = lambda piece: LoadOutcome.OK
        self.raise_in: str | None = None
        self._free_s = 0.0

    def start(self, piece: Piece, *, deadline_s: float) -> FakeTicket:
        self._maybe_raise("start")
        outcome = self.outcome_of(piece)
        self._free_s = max(time.perf_counter(), self._free_s) + self.cell_s
        ticket = FakeTicket(piece, self.num_bytes, self._free_s if outcome else float("inf"), outcome or LoadOutcome.OK)
        self.tickets.append(ticket)
        return ticket

    def wait(self, ticket: FakeTicket, *, timeout_s: float) -> LoadOutcome | None:
        self._maybe_raise("wait")
        left_s = ticket.ready_s - time.perf_counter()
        if left_s > 0:
            time.sleep(min(timeout_s, left_s))
        return ticket.outcome if time.perf_counter() >= ticket.ready_s else None

    def place(self, ticket: FakeTicket) -> None:
        self._maybe_raise("place")
        assert ticket.outcome is LoadOutcome.OK
        assert not ticket.freed
        ticket.freed = True
        chunk, block = ticket.piece
        self.buffer.cells[chunk, block] = expected_value(chunk, block)

    def cancel(self, ticket: FakeTicket) -> None:
        ticket.freed = True

    def _maybe_raise(self, where: str) -> None:
        if self.raise_in == where and len(self.tickets) >= 2:
            raise OSError(f"injected in {where}")
