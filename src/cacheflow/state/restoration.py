"""The state machine of one restoration: two pointers over one grid.

Pure: no clock, no threads. Whoever drives it (threads in the embedded engine, engine steps in vLLM, a virtual clock
in the simulator) passes the time in and holds one lock around every call. A load is claimed, then *placed* (its bytes
verified and about to be copied into the KV buffer), then complete; compute may take a cell back until it is placed.
"""

from __future__ import annotations

from collections import Counter

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, SuffixStart
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.remaining import Remaining
from cacheflow.state.board import CellState
from cacheflow.state.boundary_events import BoundaryEvents
from cacheflow.state.claims import ClaimKind, ComputeClaim
from cacheflow.state.compute_side import ComputeSide
from cacheflow.state.link_side import LinkSide
from cacheflow.state.progress import Progress
from cacheflow.state.remaining import expected_left_s, remaining, whole_chunks_s
from cacheflow.state.take_back import take_back
from cacheflow.types import LoadOutcome

SUFFIX_CLAIM_S = 0.05
"""New tokens are claimed so many seconds of blocks at once, so that a request that comes first waits no longer."""
MAX_FAILED_IN_ROW = 4
"""After this many failed reads in a row the link counts as down and compute restores the rest."""


class RestoreState:
    """Which cells are claimed, under way, done or failed, by whom; answers what each side does next.

    Attributes:
        outcomes: Number of loads by outcome.
        wasted_bytes: Bytes that were read but not used.
        boundary: The boundary states of a later pipeline stage.
        num_repaired: Cells recomputed because the link did not deliver them.
    """

    def __init__(
        self,
        problem: RestoreProblem,
        plan: RestorePlan,
        rates: LiveRates,
        *,
        min_claim_s: float = 0.0,
        source: BoundarySource = BoundarySource.FIRST_STAGE,
    ) -> None:
        """Open every cell.

        Args:
            problem: What the restoration costs.
            plan: Orders and rules, of the same grid.
            rates: Corrected as the restoration goes; may be carried from one restoration to the next.
            min_claim_s: Let compute claim several blocks at once until they last this long (asynchronous devices).
            source: Where the activations below the bottom block come from.
        """
        self.problem, self.plan, self.rates = problem, plan, rates
        self.outcomes: Counter[LoadOutcome] = Counter()
        self.wasted_bytes = 0
        self.num_repaired = 0
        self._p = Progress(problem, plan, rates, min_claim_s=min_claim_s, source=source)
        self._compute = ComputeSide(self._p)
        self._load = LinkSide(self._p)
        self.boundary = BoundaryEvents(self._p, self._load)
        self._failed_in_row = 0
        self._num_placing = 0
        if self._p.link_down:
            self._demand_all()

    @property
    def restored(self) -> bool:
        """Whether every prefix cell is resident."""
        return self._p.board.num_missing == 0

    @property
    def loads_possible(self) -> bool:
        """Whether the load pointer may still claim a cell, now or later."""
        return not self._p.link_down and self._p.board.num_missing > 0

    @property
    def limit(self) -> int:
        """From this chunk on nothing is restored any more: a cell of it can neither be loaded nor recomputed."""
        return self._p.limit

    def cell(self, chunk: int, block: int) -> CellState:
        """State of one cell."""
        return self._p.board.state(chunk, block)

    def claim_compute(self, now_s: float) -> ComputeClaim:
        """What compute does next; claims its cells.

        Args:
            now_s: Seconds since the restoration started.
        """
        self._p.note_time(now_s)
        tile = self._compute.front(now_s)
        if (tile is None or self._compute.leaves_behind(tile)) and take_back(self._p, now_s, idle=False):
            tile = self._compute.front(now_s)
        if tile is not None:
            return self._claim_tile(ClaimKind.RECOMPUTE, tile, restart=False, now_s=now_s)
        bottom = self._compute.bottom()
        if bottom is not None:
            return self._claim_tile(ClaimKind.RECOMPUTE, bottom, restart=False, now_s=now_s, kv_only=True)
        for _ in range(2):
            repair = self._compute.repair()
            if repair is not None:
                return self._claim_tile(ClaimKind.REPAIR, repair[0], restart=repair[1], now_s=now_s)
            suffix = self._claim_suffix(now_s)
            if suffix is not None:
                return suffix
            if not take_back(self._p, now_s, idle=True):
                break
        suffix_done = not self._p.has_suffix or self._p.suffix_next == self._p.board.num_blocks
        if self.restored and suffix_done:
            return ComputeClaim(kind=ClaimKind.DONE)
        self._leave_no_deadlock()
        return ComputeClaim(kind=ClaimKind.WAIT)

    def _leave_no_deadlock(self) -> None:
        """With compute waiting and nothing under way, one side must be made to move, whatever the rates say."""
        if self._p.in_flight_bytes or self._num_placing:
            return
        self._p.compute_stopped = True
        if self._p.link_down:
            self._demand_all()

    def _claim_tile(
        self, kind: ClaimKind, tile: Tile, *, restart: bool, now_s: float, kv_only: bool = False
    ) -> ComputeClaim:
        kv_only = kv_only or self._compute.kv_only_top(tile)
        if kind is ClaimKind.REPAIR:
            self.num_repaired += sum(self._p.board.is_open(*cell) for cell in tile.cells())
        predicted_s = self._compute.claim(tile, kv_only=kv_only)
        self._p.begin_compute(predicted_s, now_s)
        return ComputeClaim(kind=kind, tile=tile, restart=restart, kv_only_top=kv_only, predicted_s=predicted_s)

    def _claim_suffix(self, now_s: float) -> ComputeClaim | None:
        p = self._p
        if not p.has_suffix or (p.plan.suffix_start is SuffixStart.AFTER_RESTORE and not self.restored):
            return None
        block_lo = block_hi = p.suffix_next
        limit = p.board.num_blocks if self.restored else min(block_lo + 1, p.board.num_blocks)
        end_s = p.suffix_from_s(block_lo) - SUFFIX_CLAIM_S
        while block_hi < limit and p.board.row_resident(block_hi):
            block_hi += 1
            if block_hi < limit and p.suffix_from_s(block_hi + 1) < end_s:
                break
        if block_hi == block_lo:
            return None
        p.suffix_next = block_hi
        predicted_s = float(self.problem.suffix_B[block_lo:block_hi].sum())
        p.begin_compute(predicted_s, now_s)
        return ComputeClaim(kind=ClaimKind.SUFFIX, block_lo=block_lo, block_hi=block_hi, predicted_s=predicted_s)

    def complete_compute(self, claim: ComputeClaim, *, actual_s: float) -> None:
        """Note that compute did what it was ordered to; its cells become resident."""
        self._p.end_compute()
        self.rates.observe_compute(predicted_s=claim.predicted_s, actual_s=actual_s)
        self._make_resident(claim)

    def assume_compute(self, claim: ComputeClaim, now_s: float) -> None:
        """Count a claim as done that was only ordered, for workers that carry out their orders strictly in order.

        Whatever compute claims next may build on its cells. Its seconds stay ahead of compute until ``note_computed``.
        """
        self._p.end_compute()
        self._p.order_compute(claim.predicted_s, now_s)
        self._make_resident(claim)

    def note_computed(self, now_s: float, *, predicted_s: float, actual_s: float) -> None:
        """Note that ordered work, or a part of it, was done after all; the cells were resident already."""
        self._p.report_compute(predicted_s, now_s)
        self.rates.observe_compute(predicted_s=predicted_s, actual_s=actual_s)

    def _make_resident(self, claim: ComputeClaim) -> None:
        if claim.tile is not None:
            for chunk, block in claim.tile.cells():
                if self._p.board.state(chunk, block) is CellState.COMPUTING:
                    self._p.board.set(chunk, block, CellState.COMPUTED)

    def claim_load(self, now_s: float) -> Tile | None:
        """Claim one cell for the link; None when the link should wait or has nothing left.

        Args:
            now_s: Seconds since the restoration started.
        """
        self._p.note_time(now_s)
        cell = self._load.claim(now_s)
        if cell is None:
            return None
        self._p.begin_load(self._p.board.load_bytes(*cell))
        chunk, block = cell
        return Tile(chunk, chunk + 1, block, block + 1)

    def expected_load_s(self) -> float:
        """Seconds until everything in flight should have arrived."""
        return self._p.link_s(0) - self._p.others_link_s

    def expected_left_s(self, now_s: float) -> float:
        """Seconds to the end of the restoration if compute and link shared what is open so as to end together."""
        return expected_left_s(self._p, now_s)

    def keep_whole(self, wanted: bool) -> None:
        """Recompute chunks whole or not at all from now on, because the stage above is handed them; False: any part."""
        self._p.keeps_whole = wanted

    def whole_chunks_s(self, now_s: float) -> list[float]:
        """Seconds until compute should be through with each chunk; infinite where the link has a part of it."""
        return whole_chunks_s(self._p, now_s)

    def remaining(self, now_s: float) -> Remaining:
        """What is left to do, for whoever chooses among several restorations."""
        return remaining(self._p, now_s)

    def yield_to(self, *, compute_s: float, link_s: float) -> None:
        """Note how many seconds of compute and of the link other restorations come first with."""
        self._p.others_compute_s, self._p.others_link_s = compute_s, link_s

    def begin_place(self, tile: Tile) -> bool:
        """Take a verified read on to the KV buffer; False when compute is at or through the cell: drop the bytes."""
        chunk, block = tile.chunk_lo, tile.block_lo
        num_bytes = self._p.board.load_bytes(chunk, block)
        self._p.end_load(num_bytes)
        self._failed_in_row = 0
        self.outcomes[LoadOutcome.OK] += 1
        if self._p.board.state(chunk, block) not in (CellState.LOADING, CellState.OPEN):
            self.wasted_bytes += num_bytes
            return False
        self._p.board.set(chunk, block, CellState.PLACING)
        self._num_placing += 1
        return True

    def complete_load(self, tile: Tile) -> None:
        """Note that a placed cell is resident."""
        self._num_placing -= 1
        self._p.board.set(tile.chunk_lo, tile.block_lo, CellState.LOADED)

    def fail_load(self, tile: Tile, outcome: LoadOutcome) -> None:
        """Note that a read gave nothing usable: the cell, and what lies below it, falls to compute."""
        p, chunk, block = self._p, tile.chunk_lo, tile.block_lo
        num_bytes = p.board.load_bytes(chunk, block)
        p.end_load(num_bytes)
        self.outcomes[outcome] += 1
        if outcome is LoadOutcome.CORRUPT:
            self.wasted_bytes += num_bytes
        self._failed_in_row += 1
        # Open: demanded of compute, which has not got there.
        if p.board.state(chunk, block) in (CellState.LOADING, CellState.OPEN):
            self._leave_to_compute(chunk, block)
            self.boundary.find_limit()
        if self._failed_in_row >= MAX_FAILED_IN_ROW:
            self.close_link()

    def drop_load(self, tile: Tile) -> None:
        """Note that a read was given up on purpose: no fault of the link; its bytes moved for nothing or not at all.

        A cell that nobody has taken over falls to compute.
        """
        p, chunk, block = self._p, tile.chunk_lo, tile.block_lo
        p.end_load(p.board.load_bytes(chunk, block))
        self.outcomes[LoadOutcome.CANCELLED] += 1
        if p.board.state(chunk, block) is CellState.LOADING:
            self._leave_to_compute(chunk, block)
            self.boundary.find_limit()

    def _leave_to_compute(self, chunk: int, block: int) -> None:
        self._p.board.set(chunk, block, CellState.OPEN)
        for blocks_K in (self._p.demand_K, self._p.failed_K):
            blocks_K[chunk] = max(blocks_K[chunk], block + 1)

    def fail_place(self, tile: Tile) -> None:
        """Note that a verified read could not be copied into the KV buffer: the cell falls to compute."""
        self._num_placing -= 1
        self.outcomes[LoadOutcome.ERROR] += 1
        self._leave_to_compute(tile.chunk_lo, tile.block_lo)
        self.boundary.find_limit()

    def close_link(self) -> None:
        """Stop loading; what is in flight may still arrive, compute restores the rest."""
        self._p.link_down = self._p.link_closed = True
        self._load.release()
        self._demand_all()
        self.boundary.find_limit()

    def _demand_all(self) -> None:
        for chunk in range(self._p.board.num_chunks):
            top = self._p.board.top_open_block(chunk, 0, self._p.board.num_blocks)
            for blocks_K in (self._p.demand_K, self._p.failed_K):
                blocks_K[chunk] = max(blocks_K[chunk], top + 1)
