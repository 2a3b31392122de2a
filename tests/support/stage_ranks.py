"""Ranks of pipeline stages as plain state, that refuse whatever a transformer, a collective or a pipe could not do.

A rank is a generator over its steps' orders: it yields where it has to wait for another rank, so that chance decides
who goes on. Tensor-parallel ranks meet at every compute order, as in an all-reduce; a stage that receives waits for
the stage below.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cacheflow.plan.grid import Boundary, Piece
from cacheflow.plan.problem import BoundarySource
from cacheflow.restore.work import ComputeReport, ComputeWork, LoadReport, RankReport, StageWork
from cacheflow.types import LoadOutcome

FAULTS = [LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR, LoadOutcome.LATE]


@dataclass(kw_only=True)
class RankFaults:
    """How a rank behaves: shares of reads that fail, of compute orders that fail, of reads that end per step."""

    kv: float = 0.0
    boundary: float = 0.0
    compute: float = 0.0
    ends: float = 0.5


@dataclass
class Meeting:
    """Where the tensor-parallel ranks of one stage all-reduce: everyone brings its n-th order, all must be the same."""

    num_ranks: int
    orders: dict[int, ComputeWork] = field(default_factory=dict)
    arrived: Counter[int] = field(default_factory=Counter)

    def arrive(self, position: int, order: ComputeWork) -> None:
        assert self.orders.setdefault(position, order) == order, "ranks of a stage all-reduce different orders"
        self.arrived[position] += 1

    def complete(self, position: int) -> bool:
        return self.arrived[position] >= self.num_ranks


@dataclass
class StageRank:
    """One worker of one stage."""

    rng: np.random.Generator
    source: BoundarySource
    faults: RankFaults
    meeting: Meeting
    below: deque[tuple[int, bool]] | None
    above: deque[tuple[int, bool]] | None
    recurrent: bool = False
    """Every block has a running state, which is that of the chunks recomputed before."""
    passed: dict[int, int] = field(default_factory=dict)
    inbox: deque[StageWork] = field(default_factory=deque)
    outbox: list[RankReport] = field(default_factory=list)
    heights: dict[int, int] = field(default_factory=dict)
    seeds: set[int] = field(default_factory=set)
    resident: set[tuple[int, int]] = field(default_factory=set)
    computed: Counter[tuple[int, int]] = field(default_factory=Counter)
    placed: set[tuple[int, int]] = field(default_factory=set)
    failed_reads: set[Piece] = field(default_factory=set)
    reading: list[Piece] = field(default_factory=list)
    started: set[Piece] = field(default_factory=set)
    forbidden: set[Piece] = field(default_factory=set)
    log: list[ComputeWork] = field(default_factory=list)
    ended: list[LoadReport] = field(default_factory=list)
    num_met: int = 0
    broken: bool = False
    over: bool = False
    cancelled: bool = False

    def run(self) -> Iterator[None]:
        """Carry out what is in the inbox, for ever; yields where it waits."""
        while True:
            while not self.inbox:
                yield
            yield from self._step(self.inbox.popleft())

    def _step(self, orders: StageWork) -> Iterator[None]:
        if self.over:
            assert orders.idle or (orders.cancel and not self.cancelled), "orders after the end"
            self.cancelled = self.cancelled or orders.cancel
            self.outbox.append(RankReport())
            return
        received = True
        for chunk in orders.receives:
            assert self.below is not None, "there is no stage below"
            while not self.below:
                yield
            sent, well = self.below.popleft()
            assert sent == chunk, "the stage below handed another chunk over"
            received = received and well
            if well:
                self.seeds.add(chunk)
        if orders.cancel:
            assert not any((orders.compute, orders.reads, orders.finish)), "work beside a cancellation"
            self.cancelled = True
            self._end()
            self.outbox.append(RankReport(loads=self._take_ended(), finished=(7,)))
            return
        self._drop_and_read(orders)
        computes: list[ComputeReport] = []
        if orders.compute or not received:
            yield from self._compute(orders.compute, computes, received=received)
        for cell in list(self.reading):
            if self.rng.random() < self.faults.ends:
                self._end_read(cell)
        finished = ()
        if orders.finish and not self.broken:
            self._end()
            finished = (7,)
        self.outbox.append(RankReport(loads=self._take_ended(), computes=tuple(computes), finished=finished))

    def _drop_and_read(self, orders: StageWork) -> None:
        for cell in orders.drops:
            self.forbidden.add(cell)
            if cell in self.reading:
                self.reading.remove(cell)
                self._report(cell, LoadOutcome.CANCELLED)
        for read in orders.reads:
            cell = read.piece
            assert cell not in self.started, "a cell is read once"
            assert cell not in self.forbidden, "a read behind its drop"
            assert read.deadline_s > 0
            assert not isinstance(read.piece, Boundary) or self.source is BoundarySource.STORED, (
                "a boundary that nobody stored"
            )
            self.started.add(cell)
            self.reading.append(cell)

    def _compute(self, orders: tuple[ComputeWork, ...], done: list[ComputeReport], *, received: bool) -> Iterator[None]:
        first, seconds = len(self.log), []
        was_broken = self.broken
        self.broken = self.broken or not received
        error = "" if was_broken or received else "nothing was handed over"
        for order in orders:
            if not self.broken:
                self.broken = self.rng.random() < self.faults.compute
            # A rank that has failed still takes part in what its neighbours wait for; only they may not count on it.
            position, self.num_met = self.num_met, self.num_met + 1
            self.meeting.arrive(position, order)
            while not self.meeting.complete(position):
                yield
            if self.broken:
                error = error or ("" if was_broken else "device lost")
            else:
                self._recompute(order)
                self.log.append(order)
                seconds.append(float(10 ** self.rng.uniform(-5, 0)))
            if order.sends:
                assert self.above is not None, "there is no stage above"
                self.above.append((order.tile.chunk_lo, not self.broken))
        if not was_broken:
            done.append(ComputeReport(restore_id=7, first=first, seconds=tuple(seconds), error=error))

    def _recompute(self, order: ComputeWork) -> None:
        tile, chunk = order.tile, order.tile.chunk_lo
        assert tile.chunk_hi == chunk + 1
        if order.restart:
            self.heights[chunk] = 0
        assert self.heights.get(chunk, 0) == tile.block_lo, "the activations below are gone"
        if self.source is not BoundarySource.FIRST_STAGE:
            assert chunk in self.seeds, "recomputed without its boundary states, stored or handed over"
        assert not (order.sends and order.kv_only_top), "nothing to hand over"
        for block in range(tile.block_lo, tile.block_hi):
            assert all((earlier, block) in self.resident for earlier in range(chunk)), "an earlier chunk is missing"
            assert (chunk, block) not in self.reading, "compute takes over what is being read without a drop"
            if self.recurrent:
                assert chunk in (0, self.passed.get(block, 0)), "the running state is not that of the chunks before"
                self.passed[block] = chunk + 1
            self.resident.add((chunk, block))
            self.computed[chunk, block] += 1
        self.heights[chunk] = -1 if order.kv_only_top else tile.block_hi

    def _end_read(self, cell: Piece) -> None:
        self.reading.remove(cell)
        boundary = isinstance(cell, Boundary)
        if self.rng.random() < (self.faults.boundary if boundary else self.faults.kv):
            self.failed_reads.add(cell)
            self._report(cell, FAULTS[int(self.rng.integers(len(FAULTS)))])
            return
        if boundary:
            self.seeds.add(cell.chunk)
        else:
            assert cell not in self.computed, "placed over what compute had restored"
            self.resident.add(cell)
            self.placed.add(cell)
        self._report(cell, LoadOutcome.OK)

    def _report(self, cell: Piece, outcome: LoadOutcome) -> None:
        busy_s = float(10 ** self.rng.uniform(-5, 0))
        self.ended.append(LoadReport(restore_id=7, piece=cell, outcome=outcome, num_bytes=100, busy_s=busy_s))

    def _take_ended(self) -> tuple[LoadReport, ...]:
        ended, self.ended = tuple(self.ended), []
        return ended

    def _end(self) -> None:
        for cell in self.reading:
            self._report(cell, LoadOutcome.CANCELLED)
        self.reading.clear()
        self.over = True


def step_together(running: Sequence[tuple[StageRank, Iterator[None]]], orders: StageWork) -> list[RankReport]:
    """One step of a stage's ranks, each with the same orders, until every one of them has reported."""
    for rank, _ in running:
        rank.inbox.append(orders)
    while any(not rank.outbox for rank, _ in running):
        for _, steps in running:
            next(steps)
    return [rank.outbox.pop() for rank, _ in running]
