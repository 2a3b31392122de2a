"""The compute pointer: what compute does next.

Front: the plan's compute sequence. Repair: chunks the link could not bring, or that compute took back from it. Suffix:
the new tokens, block by block.

Taking back: what the link has begun bottom-up can only be recomputed from the chunk's bottom block, through cells that
are resident already. So the chunks are taken from the head (cheapest, and each needs the ones before it), each with the
cost of its way up, as many as bring the end forward most; the last one only as high as that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import Share, SuffixStart
from cacheflow.state.board import Board, Boundaries, CellState
from cacheflow.state.compute_side import ClaimKind, ComputeClaim, ComputeSide
from cacheflow.state.link_side import LinkPhase, LinkSide

CLAIM_SHARE = 32
"""At most one part in this many of the open work is claimed at once, so that the meeting point stays fine."""
SUFFIX_CLAIM_S = 0.05
"""New tokens are claimed so many seconds of blocks at once, so that a request that comes first waits no longer."""
RECLAIM_GAIN = 0.97
"""Take cells back only when that is expected to end this much sooner."""

TAKEN = (CellState.OPEN,)
"""Cells compute may take back while it has other work."""
TAKEN_IDLE = (CellState.OPEN, CellState.LOADING)
"""... and when it has none."""


@dataclass(frozen=True, slots=True)
class _Option:
    """Compute restores chunks up to ``chunk``, and that one below ``height``; seconds until the first token."""

    chunk: int
    height: int
    end_s: float


class ComputePointer:
    """Claims work for compute; a tile's chunks are continued where they were left."""

    def __init__(
        self,
        board: Board,
        boundaries: Boundaries,
        link: LinkSide,
        compute: ComputeSide,
        *,
        expected_levels_K: Callable[[float], tuple[int, ...]],
    ) -> None:
        """Start at the head of the plan's compute sequence; ``expected_levels_K`` is the link pointer's."""
        self._board, self._boundaries, self._link, self._compute = board, boundaries, link, compute
        self._expected_levels_K = expected_levels_K
        self._tile_index = 0

    def claim(self, now_s: float) -> ComputeClaim:
        """What compute does next, claimed; ``WAIT`` and ``DONE`` claim nothing."""
        tile = self._front(now_s)
        if (tile is None or self._leaves_cells_above(tile)) and self._take_back(now_s, idle=False):
            tile = self._front(now_s)
        if tile is not None:
            return self._claimed(ClaimKind.RECOMPUTE, tile, now_s)
        bottom = self._bottom()
        if bottom is not None:
            return self._claimed(ClaimKind.RECOMPUTE, bottom, now_s, kv_only=True)
        for _ in range(2):
            repair = self._repair()
            if repair is not None:
                return self._claimed(ClaimKind.REPAIR, repair[0], now_s, restart=repair[1])
            suffix = self._suffix(now_s)
            if suffix is not None:
                return suffix
            if not self._take_back(now_s, idle=True):
                break
        if self._board.num_missing == 0 and self._compute.suffix_done:
            return ComputeClaim(kind=ClaimKind.DONE)
        return ComputeClaim(kind=ClaimKind.WAIT)

    def _claimed(
        self, kind: ClaimKind, tile: Tile, now_s: float, *, restart: bool = False, kv_only: bool = False
    ) -> ComputeClaim:
        kv_only = kv_only or self._compute.kv_only_top(tile) or self._left_to_link(kind, tile, now_s)
        predicted_s = self._compute.claim(tile, kv_only=kv_only, repair=kind is ClaimKind.REPAIR, now_s=now_s)
        return ComputeClaim(kind=kind, tile=tile, restart=restart, kv_only_top=kv_only, predicted_s=predicted_s)

    def _left_to_link(self, kind: ClaimKind, tile: Tile, now_s: float) -> bool:
        """Whether what is open above a tile is expected to be the link's, and compute can be done with the chunk."""
        compute = self._compute
        if kind is not ClaimKind.RECOMPUTE or not compute.plan.kv_only_top:
            return False
        if tile.block_hi < compute.demand_K[tile.chunk_lo]:
            return False
        levels_K = self._expected_levels_K(now_s)
        return bool(levels_K) and levels_K[tile.chunk_lo] <= tile.block_hi

    def _ready(self, tile: Tile) -> bool:
        return all(map(self._boundaries.ready, range(tile.chunk_lo, tile.chunk_hi))) and all(
            self._board.head_ready(tile.chunk_lo, b) for b in range(tile.block_lo, tile.block_hi)
        )

    # The front.

    def _front(self, now_s: float) -> Tile | None:
        """The next part of the compute sequence; None when it is exhausted, not ready, or left to the link."""
        tile = self._front_tile()
        if tile is None:
            self._compute.stop()
            return None
        if not self._worth_computing(tile, now_s):
            self._compute.stop(self._compute.plan.balance_suffix)
            return None
        self._compute.stop(False)
        return tile if self._ready(tile) else None

    def _front_tile(self) -> Tile | None:
        sequence, share = self._compute.plan.compute_sequence, self._compute.plan.share
        while self._tile_index < len(sequence):
            tile = sequence[self._tile_index]
            if not all(map(self._boundaries.computable, range(tile.chunk_lo, tile.chunk_hi))):
                self._tile_index += 1
                continue
            if share is Share.LAYERS:
                part = self._next_blocks(tile)
                if part is not None:
                    return part
            elif all(self._board.is_open(*cell) for cell in tile.cells()) and self._continues(tile):
                return tile
            self._tile_index += 1
        return None

    def _next_blocks(self, tile: Tile) -> Tile | None:
        chunk, block = tile.chunk_lo, self._compute.climbed(tile.chunk_lo)
        if block is None or not (tile.block_lo <= block < tile.block_hi and self._board.is_open(chunk, block)):
            return None
        block_hi, limit = block + 1, min(tile.block_hi, block + self._blocks_at_once(chunk, block))
        while block_hi < limit and self._board.is_open(chunk, block_hi):
            block_hi += 1
        return Tile(chunk, chunk + 1, block, block_hi)

    def _blocks_at_once(self, chunk: int, block: int) -> int:
        """Blocks to claim at once: as many as last ``min_claim_s``, but a small share of what is still open."""
        factor = self._compute.rates.compute_factor
        cell_s = self._board.compute_s(chunk, block) * factor
        budget_s = min(self._compute.min_claim_s, self._board.open_compute_s * factor / CLAIM_SHARE)
        return max(1, int(budget_s / cell_s)) if cell_s > 0 else 1

    def _continues(self, tile: Tile) -> bool:
        return all(self._compute.climbed(chunk) == tile.block_lo for chunk in range(tile.chunk_lo, tile.chunk_hi))

    def _worth_computing(self, tile: Tile, now_s: float) -> bool:
        """Whether compute should take an open cell that the link could also bring."""
        board, link, compute = self._board, self._link, self._compute
        factor = compute.rates.compute_factor
        if link.down or compute.plan.share is not Share.LAYERS:
            return True
        cell_s = compute.predicted_s(tile, kv_only=compute.kv_only_top(tile)) * factor
        if compute.keeps_whole:
            if tile.block_lo > 0:
                return True
            cell_s = float(board.open_compute_K[tile.chunk_lo]) * factor
        open_bytes = board.open_bytes - compute.demanded_bytes()
        rest_s = link.load_s(open_bytes)
        if not compute.plan.balance_suffix:
            return rest_s >= compute.left_s(now_s) + cell_s
        suffix_s = compute.suffix_left_s()
        if bottom_row_pays(board, self._boundaries, link, compute):
            rest_s = link.load_s(open_bytes - board.bottom_bytes)
            suffix_s += compute.bottom_left_s()
        return rest_s + compute.top_suffix_s * factor > suffix_s + cell_s

    def _leaves_cells_above(self, tile: Tile) -> bool:
        """Whether the tile ends its chunk, activations and all, below cells that are open."""
        above = self._board.top_open_block(tile.chunk_lo, tile.block_hi, self._board.num_blocks)
        return above is not None and self._compute.kv_only_top(tile)

    # The bottom row, repairs and the suffix.

    def _bottom(self) -> Tile | None:
        """The next open cell of the bottom row, where that pays; it is computed for keys and values only."""
        if not bottom_row_pays(self._board, self._boundaries, self._link, self._compute):
            return None
        for chunk in range(self._board.num_chunks):
            is_open = self._compute.climbed(chunk) == 0 and self._board.is_open(chunk, 0)
            if is_open and self._boundaries.computable(chunk):
                tile = Tile(chunk, chunk + 1, 0, 1)
                return tile if self._ready(tile) else None
        return None

    def _repair(self) -> tuple[Tile, bool] | None:
        """The next block of the lowest chunk demanded of compute, and whether the chunk starts over."""
        compute = self._compute
        chunk = next(
            (
                chunk
                for chunk in range(self._board.num_chunks)
                if compute.demanded_open_block(chunk) is not None and self._boundaries.computable(chunk)
            ),
            None,
        )
        if chunk is None:
            return None
        demand, block = compute.demand_K[chunk], compute.climbed(chunk)
        lowest_open = next(b for b in range(demand) if self._board.is_open(chunk, b))
        restart = block is None or block > lowest_open
        if restart and self._board.has_passed(chunk, demand):
            compute.start_over(demand)
            return self._repair()
        block = 0 if block is None or restart else block
        tile = Tile(chunk, chunk + 1, block, block + 1)
        return (tile, restart) if self._ready(tile) else None

    def _suffix(self, now_s: float) -> ComputeClaim | None:
        board, compute = self._board, self._compute
        restored = board.num_missing == 0
        after_restore = compute.plan.suffix_start is SuffixStart.AFTER_RESTORE
        if not compute.problem.grid.suffix_ends or (after_restore and not restored):
            return None
        block_lo = block_hi = compute.suffix_next
        limit = board.num_blocks if restored else min(block_lo + 1, board.num_blocks)
        end_s = compute.suffix_from_s(block_lo) - SUFFIX_CLAIM_S
        while block_hi < limit and board.row_resident(block_hi):
            block_hi += 1
            if block_hi < limit and compute.suffix_from_s(block_hi + 1) < end_s:
                break
        return None if block_hi == block_lo else compute.claim_suffix(block_hi, now_s)

    # Taking back.

    def _take_back(self, now_s: float, *, idle: bool) -> bool:
        """Demand of compute what it is expected to restore sooner than the link; whether there is anything.

        Args:
            now_s: Seconds on the driver's clock, the same one for every call.
            idle: Compute has nothing else to do: take over reads under way too.
        """
        board, link, compute = self._board, self._link, self._compute
        if link.phase is not LinkPhase.CLIMBING or board.recurrent:
            return False
        bottom = bottom_row_pays(board, self._boundaries, link, compute)
        compute_s, left_bytes = compute.left_s(now_s) + compute.suffix_left_s(), board.open_bytes
        if bottom:
            compute_s, left_bytes = compute_s + compute.bottom_left_s(), left_bytes - board.bottom_bytes
        top_s = compute.top_suffix_s * compute.rates.compute_factor
        if (link.load_s(left_bytes) + top_s) * RECLAIM_GAIN <= compute_s:
            return False
        left_bytes -= compute.demanded_bytes()
        compute_s += compute.repair_left_s()
        waits_s = max(link.load_s(left_bytes) - link.oldest_read_s() + top_s, compute_s)
        states = TAKEN_IDLE if idle else TAKEN
        best = self._best(compute_s, left_bytes, states=states, lowest=1 if bottom else 0)
        if best is None or best.end_s >= RECLAIM_GAIN * waits_s:
            return False
        demanded = [
            self._demand(chunk, best.height if chunk == best.chunk else board.num_blocks, states)
            for chunk in range(best.chunk + 1)
        ]
        return any(demanded)

    def _demand(self, chunk: int, height: int, states: tuple[CellState, ...]) -> bool:
        """Demand the missing cells of a chunk below ``height``, unless compute's sequence goes through all of them."""
        board, compute = self._board, self._compute
        missing = [block for block in range(height) if board.state(chunk, block) in states]
        if not missing or all(board.is_open(chunk, b) for b in range(compute.start_block(chunk), missing[-1] + 1)):
            return False
        compute.demand(chunk, missing[-1] + 1)
        for block in missing:
            board.set(chunk, block, CellState.OPEN)  # a read of it may still come first
        return True

    def _best(
        self, compute_s: float, left_bytes: float, *, states: tuple[CellState, ...], lowest: int
    ) -> _Option | None:
        """The option with the earliest end.

        Args:
            compute_s: Seconds compute needs for everything but the options, suffix included.
            left_bytes: Open bytes that nobody is to restore yet.
            states: Cells that may be taken.
            lowest: Blocks below it are restored anyway.
        """
        board, link, compute = self._board, self._link, self._compute
        factor = compute.rates.compute_factor
        top_s = compute.top_suffix_s * factor
        best: _Option | None = None
        num_reads = board.num_in(CellState.LOADING)
        for chunk in range(board.num_chunks):
            demand = max(compute.demand_K[chunk], lowest)
            missing = [block for block in range(demand, board.num_blocks) if board.state(chunk, block) in states]
            if not missing:
                continue
            demanded = compute.demanded_open_block(chunk) is not None
            start = compute.demand_K[chunk] if demanded else compute.start_block(chunk)
            for block in range(start, missing[-1] + 1):
                state = board.state(chunk, block)
                if block >= demand and state in states:
                    if state is CellState.OPEN:
                        left_bytes -= board.load_bytes(chunk, block)
                    else:
                        num_reads -= 1
                    last_s = board.compute_s(chunk, block)
                    if block == missing[-1]:
                        last_s = float(compute.problem.kv_only_KB[chunk, block])
                    # Reads come in order: only when none of them is waited for do they not hold up the end.
                    waited = num_reads > 0 or left_bytes > 0
                    link_s = link.load_s(left_bytes) - link.oldest_read_s() + top_s if waited else 0.0
                    end_s = max(compute_s + last_s * factor, link_s)
                    if best is None or end_s < best.end_s:
                        best = _Option(chunk, block + 1, end_s)
                compute_s += board.compute_s(chunk, block) * factor
            if best is not None and compute_s > best.end_s:
                break
        return best


def bottom_row_pays(board: Board, boundaries: Boundaries, link: LinkSide, compute: ComputeSide) -> bool:
    """Whether compute restores what is open of the bottom row sooner than the link would; the suffix needs it."""
    if not compute.plan.bottom_row_by_compute or link.down or boundaries.needed or board.recurrent:
        return False
    return compute.bottom_left_s() < board.bottom_bytes / link.bytes_per_s
