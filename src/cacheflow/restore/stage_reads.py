"""The link's part of one stage's restoration: what is read next, what is dropped, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable

from cacheflow.plan.grid import Boundary, Cell, Piece
from cacheflow.plan.read_window import MAX_BYTES
from cacheflow.plan.report import Span, SpanKind
from cacheflow.restore.ledgers import ReadLedger
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.restore.work import LoadReport, ReadWork
from cacheflow.state.board import CellState
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

MIN_READS = 2
"""Reads kept under way however long one takes, so that the link never waits for work."""
MAX_READS = 128
"""Reads under way at most, however short one is: each holds a staging buffer."""


class StageReads:
    """Asks for reads a step at a time and settles them by the ranks' reports; pure."""

    def __init__(
        self, state: RestoreState, *, num_ranks: int, can_compute: bool, deadline: ReadDeadline | None = None
    ) -> None:
        """Nothing was asked for yet.

        Args:
            state: The restoration's state machine; claims and outcomes of the link go into it.
            num_ranks: Workers that get the work and report.
            can_compute: Whether workers can recompute what is missing; if not, nothing after a hole is read.
            deadline: When a read is late.
        """
        self._state, self._num_ranks, self._can_compute = state, num_ranks, can_compute
        self._deadline = deadline or ReadDeadline()
        self._ledger = ReadLedger(num_ranks)
        self._drops: list[Piece] = []
        self._own_limit = state.problem.grid.num_chunks

    def __len__(self) -> int:
        """Reads under way that were not dropped."""
        return len(self._ledger)

    @property
    def limit(self) -> int:
        """From this chunk on nothing is restored any more; the number of chunks while nothing is lost."""
        return min(self._own_limit, self._state.board.limit)

    def stop_before(self, chunk: int) -> None:
        """Restore nothing from a chunk on: reads of what comes after it are dropped."""
        self._own_limit = min(self._own_limit, chunk)
        self.drop([piece for piece in self._ledger.wanted if piece.chunk >= self._own_limit])

    def next_reads(self, now_s: float, read_ahead_s: float) -> tuple[ReadWork, ...]:
        """Reads to start in this step; boundary states first, because compute waits for them.

        Args:
            now_s: Seconds on the caller's clock.
            read_ahead_s: Seconds of the link to keep under way: 0 for no further reads, otherwise at least
                ``MIN_READS`` reads.
        """
        reads: list[ReadWork] = []
        state = self._state
        while read_ahead_s > 0 and len(self._ledger) < MAX_READS:
            piece: Piece | None = state.claim_boundary(now_s)
            if piece is None:
                busy = self._busy_tiers(read_ahead_s)
                if len(busy) == state.problem.num_tiers:
                    break
                cell = state.claim_load(now_s, busy)
                if cell is None:
                    break
                if state.board.state(*cell) is not CellState.LOADING or cell.chunk >= self.limit:
                    state.drop_load(cell)
                    continue
                piece = cell
            self._ledger.add(piece)
            allowed_s = self._deadline.allowed_s(state.link.in_flight_bytes, state.rates)
            reads.append(ReadWork(piece, allowed_s, tier=state.tier(piece)))
        return tuple(reads)

    def _busy_tiers(self, read_ahead_s: float) -> frozenset[int]:
        """Tiers that have enough to do."""
        link, num_tiers = self._state.link, self._state.problem.num_tiers
        if num_tiers == 1:  # the link as a whole, with boundary states
            enough = len(self._ledger) >= MIN_READS and link.expected_s() >= self._ahead_s(0, read_ahead_s)
            return frozenset([0]) if enough else frozenset()
        return frozenset(
            tier
            for tier in range(num_tiers)
            if link.reads_by_tier[tier] >= MIN_READS and link.expected_s(tier) >= self._ahead_s(tier, read_ahead_s)
        )

    def _ahead_s(self, tier: int, read_ahead_s: float) -> float:
        """Seconds of a tier to keep under way: what steps call for, and what its latency does, as ``ReadWindow`` says.

        Here reads are asked for a step at a time, so more of them are under way than the tier's latency calls for.
        """
        if self._state.link.in_flight_bytes >= MAX_BYTES:
            return read_ahead_s
        return read_ahead_s + self._state.rates.windows[tier].ahead_s

    def drop(self, pieces: Iterable[Piece]) -> None:
        """Give these up, such as what compute takes over: the next drops hold those whose reads are under way."""
        self._drops.extend(piece for piece in pieces if self._ledger.drop(piece))

    def take_drops(self) -> tuple[Piece, ...]:
        """Reads to drop in this step; asked once a step, before the reads it starts are carried out."""
        drops, self._drops = tuple(self._drops), []
        return drops

    def take(self, rank: int, report: LoadReport, now_s: float) -> Span | None:
        """Note how a read ended on a rank; the read's span once that settles it, unless it just ended unused."""
        piece, state = report.piece, self._state
        ended = self._ledger.take(rank, report)
        if ended is None:
            return None
        if len(ended) < self._num_ranks:
            self._drops.append(piece)
        if all(each.outcome is LoadOutcome.OK for each in ended):
            slowest = max(ended, key=lambda each: each.busy_s)
            state.observe_read(piece, num_bytes=slowest.num_bytes, busy_s=slowest.busy_s, sample=slowest.sample)
            wanted = state.begin_place(piece)
            if wanted:
                state.complete_load(piece, now_s)
            return _span(SpanKind.LOAD if wanted or isinstance(piece, Boundary) else SpanKind.WASTED, slowest)
        span = None
        if report.outcome in (LoadOutcome.OK, LoadOutcome.CANCELLED):
            state.drop_load(piece)
        else:
            state.fail_load(piece, report.outcome)
            span = _span(SpanKind.FAILED, report)
        # Without compute nothing after a hole is of use: only the chunks before it are still read.
        hole = isinstance(piece, Cell) and not self._can_compute
        self.stop_before(piece.chunk if hole else state.board.limit)
        return span


def _span(kind: SpanKind, report: LoadReport) -> Span:
    return Span.of_read(kind, report.piece, report.end_s - report.busy_s, report.end_s)
