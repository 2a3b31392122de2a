"""The state machine of one restoration: two pointers over one grid.

Pure: no clock, no threads. Its driver (threads in the embedded engine, engine steps in vLLM, a virtual clock
in the simulator) passes the time in and holds one lock around every call. A read is claimed, then *placed* (its bytes
verified and about to be copied to where compute finds them), then complete; compute may take a cell back until it is
placed. A read brings a ``Cell`` or the ``Boundary`` states of a chunk; both go the same way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Sequence

from cacheflow.plan.grid import Boundary, Cell, Piece
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.read_window import ReadSample
from cacheflow.plan.remaining import NO_LINK_S, Remaining
from cacheflow.plan.report import RestoreReport, Span
from cacheflow.state.board import Board, Boundaries, BoundaryState, CellState
from cacheflow.state.compute_pointer import ComputePointer
from cacheflow.state.compute_side import ClaimKind, ComputeClaim, ComputeSide
from cacheflow.state.link_pointer import LinkPointer
from cacheflow.state.link_side import LinkPhase, LinkSide
from cacheflow.types import LoadOutcome

MAX_FAILED_IN_ROW = 4
"""After this many failed reads in a row the link counts as down and compute restores the rest."""
WHOLE_MARGIN = 1.15
"""A chunk that ends so much later than both sides should, or two cells, may still be compute's. What turns out
otherwise is put right as soon as the link has a cell of it."""


class RestoreState:
    """Which cells are claimed, under way, done or failed, by whom; answers what each side does next.

    Its parts (board, boundaries, link, compute) are to be asked by anybody, and changed by it and its pointers alone.

    Attributes:
        problem: What the restoration costs.
        plan: Sequences and rules.
        rates: How fast compute and the link really are.
        board: Where every cell stands.
        boundaries: Where the boundary states of every chunk stand.
        link: What the link has under way, and has failed to bring.
        compute: What compute has under way, and what is left to it alone.
        outcomes: Number of reads of cells by outcome.
        wasted_bytes: Bytes that were read but not used.
        boundary_bytes: Bytes of boundary states that arrived.
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
            plan: Sequences and rules, of the same grid.
            rates: Corrected as the restoration goes; may be carried from one restoration to the next.
            min_claim_s: Let compute claim several blocks at once until they last this long (asynchronous devices).
            source: Where the activations below the bottom block come from.
        """
        self.problem, self.plan, self.rates = problem, plan, rates
        self.outcomes: Counter[LoadOutcome] = Counter()
        self.wasted_bytes = 0
        self.boundary_bytes = 0
        self.board = Board(problem)
        self.boundaries = Boundaries(self.board, problem, source)
        self.link = LinkSide(plan, rates, problem.grid.num_chunks)
        self.compute = ComputeSide(problem, plan, rates, self.board, min_claim_s=min_claim_s)
        sides = (self.board, self.boundaries, self.link, self.compute)
        self._link_pointer = LinkPointer(*sides)
        self._compute_pointer = ComputePointer(*sides, expected_levels_K=self._link_pointer.expected_levels_K)
        self._failed_in_row = 0
        self._given_to_link: set[int] = set()
        if self.link.down:
            self._demand_all()

    # What there is.

    @property
    def restored(self) -> bool:
        """Whether every prefix cell is resident."""
        return self.board.num_missing == 0

    def num_bytes(self, piece: Piece) -> int:
        """Bytes that a read of a piece takes of the link."""
        if isinstance(piece, Boundary):
            return self.boundaries.num_bytes(piece.chunk)
        return self.board.load_bytes(*piece)

    def tier(self, piece: Piece) -> int | None:
        """Number of the store that a piece comes from; boundary states come from no tier."""
        return None if isinstance(piece, Boundary) else self.board.tier(*piece)

    @property
    def loads_possible(self) -> bool:
        """Whether a cell may still be claimed for the link, now or later."""
        return not self.link.down and not self.restored

    # Compute.

    def claim_compute(self, now_s: float) -> ComputeClaim:
        """What compute does next; claims its cells.

        Args:
            now_s: Seconds on the driver's clock, the same one for every call.
        """
        self.link.note_time(now_s)
        claim = self._compute_pointer.claim(now_s)
        if claim.kind is ClaimKind.WAIT and not (self.link.in_flight_bytes or self.link.num_placing):
            # Compute waits and nothing is under way: one side must be made to move, whatever the rates say.
            self.compute.stop()
            if self.link.down:
                self._demand_all()
        return claim

    def complete_compute(self, claim: ComputeClaim, *, actual_s: float) -> None:
        """Note that compute did what it claimed; its cells become resident."""
        self.rates.observe_compute(predicted_s=claim.predicted_s, actual_s=actual_s)
        self.compute.end(claim)

    def assume_compute(self, claim: ComputeClaim, now_s: float) -> None:
        """Count a claim as done that workers were only given, because they carry out their work strictly in sequence.

        Whatever compute claims next may build on its cells. Its seconds stay ahead of compute until ``note_computed``.
        """
        self.compute.ask(claim.predicted_s, now_s)
        self.compute.end(claim)

    def note_computed(self, now_s: float, *, predicted_s: float, actual_s: float) -> None:
        """Note that assumed work, or a part of it, was done after all; the cells were resident already."""
        self.compute.note_done(predicted_s, now_s)
        self.rates.observe_compute(predicted_s=predicted_s, actual_s=actual_s)

    # Reads.

    def claim_load(self, now_s: float, busy: Container[int] = ()) -> Cell | None:
        """Claim one cell for the link; None when the link should wait or has nothing left.

        Args:
            now_s: Seconds on the driver's clock, the same one for every call.
            busy: Tiers that have enough to do: their cells are passed over.
        """
        self.link.note_time(now_s)
        cell = self._link_pointer.claim(now_s, busy)
        if cell is not None:
            self.link.begin_read(self.board.load_bytes(*cell), tier=self.tier(cell))
        return cell

    def claim_boundary(self, now_s: float) -> Boundary | None:
        """Claim the boundary states the link reads next; None when none are due or wanted.

        To be asked before ``claim_load``: compute waits for nothing else of the link.

        Args:
            now_s: Seconds on the driver's clock, the same one for every call.
        """
        self.link.note_time(now_s)
        boundary = self._link_pointer.claim_boundary(now_s)
        if boundary is not None:
            self.link.begin_read(self.boundaries.num_bytes(boundary.chunk))
        return boundary

    def claim_read(self, now_s: float, busy: Container[int] = ()) -> Piece | None:
        """Claim what the link reads next, boundary states first; None when it should wait or has nothing left."""
        return self.claim_boundary(now_s) or self.claim_load(now_s, busy)

    def observe_read(self, piece: Piece, *, num_bytes: int, busy_s: float, sample: ReadSample | None = None) -> None:
        """Take in how long the link worked on a read that moved ``num_bytes``, and what that told of the store.

        What comes from a slow tier counts for as many bytes as the link would have brought meanwhile.
        """
        tier = self.tier(piece)
        if sample is not None and tier is not None:
            self.rates.windows[tier].learn(sample)
        if not isinstance(piece, Boundary):
            num_bytes = round(num_bytes * self.board.load_bytes(*piece) / max(1, self.board.moved_bytes(*piece)))
        self.rates.observe_load(num_bytes=num_bytes, busy_s=busy_s)

    def begin_place(self, piece: Piece) -> bool:
        """Take a verified read on to where compute finds it; False when it is not wanted any more: drop the bytes."""
        num_bytes = self.num_bytes(piece)
        self.link.end_read(num_bytes, tier=self.tier(piece))
        if isinstance(piece, Boundary):
            self.boundary_bytes += num_bytes
            wanted = self.boundaries.state(piece.chunk) is BoundaryState.READING
        else:
            self._failed_in_row = 0
            self.outcomes[LoadOutcome.OK] += 1
            still_open = self.board.state(*piece) in (CellState.LOADING, CellState.OPEN)
            wanted = still_open and not self.compute.must_pass(piece)
            if wanted:
                self.board.set(*piece, CellState.PLACING)
            else:
                self.wasted_bytes += self.board.moved_bytes(*piece)
        if wanted:
            self.link.begin_place()
        return wanted

    def complete_load(self, piece: Piece, now_s: float) -> None:
        """Note that a placed read is where compute finds it."""
        self.link.end_place()
        if isinstance(piece, Boundary):
            self.boundaries.complete(piece.chunk, now_s)
            return
        self.board.set(*piece, CellState.OPEN if self.compute.must_pass(piece) else CellState.LOADED)

    def fail_load(self, piece: Piece, outcome: LoadOutcome) -> None:
        """Note that a read gave nothing usable.

        A cell, and what lies below it, falls to compute. Without its boundary states a chunk, and all after it, are
        left to the link.
        """
        if isinstance(piece, Boundary):
            self.drop_load(piece)
            return
        self.link.end_read(self.board.load_bytes(*piece), tier=self.tier(piece))
        self.outcomes[outcome] += 1
        if outcome is LoadOutcome.CORRUPT:
            self.wasted_bytes += self.board.moved_bytes(*piece)
        self._failed_in_row += 1
        # Open: demanded of compute, which has not got there.
        if self.board.state(*piece) in (CellState.LOADING, CellState.OPEN):
            self._leave_to_compute(piece)
        if self._failed_in_row >= MAX_FAILED_IN_ROW:
            self.close_link()

    def drop_load(self, piece: Piece) -> None:
        """Note that a read was given up on purpose: no fault of the link; its bytes moved for nothing or not at all.

        A cell that nobody has taken over falls to compute.
        """
        self.link.end_read(self.num_bytes(piece), tier=self.tier(piece))
        if isinstance(piece, Boundary):
            if self.boundaries.state(piece.chunk) is BoundaryState.READING:
                self._lose(piece.chunk)
            return
        self.outcomes[LoadOutcome.CANCELLED] += 1
        if self.board.state(*piece) is CellState.LOADING:
            self._leave_to_compute(piece)

    def waste_load(self, piece: Piece) -> None:
        """Note that the read of what compute restores instead was given up: its bytes moved for nothing, if at all."""
        if isinstance(piece, Boundary):
            self.drop_load(piece)
            return
        self.link.end_read(self.board.load_bytes(*piece), tier=self.tier(piece))
        self.wasted_bytes += self.board.moved_bytes(*piece)

    def fail_place(self, piece: Piece) -> None:
        """Note that a verified read could not be placed; what that means is as in ``fail_load``."""
        self.link.end_place()
        if isinstance(piece, Boundary):
            self._lose(piece.chunk)
            return
        self.outcomes[LoadOutcome.ERROR] += 1
        self._leave_to_compute(piece)

    def close_link(self) -> None:
        """Stop loading; what is in flight may still arrive, compute restores the rest."""
        self.link.close()
        self._link_pointer.release()
        self._demand_all()
        self._find_limit()

    def _leave_to_compute(self, cell: Cell) -> None:
        self.board.set(*cell, CellState.OPEN)
        self._demand(cell.chunk, cell.block + 1)
        self._find_limit()

    def _demand_all(self) -> None:
        for chunk in range(self.board.num_chunks):
            top = self.board.top_open_block(chunk, 0, self.board.num_blocks)
            if top is not None:
                self._demand(chunk, top + 1)

    def _demand(self, chunk: int, num_blocks: int) -> None:
        """Leave a chunk's first blocks to compute alone, because the link has failed to bring one of them."""
        self.compute.demand(chunk, num_blocks)
        self.link.note_failed(chunk, num_blocks)
        recurrent = self.board.recurrent_blocks(num_blocks)
        if recurrent:
            # Their running state is that of all chunks before: those are recomputed too, even if they are resident.
            for before in range(chunk):
                self.compute.demand(before, recurrent)
            self.board.reopen(chunk + 1, num_blocks, (CellState.LOADING, CellState.LOADED))

    # Boundary states and the end of what can be restored.

    def take_activations(self, chunk: int) -> None:
        """Note that the stage below hands a chunk's activations over before compute comes to it."""
        source = self.boundaries.source
        assert source is BoundarySource.HANDED_OVER, f"a stage whose boundary source is {source}"
        self.boundaries.complete(chunk)

    def expect_activations(self, seconds: Sequence[float], now_s: float) -> None:
        """Note in how many seconds the stage below is expected to have each chunk it hands over."""
        for chunk, left_s in enumerate(seconds):
            if self.boundaries.wants_activations(chunk):
                self.boundaries.expect(chunk, now_s + left_s)

    def end_activations(self) -> None:
        """Leave to the link what was neither stored nor handed over: it will not come any more."""
        for chunk in range(self.board.num_chunks):
            if self.boundaries.state(chunk) is BoundaryState.UNREAD and self.boundaries.possible(chunk):
                self._lose(chunk)

    def stop_before(self, chunk: int) -> None:
        """Restore nothing from a chunk on: what lies after a hole is of no use."""
        self.board.stop_before(chunk)

    def _lose(self, chunk: int) -> None:
        """Leave a chunk, and all later ones if it still has open cells, to the link."""
        # Without open cells nobody needs the states, unless a read under way fails: later chunks are as good as before.
        self.boundaries.lose(chunk, and_later=self.board.num_open_K[chunk] > 0)
        lost = [each for each in range(self.board.num_chunks) if not self.boundaries.possible(each)]
        # A plan that leaves nothing to a link that is well.
        opens = not self.plan.load_sequence and self.link.phase is not LinkPhase.CLOSED
        for each in lost:
            if each < chunk:
                continue
            if opens and each not in self._given_to_link:
                self._given_to_link.add(each)
                self.link.forgive(each)
            self.compute.release(each, self.link.failed_K[each])
        if opens:
            self.link.open()
        self._link_pointer.take_over(min(lost))
        self._find_limit()

    def _find_limit(self) -> None:
        """Find the first chunk with a cell that can neither be recomputed nor loaded."""
        board = self.board
        for chunk in range(board.limit):
            if not self.boundaries.possible(chunk):
                num_blocks = board.num_blocks if self.link.down else self.link.failed_K[chunk]
                if board.top_open_block(chunk, 0, num_blocks) is not None:
                    board.stop_before(chunk)
                    return

    # Estimates, and other restorations.

    def expected_left_s(self, now_s: float) -> float:
        """Seconds to the end of the restoration if compute and link shared what is open so as to end together."""
        link, compute_s = self.link, self.compute.left_s(now_s)
        open_s = self.board.open_compute_s * self.rates.compute_factor
        if link.down:
            return max(link.load_s(0), compute_s + open_s)
        link_s = link.load_s(self.board.open_bytes)
        total_s = open_s + link_s - link.load_s(0)
        share = min(1.0, max(0.0, (link_s - compute_s) / total_s)) if total_s > 0 else 0.0
        return max(link.load_s(0), compute_s + share * open_s)

    def keep_whole(self, wanted: bool) -> None:
        """Recompute chunks whole or not at all from now on, because the stage above is handed them; False: any part."""
        self.compute.keep_whole(wanted)

    def whole_chunks_s(self, now_s: float) -> list[float]:
        """Seconds until compute should have each chunk up to its top block; infinite where the link has a part of it.

        A chunk whose activations are still to come waits for them.
        """
        board, factor = self.board, self.rates.compute_factor
        end_s, latest_s = self.compute.left_s(now_s), WHOLE_MARGIN * self.expected_left_s(now_s)
        seconds, top = [], board.num_blocks - 1
        for chunk in range(board.num_chunks):
            of_compute = board.state(chunk, top) in (CellState.OPEN, CellState.COMPUTING, CellState.COMPUTED)
            whole = self.boundaries.computable(chunk) and of_compute
            if whole and self.boundaries.state(chunk) is BoundaryState.UNREAD:
                end_s = max(end_s, self.boundaries.due_s(chunk) - now_s)
            end_s += float(board.open_compute_K[chunk]) * factor
            late_s = 2.0 * board.compute_s(chunk, top) * factor
            seconds.append(end_s if whole and end_s <= latest_s + late_s else math.inf)
        return seconds

    def remaining(self, now_s: float) -> Remaining:
        """What is left to do, for a scheduler of several restorations."""
        open_s = self.board.open_compute_s * self.rates.compute_factor
        compute_s = self.compute.left_s(now_s) - self.compute.others_s + open_s
        load_s = NO_LINK_S if self.link.down else self.link.load_s(self.board.open_bytes) - self.link.others_s
        if self.restored:
            compute_s = load_s = 0.0
        return Remaining(compute_s=compute_s, load_s=load_s, suffix_s=self.compute.suffix_left_s())

    def yield_to(self, *, compute_s: float, link_s: float) -> None:
        """Note how many seconds of compute and of the link other restorations come first with."""
        self.compute.yield_to(compute_s)
        self.link.yield_to(link_s)

    # What came of it.

    def report(
        self,
        *,
        restore_s: float,
        spans: Iterable[Span],
        ttft_s: float | None = None,
        planning_s: float = 0.0,
        overhead_s: float = 0.0,
    ) -> RestoreReport:
        """The record of the restoration; what is not resident counts as neither loaded nor recomputed."""
        letters = self.board.letters()
        loaded = [(chunk, block) for chunk, row in enumerate(letters) for block, cell in enumerate(row) if cell == "l"]
        return RestoreReport(
            plan=self.plan,
            cells_KB=letters,
            restore_s=restore_s,
            ttft_s=ttft_s,
            recomputed_cells=sum(row.count("c") for row in letters),
            loaded_cells=len(loaded),
            repaired_cells=self.compute.num_repaired,
            failed_loads={outcome.value: n for outcome, n in self.outcomes.items() if outcome is not LoadOutcome.OK},
            loaded_bytes=sum(self.board.moved_bytes(*cell) for cell in loaded),
            wasted_bytes=self.wasted_bytes,
            planning_s=planning_s,
            overhead_s=overhead_s,
            spans=tuple(spans),
            boundary_source=self.boundaries.source,
            boundary_bytes=self.boundary_bytes,
        )
