"""The compute pointer: what compute does next.

Front: the plan's compute order. Repair: chunks the link could not deliver, or that compute took back from it. Suffix:
the new tokens, block by block. Compute climbs a chunk from its bottom block, because a block needs the activations of
the one below; what it has climbed stays usable until the chunk's top was recomputed for keys and values only.
"""

from __future__ import annotations

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import Share
from cacheflow.state.board import CellState
from cacheflow.state.progress import NO_ACTIVATIONS, Progress

CLAIM_SHARE = 32
"""At most one part in this many of the open work is claimed at once, so that the meeting point stays fine."""


class ComputeSide:
    """Claims tiles for compute; each is a rectangle whose chunks are continued where they were left."""

    def __init__(self, progress: Progress) -> None:
        """Start at the head of the plan's compute order."""
        self._p = progress
        self._tile_index = 0

    def front(self, now_s: float) -> Tile | None:
        """Claim the next part of the compute order; None when it is exhausted, not ready, or left to the link."""
        tile = self._front_tile()
        if tile is None:
            self._p.compute_stopped = True
            return None
        if not self._worth_computing(tile, now_s):
            self._p.compute_stopped = self._p.plan.balance_suffix
            return None
        self._p.compute_stopped = False
        return tile if self._ready(tile) else None

    def bottom(self) -> Tile | None:
        """Claim the next open cell of the bottom row, where that pays; it is computed for keys and values only."""
        p = self._p
        if not p.bottom_row_pays():
            return None
        for chunk in range(p.board.num_chunks):
            if self._p.climbed_K[chunk] == 0 and p.board.is_open(chunk, 0) and p.computable(chunk):
                tile = Tile(chunk, chunk + 1, 0, 1)
                return tile if self._ready(tile) else None
        return None

    def _front_tile(self) -> Tile | None:
        order, share = self._p.plan.compute_sequence, self._p.plan.share
        while self._tile_index < len(order):
            tile = order[self._tile_index]
            if not all(map(self._p.computable, range(tile.chunk_lo, tile.chunk_hi))):
                self._tile_index += 1
                continue
            if share is Share.LAYERS:
                part = self._next_block(tile)
                if part is not None:
                    return part
            elif all(self._p.board.is_open(*cell) for cell in tile.cells()) and self._continues(tile):
                return tile
            self._tile_index += 1
        return None

    def _next_block(self, tile: Tile) -> Tile | None:
        chunk, block = tile.chunk_lo, self._p.climbed_K[tile.chunk_lo]
        if not (tile.block_lo <= block < tile.block_hi and self._p.board.is_open(chunk, block)):
            return None
        block_hi, limit = block + 1, min(tile.block_hi, block + self._claim_blocks(chunk, block))
        while block_hi < limit and self._p.board.is_open(chunk, block_hi):
            block_hi += 1
        return Tile(chunk, chunk + 1, block, block_hi)

    def _claim_blocks(self, chunk: int, block: int) -> int:
        """Blocks to claim at once: as many as last ``min_claim_s``, but a small share of what is still open."""
        p = self._p
        cell_s = p.board.compute_s(chunk, block) * p.rates.compute_factor
        budget_s = min(p.min_claim_s, p.board.open_compute_s * p.rates.compute_factor / CLAIM_SHARE)
        return max(1, int(budget_s / cell_s)) if cell_s > 0 else 1

    def _continues(self, tile: Tile) -> bool:
        return all(self._p.climbed_K[chunk] == tile.block_lo for chunk in range(tile.chunk_lo, tile.chunk_hi))

    def _ready(self, tile: Tile) -> bool:
        p = self._p
        return all(map(p.boundaries.ready, range(tile.chunk_lo, tile.chunk_hi))) and all(
            p.board.head_resident(tile.chunk_lo, b) for b in range(tile.block_lo, tile.block_hi)
        )

    def _worth_computing(self, tile: Tile, now_s: float) -> bool:
        """Whether compute should take an open cell that the link could also deliver."""
        p = self._p
        if p.link_down or p.plan.share is not Share.LAYERS:
            return True
        cell_s = self.predicted_s(tile, kv_only=self.kv_only_top(tile)) * p.rates.compute_factor
        if p.keeps_whole:
            if tile.block_lo > 0:
                return True
            cell_s = float(p.board.open_compute_K[tile.chunk_lo]) * p.rates.compute_factor
        open_bytes = p.board.open_bytes - p.demanded_bytes()
        rest_s = p.link_s(open_bytes)
        if not p.plan.balance_suffix:
            return rest_s >= p.compute_left_s(now_s) + cell_s
        suffix_s = p.suffix_left_s()
        if p.bottom_row_pays():
            rest_s = p.link_s(open_bytes - float(p.board.bottom_bytes_K.sum()))
            suffix_s += p.bottom_left_s()
        return rest_s + p.top_suffix_s * p.rates.compute_factor > suffix_s + cell_s

    def leaves_behind(self, tile: Tile) -> bool:
        """Whether the tile ends its chunk, activations and all, below cells that are open."""
        board = self._p.board
        return board.top_open_block(tile.chunk_lo, tile.block_hi, board.num_blocks) >= 0 and self.kv_only_top(tile)

    def kv_only_top(self, tile: Tile) -> bool:
        """Whether nothing will be recomputed above the tile, so that its top needs keys and values only."""
        p = self._p
        if not p.plan.kv_only_top:
            return False
        if tile.block_hi == p.board.num_blocks:
            return True
        above_open = any(p.board.is_open(chunk, tile.block_hi) for chunk in range(tile.chunk_lo, tile.chunk_hi))
        return not above_open and tile.block_hi >= p.demand_K[tile.chunk_lo]

    def repair(self) -> tuple[Tile, bool] | None:
        """Claim the next block of the lowest chunk demanded of compute, and whether the chunk starts over."""
        p = self._p
        for chunk in range(p.board.num_chunks):
            if p.demanded_open_block(chunk) < 0 or not p.computable(chunk):
                continue
            block = self._p.climbed_K[chunk]
            lowest_open = next(b for b in range(p.demand_K[chunk]) if p.board.is_open(chunk, b))
            restart = block > lowest_open or block == NO_ACTIVATIONS
            block = 0 if restart else block
            tile = Tile(chunk, chunk + 1, block, block + 1)
            return (tile, restart) if self._ready(tile) else None
        return None

    def claim(self, tile: Tile, *, kv_only: bool) -> float:
        """Mark a tile as being computed; returns its predicted seconds (uncorrected)."""
        p = self._p
        for chunk, block in tile.cells():
            if p.board.state(chunk, block) in (CellState.OPEN, CellState.LOADING):
                p.board.set(chunk, block, CellState.COMPUTING)
        for chunk in range(tile.chunk_lo, tile.chunk_hi):
            self._p.climbed_K[chunk] = NO_ACTIVATIONS if kv_only else tile.block_hi
        return self.predicted_s(tile, kv_only=kv_only)

    def predicted_s(self, tile: Tile, *, kv_only: bool) -> float:
        """Seconds a tile is expected to take, uncorrected."""
        seconds, problem = 0.0, self._p.problem
        for chunk, block in tile.cells():
            cost_KB = problem.kv_only_KB if kv_only and block == tile.block_hi - 1 else problem.compute_KB
            seconds += float(cost_KB[chunk, block])
        return seconds
