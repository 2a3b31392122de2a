"""Compute's side of one restoration: what it was asked to do, how far it has climbed, and what is left for it alone.

Compute climbs a chunk from its bottom block, because a block needs the activations of the one below; what it has
climbed stays usable until the chunk's top was recomputed for keys and values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cacheflow.plan.grid import Cell, Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import SpanKind
from cacheflow.state.board import Board, CellState


class ClaimKind(Enum):
    """What compute is to do next."""

    RECOMPUTE = "recompute"
    REPAIR = "repair"
    """Recompute what the link failed to deliver, or what compute took back from it."""
    SUFFIX = "suffix"
    WAIT = "wait"
    """Nothing to do until a load ends or time passes."""
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeClaim:
    """What compute does next.

    Attributes:
        kind: What to do.
        tile: The cells, for ``RECOMPUTE`` and ``REPAIR``.
        restart: The chunk of ``tile`` starts over at block 0.
        kv_only_top: The tile's top block needs keys and values only.
        block_lo: First block, for ``SUFFIX``.
        block_hi: One past the last block, for ``SUFFIX``.
        predicted_s: What the profile expects it to take, uncorrected.
    """

    kind: ClaimKind
    tile: Tile | None = None
    restart: bool = False
    kv_only_top: bool = False
    block_lo: int = 0
    block_hi: int = 0
    predicted_s: float = 0.0

    def span_kind(self, tile: Tile, *, kv_only: bool) -> SpanKind:
        """What a part of it counts as, on record."""
        if self.kind is ClaimKind.SUFFIX:
            return SpanKind.SUFFIX
        if self.kind is ClaimKind.REPAIR:
            return SpanKind.REPAIR
        return SpanKind.KV_ONLY if kv_only and tile.block_hi - tile.block_lo == 1 else SpanKind.RECOMPUTE


class ComputeSide:
    """What compute has done and has under way, and estimates of what is left for it.

    Attributes:
        problem: What the restoration costs.
        plan: Sequences and rules.
        rates: How fast compute and the link really are.
        min_claim_s: Claim several blocks at once until they last this long; 0 claims one at a time.
        demand_K: Per chunk, the number of bottom blocks that only compute may restore (a load of one of them failed,
            or compute took the chunk back from a slow link); 0 for none.
        stopped: Compute has left the open cells to the link.
        keeps_whole: Compute recomputes a chunk whole or not at all: the stage above is handed it.
        top_suffix_s: Predicted seconds of the suffix in the top block, head included.
        suffix_next: Lowest block the suffix has not been claimed through.
        others_s: Seconds of compute that other restorations come first with.
        num_repaired: Cells claimed because the link did not bring them.
    """

    def __init__(
        self, problem: RestoreProblem, plan: RestorePlan, rates: LiveRates, board: Board, *, min_claim_s: float
    ) -> None:
        """Start with nothing done."""
        self.problem, self.plan, self.rates, self.min_claim_s = problem, plan, rates, min_claim_s
        self._board = board
        self.demand_K = [0] * board.num_chunks
        self.stopped = not plan.compute_sequence
        self.keeps_whole = False
        self.suffix_next = 0
        self.others_s = 0.0
        self.num_repaired = 0
        self._climbed_K: list[int | None] = [0] * board.num_chunks
        self._has_suffix = bool(problem.grid.suffix_ends)
        self.top_suffix_s = float(problem.suffix_B[-1]) + problem.head_s
        self._suffix_from_B: list[float] = [*problem.suffix_B[::-1].cumsum()[::-1].tolist(), 0.0]
        self._claim_s = self._claimed_at_s = 0.0
        self._asked_s = self._asked_at_s = 0.0

    # What is under way.

    def begin(self, predicted_s: float, now_s: float) -> None:
        """Note that compute works on something expected to take ``predicted_s`` (uncorrected)."""
        self._claim_s, self._claimed_at_s = predicted_s, now_s

    def end(self, claim: ComputeClaim) -> None:
        """Note that compute is free, and that the claim's cells are resident."""
        self._claim_s = 0.0
        if claim.tile is not None:
            for chunk, block in claim.tile.cells():
                if self._board.state(chunk, block) is CellState.COMPUTING:
                    self._board.set(chunk, block, CellState.COMPUTED)

    def ask(self, predicted_s: float, now_s: float) -> None:
        """Note work (uncorrected seconds) that workers were given, after what they were given before."""
        if self._asked_s <= 0.0:
            self._asked_at_s = now_s
        self._asked_s += predicted_s

    def note_done(self, predicted_s: float, now_s: float) -> None:
        """Note that workers have done what they were given; what comes after it counts as begun now."""
        self._asked_s = max(0.0, self._asked_s - predicted_s)
        self._asked_at_s = now_s

    def left_s(self, now_s: float) -> float:
        """Corrected seconds until compute has done what it works on and what workers were given."""
        factor = self.rates.compute_factor
        claim_s = max(0.0, self._claim_s * factor - (now_s - self._claimed_at_s))
        asked_s = max(0.0, self._asked_s * factor - (now_s - self._asked_at_s))
        return claim_s + asked_s + self.others_s

    def yield_to(self, others_s: float) -> None:
        """Note how many seconds of compute other restorations come first with."""
        self.others_s = others_s

    # The front.

    def stop(self, stopped: bool = True) -> None:
        """Leave the open cells to the link, or go on with them."""
        self.stopped = stopped

    def keep_whole(self, wanted: bool) -> None:
        """Recompute chunks whole or not at all from now on, because the stage above is handed them; False: any part."""
        self.keeps_whole = wanted

    def climbed(self, chunk: int) -> int | None:
        """The block at which compute can continue a chunk; None when it must start over."""
        return self._climbed_K[chunk]

    def has_begun(self, chunk: int) -> bool:
        """Whether a chunk was begun and can be continued."""
        return bool(self._climbed_K[chunk])

    def start_block(self, chunk: int) -> int:
        """Block at which compute has to start to restore what is open of a chunk."""
        block = self._climbed_K[chunk]
        return 0 if block is None or self._board.top_open_block(chunk, 0, block) is not None else block

    def kv_only_top(self, tile: Tile) -> bool:
        """Whether nothing will be recomputed above the tile, so that its top needs keys and values only."""
        if not self.plan.kv_only_top:
            return False
        if tile.block_hi == self._board.num_blocks:
            return True
        above_open = any(self._board.is_open(chunk, tile.block_hi) for chunk in range(tile.chunk_lo, tile.chunk_hi))
        return not above_open and tile.block_hi >= self.demand_K[tile.chunk_lo]

    def claim(self, tile: Tile, *, kv_only: bool, repair: bool, now_s: float) -> float:
        """Mark a tile as being computed; returns its predicted seconds (uncorrected)."""
        for chunk, block in tile.cells():
            state = self._board.state(chunk, block)
            self.num_repaired += repair and state is CellState.OPEN
            if state in (CellState.OPEN, CellState.LOADING):
                self._board.set(chunk, block, CellState.COMPUTING)
        for chunk in range(tile.chunk_lo, tile.chunk_hi):
            self._climbed_K[chunk] = None if kv_only else tile.block_hi
        predicted_s = self.predicted_s(tile, kv_only=kv_only)
        self.begin(predicted_s, now_s)
        return predicted_s

    def predicted_s(self, tile: Tile, *, kv_only: bool) -> float:
        """Seconds a tile is expected to take, uncorrected."""
        seconds, problem = 0.0, self.problem
        for chunk, block in tile.cells():
            cost_KB = problem.kv_only_KB if kv_only and block == tile.block_hi - 1 else problem.compute_KB
            seconds += float(cost_KB[chunk, block])
        return seconds

    # What only compute may restore.

    def demand(self, chunk: int, num_blocks: int) -> None:
        """Leave a chunk's first blocks to compute alone."""
        self.demand_K[chunk] = max(self.demand_K[chunk], num_blocks)

    def release(self, chunk: int, num_blocks: int) -> None:
        """Leave no more than a chunk's first blocks to compute alone."""
        self.demand_K[chunk] = num_blocks

    def demanded_open_block(self, chunk: int) -> int | None:
        """Highest open block that only compute may restore in a chunk; None when there is none."""
        demand = self.demand_K[chunk]
        return self._board.top_open_block(chunk, 0, demand) if demand else None

    def demanded_bytes(self) -> float:
        """Bytes of the open cells that only compute may restore."""
        board = self._board
        return float(
            sum(
                board.load_bytes(chunk, block)
                for chunk, demand in enumerate(self.demand_K)
                for block in range(demand)
                if board.is_open(chunk, block)
            )
        )

    def must_pass(self, cell: Cell) -> bool:
        """Whether compute must pass a cell for the running state of a recurrent block, whatever the link brings."""
        return cell.block < self._board.recurrent_blocks(self.demand_K[cell.chunk])

    def repair_left_s(self) -> float:
        """Corrected seconds to recompute the chunks demanded of compute."""
        total = 0.0
        for chunk, demand in enumerate(self.demand_K):
            if demand:
                top = self.demanded_open_block(chunk)
                if top is not None:
                    blocks = range(self.start_block(chunk), top + 1)
                    total += sum(self._board.compute_s(chunk, block) for block in blocks)
        return total * self.rates.compute_factor

    def start_over(self, num_blocks: int) -> None:
        """Recompute the recurrent blocks below ``num_blocks`` from chunk 0 again: their states are past a chunk."""
        demanded = max(chunk for chunk, demand in enumerate(self.demand_K) if demand)
        for chunk in range(self._board.rewind(demanded + 1, num_blocks)):
            self._climbed_K[chunk] = 0 if self._climbed_K[chunk] == 0 else None
            block = self._board.top_open_block(chunk, 0, num_blocks)
            if block is not None:
                self.demand(chunk, block + 1)

    # The suffix.

    @property
    def suffix_done(self) -> bool:
        """Whether the new tokens, if there are any, were claimed through every block."""
        return not self._has_suffix or self.suffix_next == self._board.num_blocks

    def suffix_left_s(self) -> float:
        """Corrected seconds of suffix work, head included, that has not been claimed yet."""
        return self.suffix_from_s(self.suffix_next)

    def suffix_from_s(self, block: int) -> float:
        """Corrected seconds of the suffix from a block to the first token."""
        return (self._suffix_from_B[block] + self.problem.head_s) * self.rates.compute_factor

    def claim_suffix(self, block_hi: int, now_s: float) -> ComputeClaim:
        """Claim the suffix up to a block."""
        block_lo, self.suffix_next = self.suffix_next, block_hi
        predicted_s = float(self.problem.suffix_B[block_lo:block_hi].sum())
        self.begin(predicted_s, now_s)
        return ComputeClaim(kind=ClaimKind.SUFFIX, block_lo=block_lo, block_hi=block_hi, predicted_s=predicted_s)

    # The bottom row.

    def bottom_left_s(self) -> float:
        """Corrected seconds to recompute the keys and values of what is open of the bottom row."""
        return self._board.bottom_compute_s * self.rates.compute_factor
