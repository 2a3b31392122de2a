"""Model test: restorations over 1 to 4 ranks in any interleaving, with faults on one rank only, end as they should.

Ranks take their steps when chance wants it, wait for each other where tensor-parallel ranks all-reduce and where a
stage receives, and report late. Whatever happens: no deadlock, the same compute on all ranks of a stage, no cell
computed before what it needs is there, every cell restored once or a failure at the earliest chunk that cannot be
restored, nothing behind a cancellation. First over ranks as plain state, then over carriers with their threads.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from cacheflow.plan.problem import BoundarySource
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.restore.pipeline import PipelineRestoration
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.restore.step_executor import StepExecutor
from cacheflow.restore.work import RankReport, StepReport
from cacheflow.types import LoadOutcome
from support.stage_ports import StageBuffer, StageCompute, StageTransfer
from support.stage_problems import stage_problem, staged_for
from support.stage_ranks import FAULTS, Meeting, RankFaults, StageRank

MAX_STEPS = 6000
SHAPES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
"""Pipeline stages by tensor-parallel ranks, up to four ranks in all."""
LATER = (BoundarySource.STORED, BoundarySource.STORED, BoundarySource.HANDED_OVER, BoundarySource.NONE)


def first_missing(staged: PipelineRestoration) -> int | None:
    """The first chunk that is not resident on every rank of every stage."""
    reached = staged.resident_tokens()
    return next((chunk for chunk, end in enumerate(staged.target.chunk_ends) if end > reached), None)


@dataclass
class World:
    """A scheduler that makes a step's orders now and then, and ranks that carry them out in their own time."""

    rng: np.random.Generator
    staged: PipelineRestoration
    ranks: list[StageRank]
    cancel_share: float
    close_share: float
    max_ahead: int
    max_delay: int
    slow: int | None
    under_way: list[tuple[int, int, RankReport]] = field(default_factory=list)
    cancelled: bool = False
    closed: bool = False
    told_cancel: bool = False

    def run(self) -> None:
        running = [rank.run() for rank in self.ranks]
        tick = step = 0
        while not self.staged.done:
            tick += 1
            assert tick < 40 * MAX_STEPS, "no end in sight"
            if all(len(rank.inbox) < self.max_ahead for rank in self.ranks) and self.rng.random() < 0.5:
                step += 1
                assert step < MAX_STEPS, "no end in sight"
                self._give_orders(0.01 * step)
            for index in self.rng.permutation(len(running)).tolist():
                if index != self.slow or self.rng.random() < 0.2:
                    next(running[index])
                for report in self.ranks[index].outbox:
                    self.under_way.append((tick + int(self.rng.integers(1, self.max_delay + 1)), index, report))
                self.ranks[index].outbox.clear()
            self._deliver(tick, 0.01 * step)
            self._check_resident()
        self._check_end()

    def _give_orders(self, now_s: float) -> None:
        if self.rng.random() < self.cancel_share:
            self.cancelled = True
            self.staged.cancel()
        if self.rng.random() < self.close_share:
            self.closed = True
            self.staged.close_link()
        orders = self.staged.next_work(
            now_s,
            compute_budget_s=float(self.rng.choice([0, 1e-9, 0.01, 0.1, math.inf])),
            read_ahead_s=float(self.rng.choice([0, 1e-9, 0.05, math.inf])),
        )
        if self.told_cancel:
            assert all(each.idle or each.cancel for each in orders.by_stage), "work behind a cancellation"
        self.told_cancel = self.told_cancel or self.cancelled
        ranks_per_stage = len(self.ranks) // len(orders.by_stage)
        for index, rank in enumerate(self.ranks):
            rank.inbox.append(orders.by_stage[index // ranks_per_stage])

    def _deliver(self, tick: int, now_s: float) -> None:
        due = [entry for entry in self.under_way if entry[0] <= tick]
        self.under_way = [entry for entry in self.under_way if entry[0] > tick]
        for _, rank, report in due:
            self.staged.apply(StepReport({rank: report}), now_s)

    def _grid_cells(self, stage: int) -> set[tuple[int, int]]:
        grid = self.staged.stages[stage].state.problem.grid
        return {(chunk, block) for chunk in range(grid.num_chunks) for block in range(grid.num_blocks)}

    def _stage_of(self, index: int) -> int:
        return index * len(self.staged.stages) // len(self.ranks)

    def _check_resident(self) -> None:
        """What counts as resident is so on every rank."""
        reached = self.staged.resident_tokens()
        num_chunks = sum(end <= reached for end in self.staged.target.chunk_ends)
        for index, rank in enumerate(self.ranks):
            needed = {cell for cell in self._grid_cells(self._stage_of(index)) if cell[0] < num_chunks}
            assert needed <= rank.resident

    def _check_end(self) -> None:
        assert all(rank.over and not rank.reading for rank in self.ranks)
        assert not any(rank.below for rank in self.ranks), "sent, and never received"
        for index, rank in enumerate(self.ranks):
            peers = [each for i, each in enumerate(self.ranks) if self._stage_of(i) == self._stage_of(index)]
            assert rank.log == peers[0].log or any(peer.broken for peer in peers), "ranks of a stage computed apart"
        if self.staged.failed:
            self._check_failure()
            return
        if self.cancelled:
            return
        for index, rank in enumerate(self.ranks):
            assert rank.resident == self._grid_cells(self._stage_of(index))
        if not any(rank.failed_reads for rank in self.ranks) and not self.closed:
            for rank in self.ranks:
                assert max(rank.computed.values(), default=1) == 1, "recomputed twice"
                assert not set(rank.computed) & rank.placed, "restored by both sides"

    def _check_failure(self) -> None:
        """It failed at the first chunk that a fault made impossible, and everything before it is there."""
        assert not self.cancelled or first_missing(self.staged) is not None
        if any(rank.broken for rank in self.ranks) or self.cancelled:
            return
        chunk = first_missing(self.staged)
        assert chunk is not None
        self._check_resident()
        holes = []
        for index, rank in enumerate(self.ranks):
            missing = self._grid_cells(self._stage_of(index)) - rank.resident
            if rank.source is BoundarySource.FIRST_STAGE:
                continue
            holes += [cell[0] for cell in missing if cell in self._failed_on(self._stage_of(index)) or self.closed]
        assert holes, "failed without a read that failed on a stage that could not recompute"
        assert min(holes) >= chunk if self.closed else min(holes) == chunk

    def _failed_on(self, stage: int) -> set[tuple[int, int]]:
        ranks = [rank for index, rank in enumerate(self.ranks) if self._stage_of(index) == stage]
        return set().union(*(rank.failed_reads for rank in ranks))


def make_sources(rng: np.random.Generator, num_stages: int) -> list[BoundarySource]:
    later = [LATER[int(rng.integers(len(LATER)))] for _ in range(num_stages - 1)]
    if rng.random() < 0.5:  # mostly all alike, as a deployment is
        later = later[:1] * len(later)
    for index in range(1, len(later)):
        if later[index] is BoundarySource.HANDED_OVER and later[index - 1] is BoundarySource.NONE:
            later[index] = BoundarySource.NONE
    return [BoundarySource.FIRST_STAGE, *later]


def make_staged(rng: np.random.Generator, sources: list[BoundarySource], **kwargs) -> PipelineRestoration:
    args = {"num_tokens": int(rng.integers(1, 3500)), "ratio": float(10 ** rng.uniform(-1.5, 1.5))}
    boundary_bytes = int(rng.choice([200, 1536, 6000]))
    problems = [
        stage_problem(source, num_blocks=int(rng.choice([1, 2, 3, 6])), boundary_bytes_per_token=boundary_bytes, **args)
        for source in sources
    ]
    return staged_for(problems, sources, policy=str(rng.choice(sorted(RESTORE_POLICIES))), **kwargs)


def make_ranks(seed: int, sources: list[BoundarySource], num_tp: int, faults: list[RankFaults]) -> list[StageRank]:
    ranks: list[StageRank] = []
    pipes: list[deque[tuple[int, bool]] | None] = [None] * num_tp
    for stage, source in enumerate(sources):
        meeting = Meeting(num_tp)
        above = [deque() if stage + 1 < len(sources) else None for _ in range(num_tp)]
        for tp in range(num_tp):
            rng = np.random.default_rng([seed, stage, tp])
            ranks.append(StageRank(rng, source, faults[len(ranks)], meeting, pipes[tp], above[tp]))
        pipes = above
    return ranks


def run_seed(seed: int) -> World:
    rng = np.random.default_rng(seed)
    num_stages, num_tp = SHAPES[int(rng.integers(len(SHAPES)))]
    num_ranks = num_stages * num_tp
    sources = make_sources(rng, num_stages)
    calm = RankFaults(ends=float(rng.choice([0.05, 0.5, 1])))
    faults = [calm] * num_ranks
    if rng.random() < 0.7:  # one rank only
        faults[int(rng.integers(num_ranks))] = RankFaults(
            kv=float(rng.choice([0, 0.05, 0.3])),
            boundary=float(rng.choice([0, 0.2, 1])),
            compute=float(rng.choice([0, 0, 0.02])) if num_tp == 1 else 0.0,
            ends=float(rng.choice([0.02, 0.5])),
        )
    world = World(
        rng,
        make_staged(rng, sources, ranks_per_stage=num_tp),
        make_ranks(seed, sources, num_tp, faults),
        cancel_share=float(rng.choice([0, 0, 0.03])),
        close_share=float(rng.choice([0, 0, 0.03])),
        max_ahead=int(rng.integers(1, 4)),
        max_delay=int(rng.integers(1, 6)),
        slow=int(rng.integers(num_ranks)) if rng.random() < 0.3 else None,
    )
    world.run()
    return world


@pytest.mark.parametrize("block", range(6))
def test_any_interleaving_ends_restored_failed_or_cancelled_on_every_rank(block):
    ends = set()
    for seed in range(1000 * block, 1000 * block + 60):
        try:
            world = run_seed(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        ends.add((world.staged.failed, world.cancelled))
    assert len(ends) > 2, "some end well, some fail, some are cancelled"


def run_live(seed: int, delay: int) -> PipelineRestoration:
    """The same over carriers: one a rank, I/O threads and all; ranks take their steps in turn, bottom stage first."""
    rng = np.random.default_rng(seed)
    num_stages, num_tp = SHAPES[seed % len(SHAPES)]
    sources = make_sources(rng, num_stages)
    staged = make_staged(rng, sources, ranks_per_stage=num_tp, deadline=ReadDeadline(floor_s=60.0))
    faulty = int(rng.integers(num_stages * num_tp))
    carriers, buffers, transfers = [], [], []
    pipes: list[deque | None] = [None] * num_tp
    for stage, source in enumerate(sources):
        above = [deque() if stage + 1 < num_stages else None for _ in range(num_tp)]
        for tp in range(num_tp):
            buffer = StageBuffer(staged.stages[stage].state.problem.grid)
            stored = source is BoundarySource.STORED
            compute = StageCompute(buffer, stored=stored, below=pipes[tp], above=above[tp])
            transfer = StageTransfer(buffer)
            if len(carriers) == faulty:
                _break(transfer, np.random.default_rng([seed, 1]))
            carriers.append(StepExecutor(lambda target, ports=(compute, transfer): ports, poll_s=0.001))
            buffers.append(buffer)
            transfers.append(transfer)
        pipes = above
    try:
        _drive(staged, carriers, rng, delay=delay)
        for index, buffer in enumerate(buffers):
            reached = first_missing(staged) if staged.failed else buffer.grid.num_chunks
            right = buffer.cells == 1000 + np.indices(buffer.cells.shape)[0] * 100 + np.indices(buffer.cells.shape)[1]
            assert right[:reached].all(), f"rank {index}"
        if staged.failed:
            assert sources[faulty // num_tp] is not BoundarySource.FIRST_STAGE, "the first stage recomputes what fails"
    finally:
        for carrier in carriers:
            carrier.close()
    return staged


def _break(transfer: StageTransfer, rng: np.random.Generator) -> None:
    """Let reads of one rank fail."""
    share, boundary_share = float(rng.choice([0, 0.05, 0.3])), float(rng.choice([0, 0.3, 1]))

    def draw(fail_share: float) -> LoadOutcome:
        return FAULTS[int(rng.integers(len(FAULTS)))] if rng.random() < fail_share else LoadOutcome.OK

    transfer.outcome_of = lambda tile: draw(share)
    transfer.boundary_outcome_of = lambda chunk: draw(boundary_share)


def _drive(staged: PipelineRestoration, carriers: list[StepExecutor], rng: np.random.Generator, *, delay: int) -> None:
    for carrier in carriers:
        carrier.begin(staged.target)
    pending: deque[StepReport] = deque()
    num_tp = len(carriers) // len(staged.stages)
    for step in range(MAX_STEPS):
        read_ahead_s = float(rng.choice([1e-9, 1.0]))
        orders = staged.next_work(0.001 * step, compute_budget_s=0.05, read_ahead_s=read_ahead_s)
        reports = {}
        for rank, carrier in enumerate(carriers):
            carrier.carry_out([orders.by_stage[rank // num_tp]], wait_s=0.005)
            reports[rank] = carrier.take_report()
        pending.append(StepReport(reports))
        if len(pending) >= delay:
            staged.apply(pending.popleft(), 0.001 * step)
        if staged.done:
            return
    raise AssertionError("no end in sight")


@pytest.mark.parametrize("seed", range(42))
def test_carriers_with_their_threads_restore_every_stage_or_fail_at_the_same_chunk(seed, caplog):
    caplog.set_level(logging.CRITICAL)
    run_live(seed, 1 + seed % 3)
