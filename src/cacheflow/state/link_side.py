"""The load pointer: which cell the link fetches next.

In order: the plan's load order, tile by tile. Behind a suffix (``balance_suffix``) in two phases: chunks from the
tail, so that the meeting point stays open, then, as soon as what is left takes the link about as long as the suffix
takes compute, the rest bottom-up by blocks, so that the suffix climbs behind the load.
Source: the order follows from the TTFT bound in ``bound.py``: the last byte must belong to the top block.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import Share
from cacheflow.plan.problem import BoundarySource
from cacheflow.state.board import CellState
from cacheflow.state.progress import Progress

CLIMB_MARGIN = 1.15
"""Start loading bottom-up when the link's remaining time is this many suffix times (plus one chunk)."""
DOUBT = 1.5
"""Until rates were observed, load only what the link would get even if compute were this much faster than planned."""


@dataclass(frozen=True, slots=True)
class MeetingPoint:
    """Where compute and the link are expected to meet: compute takes chunks below ``chunk`` and its first blocks."""

    chunk: int
    block: int
    link_left_s: float


class LinkSide:
    """Claims cells for the link, one read at a time."""

    def __init__(self, progress: Progress) -> None:
        """Start at the head of the plan's load order."""
        self._p = progress
        self._order = progress.plan.load_sequence
        self._tile_index = 0
        self._queue: deque[tuple[int, int]] = deque()
        self._chunk_bytes = float(progress.problem.load_bytes_KB.sum(axis=1).max(initial=0))

    def claim(self, now_s: float) -> tuple[int, int] | None:
        """Claim the next cell as ``LOADING``; None when the link should wait or has nothing left."""
        p = self._p
        if p.link_down:
            self.release()
            return None
        if self._queue:
            return self._queue.popleft()
        cell = self._behind_suffix(now_s) if p.plan.balance_suffix else self._in_order(now_s)
        if cell is not None:
            p.board.set(*cell, CellState.LOADING)
        return cell

    def release(self) -> None:
        """Give back cells that were claimed with a whole tile but not started."""
        while self._queue:
            self._p.board.set(*self._queue.popleft(), CellState.OPEN)

    def take_over(self, chunk_lo: int) -> None:
        """Load whatever is open of the chunks from ``chunk_lo`` on, also where the plan left it to compute.

        Behind the plan's own order, which is looked at again from its head: tail chunk first, top block first.
        """
        board = self._p.board
        cells = (
            Tile(chunk, chunk + 1, block, block + 1)
            for chunk in range(board.num_chunks - 1, chunk_lo - 1, -1)
            for block in range(board.num_blocks - 1, -1, -1)
        )
        self._order = (*self._p.plan.load_sequence, *cells)
        self._tile_index = 0

    def _in_order(self, now_s: float) -> tuple[int, int] | None:
        p = self._p
        while self._tile_index < len(self._order):
            tile = self._order[self._tile_index]
            if p.plan.share is Share.LAYERS:
                block = p.board.top_open_block(tile.chunk_lo, tile.block_lo, tile.block_hi)
                if block >= 0 and p.loadable(tile.chunk_lo, block):
                    cell = (tile.chunk_lo, block)
                    return cell if self._link_is_first(cell, now_s) else None
            elif self._claim_whole(tile):
                return self._queue.popleft()
            self._tile_index += 1
        return None

    def _claim_whole(self, tile: Tile) -> bool:
        cells = list(tile.cells())
        if not all(self._p.loadable(*cell) for cell in cells):
            return False
        for cell in cells:
            self._p.board.set(*cell, CellState.LOADING)
        self._queue.extend(cells)
        return True

    def _link_is_first(self, cell: tuple[int, int], now_s: float) -> bool:
        """Whether taking a cell ends sooner than leaving all open cells to compute, the suffix included."""
        p = self._p
        factor = p.rates.compute_factor
        chunk, boundaries = cell[0], p.boundaries
        if (
            boundaries.source is BoundarySource.HANDED_OVER
            and boundaries.possible(chunk)
            and not boundaries.ready(chunk)
        ):
            before_s = p.compute_left_s(now_s) + float(p.board.open_compute_K[:chunk].sum()) * factor
            own_s = float(p.board.open_compute_K[chunk]) * factor
            return p.link_s(p.board.load_bytes(*cell)) <= max(boundaries.due_s(chunk) - now_s, before_s) + own_s
        if p.compute_stopped or not boundaries.awaited(chunk):
            return True
        if p.keeps_whole and p.climbed_K[chunk] > 0:
            return False
        open_s, link_s = p.board.open_compute_s, p.link_s(p.board.load_bytes(*cell))
        if p.plan.balance_suffix:
            return link_s + p.suffix_from_s(cell[1]) <= p.compute_left_s(now_s) + p.suffix_left_s() + open_s * factor
        if p.plan.kv_only_top and p.climbed_K[chunk] > 0:
            # The top of what compute would climb, keys and values alone; a chunk not begun counts that at its bottom.
            open_s -= float(p.problem.compute_KB[cell] - p.problem.kv_only_KB[cell])
        return link_s <= p.compute_left_s(now_s) + open_s * factor

    def _behind_suffix(self, now_s: float) -> tuple[int, int] | None:
        p = self._p
        split = self.split(now_s, doubt=1.0)
        far_s = CLIMB_MARGIN * p.suffix_left_s() + self._chunk_bytes / p.bytes_per_s
        in_order = self._tile_index < len(self._order)
        if in_order and not p.compute_stopped and split.link_left_s > far_s:
            return self._from_tail(now_s)
        p.link_climbs = True
        # A plan that leaves all to the link has no meeting point to doubt: the suffix needs the bottom rows at once.
        if not p.rates.trusted and any(p.plan.levels_K):
            split = self.split(now_s, doubt=DOUBT)
        cell = self._bottom_up(split)
        if cell is None:
            return self._steal(now_s) or self._steal_demanded(now_s)
        return cell if self._link_is_first(cell, now_s) else None

    def _from_tail(self, now_s: float) -> tuple[int, int] | None:
        p = self._p
        while self._tile_index < len(self._order):
            tile = self._order[self._tile_index]
            block = p.board.top_open_block(tile.chunk_lo, tile.block_lo, tile.block_hi)
            if block >= 0 and p.loadable(tile.chunk_lo, block):
                cell = (tile.chunk_lo, block)
                return cell if self._link_is_first(cell, now_s) else None
            self._tile_index += 1
        return None

    def _bottom_up(self, split: MeetingPoint) -> tuple[int, int] | None:
        """Lowest block first, tail chunk first within it, among the cells compute is not expected to reach."""
        p = self._p
        # One block above the split: a cell taken at the split itself would stop compute there for good.
        chunk_lo, block_lo = (0, 0) if p.compute_stopped else (split.chunk, split.block + 1)
        for block in range(1 if p.bottom_row_pays() else 0, p.board.num_blocks):
            first = chunk_lo if block >= block_lo else chunk_lo + 1
            chunk = p.board.last_open_chunk(block, chunk_lo=first)
            while chunk >= 0 and block < p.demand_K[chunk]:
                chunk = next((c for c in range(chunk - 1, first - 1, -1) if p.loadable(c, block)), -1)
            if chunk >= 0:
                return chunk, block
        return None

    def _steal(self, now_s: float) -> tuple[int, int] | None:
        """Take the top of the highest open chunk when the link is ahead of what was expected."""
        p = self._p
        for chunk in np.flatnonzero(p.board.open_bytes_K)[::-1].tolist():
            block = p.board.top_open_block(chunk, p.demand_K[chunk], p.board.num_blocks)
            if block >= 0:
                return (chunk, block) if self._link_is_first((chunk, block), now_s) else None
        return None

    def _steal_demanded(self, now_s: float) -> tuple[int, int] | None:
        """Take the top of the highest chunk that compute took back, when compute would not get to it sooner."""
        p = self._p
        for chunk in range(p.board.num_chunks - 1, -1, -1):
            block = p.board.top_open_block(chunk, p.failed_K[chunk], p.demand_K[chunk])
            if block < 0:
                continue
            compute_s = p.compute_left_s(now_s) + p.repair_left_s() + p.suffix_left_s()
            if p.link_s(p.board.load_bytes(chunk, block)) + p.suffix_from_s(block) > compute_s:
                return None
            p.demand_K[chunk] = block
            return chunk, block
        return None

    def split(self, now_s: float, *, doubt: float) -> MeetingPoint:
        """Where compute with the suffix behind it and the link with the top block behind it would end together."""
        p, board = self._p, self._p.board
        factor, bytes_per_s = p.rates.compute_factor / doubt, p.bytes_per_s / doubt
        after_s = p.suffix_left_s() + p.compute_left_s(now_s)
        if p.compute_stopped:
            return MeetingPoint(0, 0, p.link_s(board.open_bytes))
        open_compute_K, open_bytes_K = board.open_compute_K, board.open_bytes_K
        if p.bottom_row_pays():
            after_s += float(board.bottom_compute_K.sum()) * factor
            open_compute_K, open_bytes_K = open_compute_K - board.bottom_compute_K, open_bytes_K - board.bottom_bytes_K
        compute_K = after_s + np.cumsum(open_compute_K) * factor
        tail_K = open_bytes_K.sum() - np.cumsum(open_bytes_K)
        link_K = (p.in_flight_bytes + tail_K) / bytes_per_s + p.others_link_s
        ends_K = link_K + p.top_suffix_s * factor
        late = np.flatnonzero(compute_K >= ends_K)
        if late.size == 0:
            return MeetingPoint(board.num_chunks, 0, p.link_s(0))
        chunk = int(late[0])
        compute_s, load_s = float(open_compute_K[chunk]) * factor, float(open_bytes_K[chunk]) / bytes_per_s
        gap_s = float(ends_K[chunk]) + load_s - (float(compute_K[chunk]) - compute_s)
        share = min(1.0, max(0.0, gap_s / (compute_s + load_s))) if compute_s + load_s > 0 else 0.0
        return self._split_at(chunk, share, float(link_K[chunk]) + (1 - share) * load_s)

    def _split_at(self, chunk: int, share: float, link_left_s: float) -> MeetingPoint:
        board = self._p.board
        open_blocks = [block for block in range(board.num_blocks) if board.is_open(chunk, block)]
        if not open_blocks:
            return MeetingPoint(chunk, 0, link_left_s)
        index = round(share * len(open_blocks))
        block = open_blocks[index] if index < len(open_blocks) else open_blocks[-1] + 1
        return MeetingPoint(chunk, block, link_left_s)
