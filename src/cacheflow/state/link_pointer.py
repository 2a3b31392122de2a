"""The link pointer: what the link reads next.

Cells in sequence: the plan's load sequence, tile by tile. With a suffix (``balance_suffix``) in two phases: chunks from
the tail, so that the meeting point stays open, then, as soon as what is left takes the link about as long as the suffix
takes compute, the rest bottom-up by blocks, so that the suffix climbs after the load.
Source: the order follows from the TTFT bound in ``bound.py``: the last byte must belong to the top block.

Boundary states, before any cell: from the head, for the chunks compute is about to come to, and only for those it is
expected to reach before the link does, because reading a boundary takes the link as long as so many keys and values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.plan.grid import Boundary, Cell, Tile
from cacheflow.plan.plan import Share
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.staircase import Mask, marginal_compute_KB
from cacheflow.state.board import Board, Boundaries, CellState
from cacheflow.state.compute_pointer import bottom_row_pays
from cacheflow.state.compute_side import ComputeSide
from cacheflow.state.link_side import LinkSide

CLIMB_MARGIN = 1.15
"""Start loading bottom-up when the link's remaining time is this many suffix times (plus one chunk)."""
DOUBT = 1.5
"""Until rates were observed, load only what the link would get even if compute were this much faster than planned."""
SURE = 1.15
"""The same for what a wide staircase leaves out of a chunk, where rates were observed."""
CHUNKS_AHEAD = 1
"""Chunks whose boundary states are kept ready after the one compute works on, however long a chunk takes."""


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """Where compute and the link are expected to meet: compute takes chunks below ``chunk`` and its first blocks.

    Attributes:
        levels_K: What compute takes of each chunk, of bottom blocks, where those are not whole chunks; empty where
            they are.
    """

    chunk: int
    block: int
    link_left_s: float
    levels_K: tuple[int, ...] = ()


class _CellSequence:
    """Every cell of a grid in the sequence in which compute takes them. Shape ``N``: cells."""

    def __init__(self, problem: RestoreProblem, sequence: Sequence[Tile]) -> None:
        """Price the cells; every prefix of the sequence is a staircase that costs the sum of its cells."""
        cells = [cell for tile in sequence for cell in tile.cells()]
        self._num_chunks = problem.grid.num_chunks
        self._chunk_N = np.array([cell.chunk for cell in cells], dtype=np.int64)
        self._block_N = np.array([cell.block for cell in cells], dtype=np.int64)
        self._compute_N = marginal_compute_KB(problem)[self._chunk_N, self._block_N]
        self._bytes_N = problem.load_bytes_KB[self._chunk_N, self._block_N]

    def meeting(
        self, open_KB: Mask, *, compute_s: float, factor: float, link_s: float, top_s: float, bytes_per_s: float
    ) -> MeetingPoint:
        """Where compute from the front and the link from the back end together.

        Args:
            open_KB: Cells that nobody has claimed.
            compute_s: Seconds that compute needs besides.
            factor: Compute takes this many times as long as predicted.
            link_s: Seconds that the link needs besides.
            top_s: Seconds that follow the last byte.
            bytes_per_s: The link's bandwidth.
        """
        open_N = open_KB[self._chunk_N, self._block_N]
        compute_N = compute_s + np.cumsum(self._compute_N * open_N) * factor
        bytes_N = self._bytes_N * open_N
        link_N = (bytes_N.sum() - np.cumsum(bytes_N)) / bytes_per_s + link_s
        late = np.flatnonzero(compute_N >= link_N + top_s)
        last = int(late[0]) if late.size else len(open_N) - 1
        levels_K = np.zeros(self._num_chunks, dtype=np.int64)
        np.maximum.at(levels_K, self._chunk_N[: last + 1], self._block_N[: last + 1] + 1)
        return MeetingPoint(0, 0, float(link_N[last]), tuple(levels_K.tolist()))


class LinkPointer:
    """Claims cells and boundary states for the link, one read at a time."""

    def __init__(self, board: Board, boundaries: Boundaries, link: LinkSide, compute: ComputeSide) -> None:
        """Start at the head of the plan's load sequence."""
        self._board, self._boundaries, self._link, self._compute = board, boundaries, link, compute
        problem, self._plan, self._rates = compute.problem, compute.plan, compute.rates
        self._sequence = self._plan.load_sequence
        self._tile_index = 0
        self._queue: deque[Cell] = deque()
        self._busy: Container[int] = ()
        self._chunk_bytes = float(problem.load_bytes_KB.sum(axis=1).max(initial=0))
        self._cell_bytes = int(problem.load_bytes_KB.max(initial=0))
        # A wider staircase than whole chunks: compute comes to the bottom of the last chunks too. Only with recurrent
        # blocks, of which it can take nothing back from the link.
        wide = board.recurrent and any(tile.block_lo for tile in self._plan.compute_sequence)
        self._cell_sequence = _CellSequence(problem, self._plan.compute_sequence) if wide else None
        self._only_compute_K: list[list[int]] = []
        """Blocks of each chunk that the plan leaves to compute alone, where boundary states are read."""
        if boundaries.source is BoundarySource.STORED:
            loadable = {cell for tile in self._sequence for cell in tile.cells()}
            self._only_compute_K = [
                [block for block in range(board.num_blocks) if (chunk, block) not in loadable]
                for chunk in range(board.num_chunks)
            ]

    def expected_levels_K(self, now_s: float) -> tuple[int, ...]:
        """What compute is expected to take of each chunk at most, of bottom blocks; empty where that is left open.

        Only of a wide staircase: in a split by tokens compute takes whole chunks.
        """
        if self._cell_sequence is None or self._link.down or self._compute.stopped:
            return ()
        return self._meeting_point(now_s, doubt=SURE if self._rates.trusted else DOUBT).levels_K

    # Cells.

    def claim(self, now_s: float, busy: Container[int] = ()) -> Cell | None:
        """Claim the next cell as ``LOADING``; None when the link should wait or has nothing left.

        Cells of tiers that are ``busy`` are passed over: the pointer comes back to them.
        """
        self._busy = busy
        if self._link.down:
            self.release()
            return None
        if (queued := self._next_queued()) is not None:
            return queued
        cell = self._with_suffix(now_s) if self._plan.balance_suffix else self._in_sequence(now_s)
        if cell is not None:
            self._board.set(*cell, CellState.LOADING)
        return cell

    def _next_queued(self) -> Cell | None:
        """Take the first cell that was claimed with a whole tile and is not of a busy tier."""
        for index, cell in enumerate(self._queue):
            if not self._is_busy(cell):
                del self._queue[index]
                return cell
        return None

    def _is_busy(self, cell: Cell) -> bool:
        return self._board.tier(*cell) in self._busy

    def release(self) -> None:
        """Give back cells that were claimed with a whole tile but not started."""
        while self._queue:
            self._board.set(*self._queue.popleft(), CellState.OPEN)

    def take_over(self, chunk_lo: int) -> None:
        """Load whatever is open of the chunks from ``chunk_lo`` on, also where the plan left it to compute.

        After the plan's own sequence, which is looked at again from its head: tail chunk first, top block first.
        """
        cells = (
            Tile(chunk, chunk + 1, block, block + 1)
            for chunk in range(self._board.num_chunks - 1, chunk_lo - 1, -1)
            for block in range(self._board.num_blocks - 1, -1, -1)
        )
        self._sequence = (*self._plan.load_sequence, *cells)
        self._tile_index = 0

    def _loadable(self, chunk: int, block: int) -> bool:
        """Whether the link may restore a cell: it is open and not demanded of compute."""
        board = self._board
        return board.is_open(chunk, block) and block >= self._compute.demand_K[chunk] and chunk < board.limit

    def _in_sequence(self, now_s: float) -> Cell | None:
        if self._plan.share is Share.LAYERS:
            return self._from_tail(now_s)
        for index in range(self._tile_index, len(self._sequence)):
            tile = self._sequence[index]
            if self._is_busy(Cell(tile.chunk_lo, tile.block_lo)):
                continue
            if self._claim_whole(tile):
                return self._next_queued()
            self._pass(index)
        return None

    def _pass(self, index: int) -> None:
        """Never look at a tile again that has nothing to load, unless one before it is still to be looked at."""
        if index == self._tile_index:
            self._tile_index += 1

    def _top_of(self, tile: Tile) -> Cell | None:
        block = self._board.top_open_block(tile.chunk_lo, tile.block_lo, tile.block_hi)
        return None if block is None or not self._loadable(tile.chunk_lo, block) else Cell(tile.chunk_lo, block)

    def _claim_whole(self, tile: Tile) -> bool:
        cells = [cell for cell in tile.cells() if self._loadable(*cell)]
        # Of what compute must pass for a recurrent block's state, the link brings what is left over.
        if not cells or (len(cells) < tile.num_cells and not self._board.recurrent):
            return False
        for cell in cells:
            self._board.set(*cell, CellState.LOADING)
        self._queue.extend(cells)
        return True

    def _link_is_first(self, cell: Cell, now_s: float) -> bool:
        """Whether taking a cell ends sooner than leaving all open cells to compute, the suffix included."""
        board, boundaries, compute = self._board, self._boundaries, self._compute
        factor = self._rates.compute_factor
        chunk = cell.chunk
        link_s = self._link.load_s(board.load_bytes(*cell))
        if (
            boundaries.source is BoundarySource.HANDED_OVER
            and boundaries.possible(chunk)
            and not boundaries.ready(chunk)
        ):
            before_s = compute.left_s(now_s) + float(board.open_compute_K[:chunk].sum()) * factor
            own_s = float(board.open_compute_K[chunk]) * factor
            return link_s <= max(boundaries.due_s(chunk) - now_s, before_s) + own_s
        if compute.stopped or not boundaries.awaited(chunk):
            return True
        if compute.keeps_whole and compute.has_begun(chunk):
            return False
        open_s = board.open_compute_s
        if self._plan.balance_suffix:
            compute_s = compute.left_s(now_s) + compute.suffix_left_s() + open_s * factor
            return link_s + compute.suffix_from_s(cell.block) <= compute_s
        if self._plan.kv_only_top and compute.has_begun(chunk):
            # The top of what compute would climb, keys and values alone; a chunk not begun counts that at its bottom.
            open_s -= float(compute.problem.compute_KB[cell] - compute.problem.kv_only_KB[cell])
        return link_s <= compute.left_s(now_s) + open_s * factor

    def _with_suffix(self, now_s: float) -> Cell | None:
        meeting = self._meeting_point(now_s, doubt=1.0)
        far_s = CLIMB_MARGIN * self._compute.suffix_left_s() + self._chunk_bytes / self._link.bytes_per_s
        in_sequence = self._tile_index < len(self._sequence)
        if in_sequence and not self._compute.stopped and meeting.link_left_s > far_s:
            return self._from_tail(now_s)
        self._link.climb()
        # A plan that leaves all to the link has no meeting point to doubt: the suffix needs the bottom rows at once.
        if not self._rates.trusted and any(self._plan.levels_K):
            meeting = self._meeting_point(now_s, doubt=DOUBT)
        cell = self._bottom_up(meeting)
        if cell is None:
            return self._steal(now_s) or self._steal_demanded(now_s)
        return cell if self._link_is_first(cell, now_s) else None

    def _from_tail(self, now_s: float) -> Cell | None:
        for index in range(self._tile_index, len(self._sequence)):
            cell = self._top_of(self._sequence[index])
            if cell is None:
                self._pass(index)
            elif not self._is_busy(cell):
                return cell if self._link_is_first(cell, now_s) else None
        return None

    def _bottom_up(self, meeting: MeetingPoint) -> Cell | None:
        """Lowest block first, tail chunk first within it, among the cells compute is not expected to reach."""
        board, compute = self._board, self._compute
        # One block above: a cell taken at the meeting point itself would stop compute there for good.
        chunk_lo, block_lo = (0, 0) if compute.stopped or meeting.levels_K else (meeting.chunk, meeting.block + 1)
        least_K = compute.demand_K
        if meeting.levels_K:
            least_K = [max(pair) for pair in zip(compute.demand_K, meeting.levels_K, strict=True)]
        for block in range(1 if self._bottom_row_pays() else 0, board.num_blocks):
            first = chunk_lo if block >= block_lo else chunk_lo + 1
            chunk = board.last_open_chunk(block, chunk_lo=first)
            while chunk is not None and (block < least_K[chunk] or self._is_busy(Cell(chunk, block))):
                chunk = next((c for c in range(chunk - 1, first - 1, -1) if self._loadable(c, block)), None)
            if chunk is not None:
                return Cell(chunk, block)
        return None

    def _steal(self, now_s: float) -> Cell | None:
        """Take what compute would come to last when the link is ahead of what was expected."""
        board = self._board
        if self._cell_sequence is not None:
            self._tile_index = 0
            return self._from_tail(now_s)
        for chunk in np.flatnonzero(board.open_bytes_K)[::-1].tolist():
            block = board.top_open_block(chunk, self._compute.demand_K[chunk], board.num_blocks)
            if block is not None and not self._is_busy(cell := Cell(chunk, block)):
                return cell if self._link_is_first(cell, now_s) else None
        return None

    def _steal_demanded(self, now_s: float) -> Cell | None:
        """Take the top of the highest chunk that compute took back, when compute would not get to it sooner."""
        board, compute = self._board, self._compute
        if board.recurrent:
            return None
        for chunk in range(board.num_chunks - 1, -1, -1):
            block = board.top_open_block(chunk, self._link.failed_K[chunk], compute.demand_K[chunk])
            if block is None or self._is_busy(Cell(chunk, block)):
                continue
            compute_s = compute.left_s(now_s) + compute.repair_left_s() + compute.suffix_left_s()
            if self._link.load_s(board.load_bytes(chunk, block)) + compute.suffix_from_s(block) > compute_s:
                return None
            compute.release(chunk, block)
            return Cell(chunk, block)
        return None

    def _bottom_row_pays(self) -> bool:
        return bottom_row_pays(self._board, self._boundaries, self._link, self._compute)

    def _meeting_point(self, now_s: float, *, doubt: float) -> MeetingPoint:
        """Where compute, with the suffix after it, and the link, with the top block after it, would end together.

        With ``doubt`` compute is so many times as fast as expected, and the link as slow.
        """
        board, link, compute = self._board, self._link, self._compute
        factor, bytes_per_s = self._rates.compute_factor / doubt, link.bytes_per_s / doubt
        after_s = compute.suffix_left_s() + compute.left_s(now_s)
        if compute.stopped:
            return MeetingPoint(0, 0, link.load_s(board.open_bytes))
        if self._cell_sequence is not None:
            return self._cell_sequence.meeting(
                board.open_KB(),
                compute_s=after_s,
                factor=factor,
                link_s=link.in_flight_bytes / bytes_per_s + link.others_s,
                top_s=compute.top_suffix_s * factor,
                bytes_per_s=bytes_per_s,
            )
        open_compute_K, open_bytes_K = board.open_compute_K, board.open_bytes_K
        if self._bottom_row_pays():
            after_s += board.bottom_compute_s * factor
            open_compute_K, open_bytes_K = open_compute_K - board.bottom_compute_K, open_bytes_K - board.bottom_bytes_K
        compute_K = after_s + np.cumsum(open_compute_K) * factor
        tail_K = open_bytes_K.sum() - np.cumsum(open_bytes_K)
        link_K = (link.in_flight_bytes + tail_K) / bytes_per_s + link.others_s
        ends_K = link_K + compute.top_suffix_s * factor
        late = np.flatnonzero(compute_K >= ends_K)
        if late.size == 0:
            return MeetingPoint(board.num_chunks, 0, link.load_s(0))
        chunk = int(late[0])
        compute_s, load_s = float(open_compute_K[chunk]) * factor, float(open_bytes_K[chunk]) / bytes_per_s
        gap_s = float(ends_K[chunk]) + load_s - (float(compute_K[chunk]) - compute_s)
        share = min(1.0, max(0.0, gap_s / (compute_s + load_s))) if compute_s + load_s > 0 else 0.0
        return self._meeting_in(chunk, share, float(link_K[chunk]) + (1 - share) * load_s)

    def _meeting_in(self, chunk: int, share: float, link_left_s: float) -> MeetingPoint:
        board = self._board
        open_blocks = [block for block in range(board.num_blocks) if board.is_open(chunk, block)]
        if not open_blocks:
            return MeetingPoint(chunk, 0, link_left_s)
        index = round(share * len(open_blocks))
        block = open_blocks[index] if index < len(open_blocks) else open_blocks[-1] + 1
        return MeetingPoint(chunk, block, link_left_s)

    # Boundary states.

    def claim_boundary(self, now_s: float) -> Boundary | None:
        """Claim the boundary states that are due; None when none are, or none are wanted."""
        if self._boundaries.source is not BoundarySource.STORED:
            return None
        chunk = self._next_boundary(now_s)
        if chunk is None or not self._boundary_is_due(chunk, now_s):
            return None
        num_bytes = self._boundaries.num_bytes(chunk)
        self._boundaries.begin(chunk, due_s=now_s + self._link.load_s(num_bytes) - self._link.others_s)
        return Boundary(chunk)

    def _next_boundary(self, now_s: float) -> int | None:
        """The first chunk that compute will want to start: demanded of it, or ahead of where the link will meet it."""
        reaches = bool(self._plan.compute_sequence)
        for chunk in range(self._board.num_chunks):
            if not self._boundaries.wanted(chunk):
                continue
            if self._compute.demanded_open_block(chunk) is not None:
                return chunk
            if reaches and self._reaches(chunk, now_s):
                return chunk
            reaches = False
        return None

    def _reaches(self, chunk: int, now_s: float) -> bool:
        """Whether compute comes to the chunk so early that it saves the link more than the boundary costs it."""
        board, num_bytes = self._board, self._boundaries.num_bytes(chunk)
        if self._link.down or any(board.is_open(chunk, block) for block in self._only_compute_K[chunk]):
            return True
        open_bytes = float(board.open_bytes_K[chunk])
        if open_bytes <= num_bytes:
            return False
        gap_s = self._link.load_s(float(board.open_bytes_K[chunk:].sum())) - self._starts_s(chunk, now_s)
        compute_s = float(board.open_compute_K[chunk]) * self._rates.compute_factor
        # Meeting in this chunk, compute takes the share x of it for which both end together; x * open_bytes must be
        # more than the boundary.
        return gap_s * open_bytes > compute_s * num_bytes

    def _starts_s(self, chunk: int, now_s: float) -> float:
        """Seconds until compute could start a chunk."""
        before_s = float(self._board.open_compute_K[:chunk].sum()) * self._rates.compute_factor
        return self._compute.left_s(now_s) + before_s

    def _boundary_is_due(self, chunk: int, now_s: float) -> bool:
        ahead = sum(self._board.num_open_K[each] > 0 and self._boundaries.awaited(each) for each in range(chunk))
        if ahead <= CHUNKS_AHEAD:
            return True
        # The read that would go first otherwise; what it waits for after that is under way already.
        next_bytes = self._boundaries.num_bytes(chunk) + self._cell_bytes
        needed_s = self._link.load_s(next_bytes) - self._link.others_s + self._boundaries.lead_s
        return self._starts_s(chunk, now_s) <= needed_s
