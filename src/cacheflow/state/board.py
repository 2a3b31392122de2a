"""The board: where every cell of one restoration stands, and where its boundary states are.

Row-major (``rows_BK[block][chunk]``), so that one row is one ``bytearray`` and a search for the next open cell of a
row is one C call. Shapes: ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from cacheflow.plan.problem import BoundarySource, RestoreProblem


class CellState(IntEnum):
    """Where one cell of the grid stands."""

    OPEN = 0
    COMPUTING = 1
    LOADING = 2
    PLACING = 3
    COMPUTED = 4
    LOADED = 5


CELL_STATES = tuple(CellState)
"""By value; a lookup costs a tenth of a call of the class."""
RESIDENT = (CellState.COMPUTED, CellState.LOADED)


class Board:
    """Cell states with the sums over open cells; the only place where a cell changes its state.

    Attributes:
        limit: From this chunk on nothing is restored any more, because one cell of it can be neither recomputed nor
            loaded; the number of chunks while nothing is lost.
        open_bytes_K: Bytes of the open cells of each chunk.
        open_compute_K: Predicted seconds to recompute the open cells of each chunk. Counts the bottom block for its
            keys and values only: in a chunk recomputed whole the top block saves as much, in any other it is exact.
        bottom_bytes_K: What the bottom block adds to ``open_bytes_K``; 0 where it is not open.
        bottom_compute_K: What the bottom block adds to ``open_compute_K``; 0 where it is not open.
        open_bytes: Sum of ``open_bytes_K``.
        open_compute_s: Sum of ``open_compute_K``.
        bottom_bytes: Sum of ``bottom_bytes_K``.
        bottom_compute_s: Sum of ``bottom_compute_K``.
        num_open_K: Number of open cells of each chunk.
        num_missing: Cells that are not resident yet.
        recurrent: Whether some block is recurrent.
    """

    def __init__(self, problem: RestoreProblem) -> None:
        """Open every cell of the problem's grid."""
        grid = problem.grid
        self.num_chunks, self.num_blocks = grid.num_chunks, grid.num_blocks
        self.limit = grid.num_chunks
        self._compute_KB = problem.compute_KB.tolist()
        self._bytes_KB = problem.load_bytes_KB.tolist()
        self._moved_KB = problem.moved_KB.tolist()
        self._tier_KB = problem.tier_KB.tolist() or [[0] * self.num_blocks] * self.num_chunks
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
        self._sum_bottom()
        self.num_open_K = [self.num_blocks] * self.num_chunks
        self.num_missing = self.num_chunks * self.num_blocks
        self._missing_B = [self.num_chunks] * self.num_blocks
        self._head_B = [0] * self.num_blocks
        # Of each recurrent block the leading chunks that its running state holds.
        self._passed_B: dict[int, int] = dict.fromkeys(np.flatnonzero(problem.recurrent_B).tolist(), 0)
        self.recurrent = bool(self._passed_B)

    def state(self, chunk: int, block: int) -> CellState:
        """State of one cell."""
        return CELL_STATES[self._rows_BK[block][chunk]]

    def is_resident(self, chunk: int, block: int) -> bool:
        """Whether a cell's keys and values are where compute finds them."""
        return self.state(chunk, block) in RESIDENT

    def is_open(self, chunk: int, block: int) -> bool:
        """Whether nobody has claimed the cell."""
        return self._rows_BK[block][chunk] == CellState.OPEN

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
        if state == CellState.COMPUTED and block in self._passed_B:
            self._passed_B[block] = chunk + 1

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
            self._sum_bottom()

    def _sum_bottom(self) -> None:
        """Once a change: every decision asks for these sums."""
        self.bottom_bytes = float(self.bottom_bytes_K.sum())
        self.bottom_compute_s = float(self.bottom_compute_K.sum())

    def stop_before(self, chunk: int) -> None:
        """Restore nothing from a chunk on: what lies after a hole is of no use."""
        self.limit = min(self.limit, chunk)

    def compute_s(self, chunk: int, block: int) -> float:
        """Predicted seconds to recompute one cell in full."""
        return float(self._compute_KB[chunk][block])

    def load_bytes(self, chunk: int, block: int) -> int:
        """Bytes a load of one cell takes of the link."""
        return int(self._bytes_KB[chunk][block])

    def moved_bytes(self, chunk: int, block: int) -> int:
        """Bytes a load of one cell moves."""
        return int(self._moved_KB[chunk][block])

    def tier(self, chunk: int, block: int) -> int:
        """Number of the store that a cell lies in."""
        return int(self._tier_KB[chunk][block])

    def row_resident(self, block: int) -> bool:
        """Whether every chunk of a block is resident, so that the suffix may run through it."""
        return self._missing_B[block] == 0

    def head_ready(self, chunk: int, block: int) -> bool:
        """Whether ``chunk`` can be recomputed in a block, as far as the chunks before it are concerned.

        They must be resident; in a recurrent block they must have been recomputed, and no later chunk since.
        """
        passed = self._passed_B.get(block)
        if passed is not None:
            return passed == chunk
        row, head = self._rows_BK[block], self._head_B[block]
        while head < self.num_chunks and row[head] >= CellState.COMPUTED:
            head += 1
        self._head_B[block] = head
        return head >= chunk

    def has_passed(self, chunk: int, num_blocks: int) -> bool:
        """Whether the state of a recurrent block below ``num_blocks`` is past a chunk: only from chunk 0 again."""
        return any(block < num_blocks and passed > chunk for block, passed in self._passed_B.items())

    def rewind(self, num_chunks: int, num_blocks: int) -> int:
        """Let the states of the recurrent blocks below ``num_blocks`` start over at chunk 0.

        Returns:
            How many chunks have open cells again: the first ``num_chunks``, and those that were recomputed after them.
        """
        for block, passed in self._passed_B.items():
            if block < num_blocks:
                num_chunks, self._passed_B[block] = max(num_chunks, passed), 0
        self.reopen(num_chunks, num_blocks, (CellState.LOADING, CellState.LOADED, CellState.COMPUTED))
        return num_chunks

    def reopen(self, num_chunks: int, num_blocks: int, states: tuple[CellState, ...]) -> None:
        """Open cells in these states again: of the first chunks, up to the highest recurrent of the first blocks."""
        for chunk in range(num_chunks):
            for block in range(self.recurrent_blocks(num_blocks)):
                if self.state(chunk, block) in states:
                    self.set(chunk, block, CellState.OPEN)

    def recurrent_blocks(self, num_blocks: int) -> int:
        """How many of the first blocks must be recomputed for the states of the recurrent ones among them."""
        return max((block + 1 for block in self._passed_B if block < num_blocks), default=0)

    def open_KB(self) -> npt.NDArray[np.bool_]:
        """Which cells nobody has claimed."""
        rows_BK = np.array([np.frombuffer(row, dtype=np.uint8) for row in self._rows_BK])
        open_BK: npt.NDArray[np.bool_] = rows_BK == CellState.OPEN
        return open_BK.T

    def num_in(self, state: CellState) -> int:
        """Number of cells in a state."""
        return sum(row.count(state) for row in self._rows_BK)

    def letters(self) -> tuple[str, ...]:
        """How each cell was restored, a string per chunk, a letter per block: ``c``, ``l``, or ``.`` when missing."""
        letters = {CellState.COMPUTED: "c", CellState.LOADED: "l"}
        return tuple(
            "".join(letters.get(self.state(chunk, block), ".") for block in range(self.num_blocks))
            for chunk in range(self.num_chunks)
        )

    def last_open_chunk(self, block: int, *, chunk_lo: int = 0) -> int | None:
        """Highest open chunk of a block at or above ``chunk_lo``; None when there is none."""
        chunk = self._rows_BK[block].rfind(0, chunk_lo)
        return None if chunk < 0 else chunk

    def top_open_block(self, chunk: int, block_lo: int, block_hi: int) -> int | None:
        """Highest open block of a chunk in ``[block_lo, block_hi)``; None when there is none."""
        for block in range(block_hi - 1, block_lo - 1, -1):
            if self._rows_BK[block][chunk] == CellState.OPEN:
                return block
        return None


class BoundaryState(IntEnum):
    """Where the boundary states of one chunk are."""

    UNREAD = 0
    READING = 1
    RESIDENT = 2
    LOST = 3


class Boundaries:
    """The boundary hidden states of one restoration: what a later pipeline stage needs to recompute a chunk.

    A stage above the first starts from the activations that the stage below left at its top. They come out of the
    store over the stage's own link, head chunk first and just in time, or are handed over by the stage below. What
    cannot be had ends the staircase: that chunk and all later ones of the stage are left to the link.

    Attributes:
        source: Where they come from.
        lead_s: Seconds by which a read is asked for before its time, beside the time the link needs: as long as
            commands and reports were seen to take.
    """

    def __init__(self, board: Board, problem: RestoreProblem, source: BoundarySource) -> None:
        """Nothing is read yet; a first stage needs nothing."""
        num_chunks = board.num_chunks
        self.source, self._board = source, board
        self._bytes_K: list[int] = problem.boundary_bytes_K.tolist()
        first = BoundaryState.RESIDENT if source is BoundarySource.FIRST_STAGE else BoundaryState.UNREAD
        self._state_K = [first] * num_chunks
        self._due_K = [math.inf] * num_chunks
        self._lost_from = 0 if source is BoundarySource.NONE else num_chunks
        self.lead_s = 0.0

    @property
    def needed(self) -> bool:
        """Whether chunks have to wait for anything."""
        return self.source is not BoundarySource.FIRST_STAGE

    def state(self, chunk: int) -> BoundaryState:
        """Where a chunk's boundary states are."""
        return self._state_K[chunk]

    def num_bytes(self, chunk: int) -> int:
        """Bytes a read of a chunk's boundary states moves."""
        return self._bytes_K[chunk]

    def ready(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed from its bottom block now."""
        return self._state_K[chunk] is BoundaryState.RESIDENT and chunk < self._lost_from

    def awaited(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed now, or once a read under way is there."""
        return self._state_K[chunk] in (BoundaryState.READING, BoundaryState.RESIDENT) and chunk < self._lost_from

    def possible(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed now or later."""
        return self._state_K[chunk] is not BoundaryState.LOST and chunk < self._lost_from

    def computable(self, chunk: int) -> bool:
        """Whether compute may restore cells of a chunk, now or later."""
        return chunk < self._board.limit and self.possible(chunk)

    def wanted(self, chunk: int) -> bool:
        """Whether a chunk's boundary states are still to be had, and there are cells to recompute from them."""
        unread = self._state_K[chunk] is BoundaryState.UNREAD
        return unread and self.computable(chunk) and self._board.num_open_K[chunk] > 0

    def wants_activations(self, chunk: int) -> bool:
        """Whether the stage below is to hand a chunk's activations over: it has not, and there are cells left."""
        return self.source is BoundarySource.HANDED_OVER and self.wanted(chunk)

    @property
    def reads_possible(self) -> bool:
        """Whether boundary states may still be claimed for the link, now or later."""
        return self.source is BoundarySource.STORED and any(map(self.wanted, range(self._board.num_chunks)))

    @property
    def any_ready(self) -> bool:
        """Whether a chunk with open cells is ready to be recomputed, as far as its boundary states are concerned."""
        board = self._board
        return any(board.num_open_K[chunk] > 0 and self.ready(chunk) for chunk in range(board.num_chunks))

    def awaited_s(self, now_s: float) -> float | None:
        """Seconds until the first read under way should end; None when compute waits for none.

        Compute waits while no chunk with open cells is ready to be recomputed.
        """
        due = [self._due_K[chunk] for chunk, state in enumerate(self._state_K) if state is BoundaryState.READING]
        return None if not due or self.any_ready else max(0.0, min(due) - now_s)

    def expect(self, chunk: int, due_s: float) -> None:
        """Note when a chunk that is handed over is expected; infinite for never."""
        self._due_K[chunk] = due_s

    def due_s(self, chunk: int) -> float:
        """When a chunk's boundary states were last expected."""
        return self._due_K[chunk]

    def begin(self, chunk: int, *, due_s: float) -> None:
        """Note a read under way, which the link alone would end at ``due_s``."""
        assert self._state_K[chunk] is BoundaryState.UNREAD, f"boundary of chunk {chunk} is read once"
        self._state_K[chunk], self._due_K[chunk] = BoundaryState.READING, due_s

    def complete(self, chunk: int, now_s: float | None = None) -> None:
        """Note that a chunk's boundary states are there, and by how much later than the link alone would have been."""
        if self._state_K[chunk] is BoundaryState.READING and now_s is not None:
            # A decaying maximum: a lead that is too short makes compute wait, one too long only holds memory.
            self.lead_s = max(now_s - self._due_K[chunk], 0.7 * self.lead_s)
        self._state_K[chunk] = BoundaryState.RESIDENT

    def lose(self, chunk: int, *, and_later: bool) -> None:
        """Note that a chunk's boundary states will not come; ``and_later``: the staircase ends there."""
        self._state_K[chunk], self._due_K[chunk] = BoundaryState.LOST, math.inf
        if and_later:
            self._lost_from = min(self._lost_from, chunk)
