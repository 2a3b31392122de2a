"""The link's side of a stepped restoration: which reads are ordered, which are dropped, and what came of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cacheflow.plan.grid import Tile
from cacheflow.restore.ledgers import CellIndex, ReadLedger
from cacheflow.restore.step_spans import load_span
from cacheflow.restore.work import LoadReport, ReadWork
from cacheflow.state.board import CellState
from cacheflow.state.boundary import BOUNDARY_ROW
from cacheflow.state.report import Span, SpanKind
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

MIN_READS = 2
"""Reads kept under way however long one takes, so that the link never waits for an order."""
MAX_READS = 128
"""Reads under way at most, however short one is: each holds a staging buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadDeadline:
    """When a read counts as late.

    Attributes:
        floor_s: A read may always take this long.
        factor: ... plus this many times what everything under way should take.
    """

    floor_s: float = 0.25
    factor: float = 8.0


class StepReads:
    """Orders reads a step at a time and settles them by the ranks' reports; pure."""

    def __init__(
        self, state: RestoreState, *, num_ranks: int, can_compute: bool, deadline: ReadDeadline | None = None
    ) -> None:
        """Nothing was ordered yet.

        Args:
            state: The restoration's state machine; claims and outcomes of the link go into it.
            num_ranks: Workers that get the orders and report.
            can_compute: Whether workers can recompute what is missing; if not, nothing behind a hole is read.
            deadline: When a read is late.
        """
        self._state, self._num_ranks, self._can_compute = state, num_ranks, can_compute
        self._deadline = deadline or ReadDeadline()
        self._ledger = ReadLedger(num_ranks)
        self._drops: list[CellIndex] = []
        self._chunk_limit = state.problem.grid.num_chunks

    def __len__(self) -> int:
        """Reads under way that were not dropped."""
        return len(self._ledger)

    @property
    def chunk_limit(self) -> int:
        """From this chunk on nothing is restored any more; the number of chunks while nothing is lost."""
        return min(self._chunk_limit, self._state.limit)

    def limit(self, chunk: int) -> None:
        """Restore nothing from a chunk on: reads of what lies behind it are dropped."""
        self._chunk_limit = min(self._chunk_limit, chunk)
        self.drop([cell for cell in self._ledger.wanted if cell[0] >= self._chunk_limit])

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
            boundary = state.boundary.claim(now_s)
            if boundary is not None:
                reads.append(self._begin((boundary, BOUNDARY_ROW)))
                continue
            if len(self._ledger) >= MIN_READS and state.expected_load_s() >= read_ahead_s:
                break
            tile = state.claim_load(now_s)
            if tile is None:
                break
            cell = (tile.chunk_lo, tile.block_lo)
            if state.cell(*cell) is not CellState.LOADING or tile.chunk_lo >= self.chunk_limit:
                state.drop_load(tile)
                continue
            reads.append(self._begin(cell))
        return tuple(reads)

    def _begin(self, cell: CellIndex) -> ReadWork:
        self._ledger.add(cell)
        return ReadWork(*cell, self._deadline.floor_s + self._deadline.factor * self._state.expected_load_s())

    def drop(self, cells: Iterable[CellIndex]) -> None:
        """Compute takes these cells over: the next drops hold those of them whose reads are under way."""
        self._drops.extend(cell for cell in cells if self._ledger.drop(cell))

    def take_drops(self) -> tuple[CellIndex, ...]:
        """Reads to drop in this step; asked once a step, before the reads it starts are carried out."""
        drops, self._drops = tuple(self._drops), []
        return drops

    def take(self, rank: int, report: LoadReport, now_s: float) -> Span | None:
        """Note how a read ended on a rank; the read's span once that settles it, unless it just ended unused."""
        cell = (report.chunk, report.block)
        ended = self._ledger.take(rank, report)
        if ended is None:
            return None
        if len(ended) < self._num_ranks:
            self._drops.append(cell)
        if report.is_boundary:
            return self._take_boundary(report, ended, now_s)
        tile = Tile(report.chunk, report.chunk + 1, report.block, report.block + 1)
        if all(each.outcome is LoadOutcome.OK for each in ended):
            slowest = max(ended, key=lambda each: each.busy_s)
            self._state.rates.observe_load(num_bytes=slowest.num_bytes, busy_s=slowest.busy_s)
            if not self._state.begin_place(tile):
                return load_span(SpanKind.WASTED, slowest)
            self._state.complete_load(tile)
            return load_span(SpanKind.LOAD, slowest)
        span = None
        if report.outcome in (LoadOutcome.OK, LoadOutcome.CANCELLED):
            self._state.drop_load(tile)
        else:
            self._state.fail_load(tile, report.outcome)
            span = load_span(SpanKind.FAILED, report)
        # Without compute nothing behind a hole is of use: only the chunks before it are still read.
        self.limit(report.chunk if not self._can_compute else self._state.limit)
        return span

    def _take_boundary(self, report: LoadReport, ended: list[LoadReport], now_s: float) -> Span | None:
        boundary, span = self._state.boundary, None
        if all(each.outcome is LoadOutcome.OK for each in ended):
            slowest = max(ended, key=lambda each: each.busy_s)
            self._state.rates.observe_load(num_bytes=slowest.num_bytes, busy_s=slowest.busy_s)
            boundary.complete(report.chunk, now_s)
            return load_span(SpanKind.BOUNDARY, slowest)
        if report.outcome in (LoadOutcome.OK, LoadOutcome.CANCELLED):
            boundary.drop(report.chunk)
        else:
            boundary.fail(report.chunk)
            span = load_span(SpanKind.FAILED, report)
        self.limit(self._state.limit)
        return span
