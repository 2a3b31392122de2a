"""The board: which cell is open, under way or resident, and the running sums the pointers decide by.

Row-major (``rows_BK[block][chunk]``), so that one row is one ``bytearray`` and a search for the next open cell of a
row is one C call. Shapes: ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from cacheflow.plan.problem import RestoreProblem


class CellState(IntEnum):
    """Where one cell of the grid stands."""

    OPEN = 0
    COMPUTING = 1
    LOADING = 2
    PLACING = 3
    COMPUTED = 4
    LOADED = 5


RESIDENT = (CellState.COMPUTED, CellState.LOADED)


class Board:
    """Cell states with the sums over open cells; the only place where a cell changes its state.

    Attributes:
        open_bytes_K: Bytes of the open cells of each chunk.
        open_compute_K: Predicted seconds to recompute the open cells of each chunk. Counts the bottom block for its
            keys and values only: in a chunk recomputed whole the top block saves as much, in any other it is exact.
        bottom_bytes_K: What the bottom block adds to ``open_bytes_K``; 0 where it is not open.
        bottom_compute_K: What the bottom block adds to ``open_compute_K``; 0 where it is not open.
        open_bytes: Sum of ``open_bytes_K``.
        open_compute_s: Sum of ``open_compute_K``.
        num_open_K: Number of open cells of each chunk.
        num_missing: Cells that are not resident yet.
    """

    def __init__(self, problem: RestoreProblem) -> None:
        """Open every cell of the problem's grid."""
        grid = problem.grid
        self.num_chunks, self.num_blocks = grid.num_chunks, grid.num_blocks
        self._compute_KB = problem.compute_KB.tolist()
        self._bytes_KB = problem.load_bytes_KB.tolist()
        self._rows_BK = [bytearray(self.num_chunks) for _ in range(self.num_blocks)]
        self.open_bytes_K = problem.load_bytes_KB.sum(axis=1).astype(np.float64)
        price_KB = problem.compute_KB.copy()
        price_KB[:, 0] = problem.kv_only_KB[:, 0]
        self._price_KB = price_KB.tolist()
        self.open_compute_K = price_KB.sum(axis=1)
        self.bottom_bytes_K = problem.load_bytes_KB[:, 0].astype(np.float64)
        self.bottom_compute_K = price_KB[:, 0].copy()
        self.open_bytes = float(self.open_bytes_K.sum())
        self.open_compute_s = float(self.open_compute_K.sum())
        self.num_open_K = [self.num_blocks] * self.num_chunks
        self.num_missing = self.num_chunks * self.num_blocks
        self._missing_B = [self.num_chunks] * self.num_blocks
        self._head_B = [0] * self.num_blocks

    def state(self, chunk: int, block: int) -> CellState:
        """State of one cell."""
        return CellState(self._rows_BK[block][chunk])

    def is_open(self, chunk: int, block: int) -> bool:
        """Whether nobody has claimed the cell."""
        return self._rows_BK[block][chunk] == CellState.OPEN

    def is_resident(self, chunk: int, block: int) -> bool:
        """Whether the cell's keys and values are in the KV buffer."""
        return self._rows_BK[block][chunk] >= CellState.COMPUTED

    def set(self, chunk: int, block: int, state: CellState) -> None:
        """Move one cell to a state and keep the sums right."""
        row = self._rows_BK[block]
        before = row[chunk]
        if before == state:
            return
        row[chunk] = state
        if before == CellState.OPEN or state == CellState.OPEN:
            self._count_open(chunk, block, -1 if before == CellState.OPEN else 1)
        resident_change = (state >= CellState.COMPUTED) - (before >= CellState.COMPUTED)
        if resident_change:
            self._missing_B[block] -= resident_change
            self.num_missing -= resident_change
            if resident_change < 0:
                self._head_B[block] = min(self._head_B[block], chunk)

    def _count_open(self, chunk: int, block: int, sign: int) -> None:
        num_bytes, seconds = self._bytes_KB[chunk][block], self._price_KB[chunk][block]
        self.num_open_K[chunk] += sign
        self.open_bytes_K[chunk] += sign * num_bytes
        self.open_compute_K[chunk] += sign * seconds
        self.open_bytes += sign * num_bytes
        self.open_compute_s += sign * seconds
        if block == 0:
            self.bottom_bytes_K[chunk] += sign * num_bytes
            self.bottom_compute_K[chunk] += sign * seconds

    def compute_s(self, chunk: int, block: int) -> float:
        """Predicted seconds to recompute one cell in full."""
        return float(self._compute_KB[chunk][block])

    def load_bytes(self, chunk: int, block: int) -> int:
        """Bytes a load of one cell moves."""
        return int(self._bytes_KB[chunk][block])

    def row_resident(self, block: int) -> bool:
        """Whether every chunk of a block is resident, so that the suffix may run through it."""
        return self._missing_B[block] == 0

    def head_resident(self, chunk: int, block: int) -> bool:
        """Whether all chunks before ``chunk`` are resident in a block, so that ``chunk`` can be recomputed there."""
        row, head = self._rows_BK[block], self._head_B[block]
        while head < self.num_chunks and row[head] >= CellState.COMPUTED:
            head += 1
        self._head_B[block] = head
        return head >= chunk

    def num_in(self, state: CellState) -> int:
        """Number of cells in a state."""
        return sum(row.count(state) for row in self._rows_BK)

    def last_open_chunk(self, block: int, *, chunk_lo: int = 0) -> int:
        """Highest open chunk of a block at or above ``chunk_lo``; -1 when there is none."""
        return self._rows_BK[block].rfind(0, chunk_lo)

    def top_open_block(self, chunk: int, block_lo: int, block_hi: int) -> int:
        """Highest open block of a chunk in ``[block_lo, block_hi)``; -1 when there is none."""
        for block in range(block_hi - 1, block_lo - 1, -1):
            if self._rows_BK[block][chunk] == CellState.OPEN:
                return block
        return -1
