"""Stepped restorations against a hostile world: random faults, drops, cancels, reports in any order, 1 to 4 ranks.

Every run must end, each cell resident once on every rank, with nothing touched behind a drop or the end; first over
ranks as plain state, which refuse whatever a transformer could not do, then over carriers with their threads.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.restore.stage import StageRestoration
from cacheflow.restore.step_executor import StepExecutor
from cacheflow.restore.work import RankReport, StepReport
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeBuffer, FakeCompute, FakeTransfer
from support.problems import transformer_problem
from support.stage_ranks import FAULTS, Meeting, RankFaults, StageRank, step_together
from support.virtual_steps import target_for

MAX_STEPS = 3000
LOADS_ONLY = ("load", "layerwise_load")


@dataclass
class World:
    """A scheduler, its ranks, and reports on their way: late, doubled, rank by rank."""

    rng: np.random.Generator
    stepped: StageRestoration
    ranks: list[StageRank]
    max_delay: int
    double_share: float
    cancels: bool
    closes_link: bool
    fail_share: float
    recurrent: bool = False
    under_way: list[tuple[int, int, RankReport]] = field(default_factory=list)
    cancelled: bool = False

    def run(self) -> None:
        running = [(rank, rank.run()) for rank in self.ranks]
        for step in range(MAX_STEPS):
            self._deliver(step)
            if self.stepped.done:
                break
            self._interfere()
            budget_s = float(self.rng.choice([0, 1e-9, 0.01, 0.1, math.inf]))
            read_ahead_s = float(self.rng.choice([0, 1e-9, 0.05, math.inf]))
            orders = self.stepped.next_work(0.01 * step, compute_budget_s=budget_s, read_ahead_s=read_ahead_s)
            for rank, report in enumerate(step_together(running, orders)):
                if not report.idle:
                    self.under_way.append((step + int(self.rng.integers(1, self.max_delay + 1)), rank, report))
            self._check_resident()
        assert self.stepped.done, "no end in sight"
        self._deliver(math.inf)
        self._check_end()

    def _deliver(self, step: float) -> None:
        due = [entry for entry in self.under_way if entry[0] <= step]
        self.under_way = [entry for entry in self.under_way if entry[0] > step]
        for _, rank, report in due:
            for _ in range(1 + (self.rng.random() < self.double_share)):
                self.stepped.apply(StepReport({rank: report}), 0.01)

    def _interfere(self) -> None:
        if self.cancels and self.rng.random() < 0.05:
            self.cancelled = True
            self.stepped.cancel()
        if self.closes_link and self.rng.random() < 0.05:
            self.stepped.close_link()

    def _check_resident(self) -> None:
        reached, target = self.stepped.resident_tokens(), self.stepped.target
        for chunk, end in enumerate(target.chunk_ends):
            if end > reached:
                break
            for block in range(self.stepped.state.problem.grid.num_blocks):
                assert all((chunk, block) in rank.resident for rank in self.ranks)

    def _check_end(self) -> None:
        assert all(rank.over and not rank.reading for rank in self.ranks)
        if not any(rank.broken for rank in self.ranks):
            assert all(rank.log == self.ranks[0].log for rank in self.ranks), "ranks got different compute orders"
        grid = self.stepped.state.problem.grid
        all_cells = {(k, b) for k in range(grid.num_chunks) for b in range(grid.num_blocks)}
        if self.stepped.failed or self.cancelled:
            self._check_resident()
            return
        assert all(rank.resident == all_cells for rank in self.ranks)
        assert self.stepped.resident_tokens() == grid.num_tokens
        rows = self.stepped.report(1.0).cells_KB
        loaded = {(k, b) for k, row in enumerate(rows) for b, letter in enumerate(row) if letter == "l"}
        assert all(rank.placed >= loaded for rank in self.ranks)
        if self.recurrent:
            last, rows = grid.num_chunks - 1, range(grid.num_blocks)
            for rank in self.ranks:
                ends = [(last, row) in rank.placed or rank.passed.get(row) == last + 1 for row in rows]
                assert all(ends), "the state at the end is neither loaded nor recomputed"
        if self.fail_share == 0 and not self.closes_link:
            assert all(set(rank.computed.values()) <= {1} for rank in self.ranks), "recomputed twice"
            assert not any(set(rank.computed) & rank.placed for rank in self.ranks), "restored by both sides"


def make_stepped(
    rng: np.random.Generator, *, num_ranks: int, load_only: bool = False, recurrent: bool = False, **kwargs
) -> StageRestoration:
    args = {
        "num_tokens": int(rng.integers(1, 3500)),
        "suffix_tokens": 0,
        "num_blocks": int(rng.choice([1, 1, 2, 3, 6])),
        "ratio": float(10 ** rng.uniform(-1.5, 1.5)),
    }
    problem = transformer_problem(**args)
    if recurrent:
        bytes_KB = problem.load_bytes_KB.copy()
        bytes_KB[-1] += 5 * bytes_KB.max()
        problem = replace(problem, load_bytes_KB=bytes_KB, recurrent_B=np.ones(problem.grid.num_blocks, dtype=bool))
    policy = rng.choice(LOADS_ONLY) if load_only else rng.choice(sorted(RESTORE_POLICIES))
    state = RestoreState(problem, make_policy(str(policy)).plan(problem), LiveRates(bytes_per_s=1e6))
    return StageRestoration(target_for(problem), state, num_ranks=num_ranks, can_compute=not load_only, **kwargs)


def run_seed(seed: int, *, recurrent: bool = False) -> World:
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 5))
    load_only = bool(rng.random() < 0.2)
    stepped = make_stepped(rng, num_ranks=num_ranks, load_only=load_only, recurrent=recurrent)
    faults = RankFaults(
        kv=float(rng.choice([0, 0, 0.1, 0.5, 1])),
        compute=float(rng.choice([0, 0, 0, 0.02])),
        ends=float(rng.choice([0.05, 0.5, 1])),
    )
    meeting = Meeting(num_ranks)
    world = World(
        rng,
        stepped,
        [
            StageRank(
                np.random.default_rng(seed + rank), BoundarySource.FIRST_STAGE, faults, meeting, None, None, recurrent
            )
            for rank in range(num_ranks)
        ],
        max_delay=int(rng.integers(1, 4)),
        double_share=float(rng.choice([0, 0.2])),
        cancels=bool(rng.random() < 0.2),
        closes_link=bool(rng.random() < 0.2),
        fail_share=faults.kv,
        recurrent=recurrent,
    )
    world.run()
    return world


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("block", range(10))
def test_any_world_ends_with_every_cell_resident_on_every_rank(block, recurrent):
    ends = []
    for seed in range(1000 * block, 1000 * block + 120):
        try:
            world = run_seed(seed, recurrent=recurrent)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        ends.append((world.stepped.failed, world.cancelled))
    assert len(set(ends)) > 2, "some end well, some fail, some are cancelled"


def run_live(seed: int, tmp_delay: int) -> None:
    """The same over carriers: one a rank, threads and all; ranks take their steps in turn."""
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 4))
    stepped = make_stepped(rng, num_ranks=num_ranks, deadline=ReadDeadline(floor_s=0.02, factor=1e-6))
    grid = stepped.state.problem.grid
    buffers = [FakeBuffer(grid) for _ in range(num_ranks)]
    transfers = [FakeTransfer(buffer) for buffer in buffers]
    fail_share = float(rng.choice([0, 0.1, 0.5]))
    faults = [*FAULTS[:3], None]

    def outcome_of(tile, rng):
        return faults[int(rng.integers(4))] if rng.random() < fail_share else LoadOutcome.OK

    for rank, transfer in enumerate(transfers):
        own = np.random.default_rng([seed, rank])
        transfer.outcome_of = lambda tile, own=own: outcome_of(tile, own)
    carriers = [
        StepExecutor(lambda target, rank=rank: (FakeCompute(buffers[rank]), transfers[rank]), poll_s=0.001)
        for rank in range(num_ranks)
    ]
    for carrier in carriers:
        carrier.begin(stepped.target)
    pending: list[StepReport] = []
    try:
        for step in range(MAX_STEPS):
            orders = stepped.next_work(0.001 * step, compute_budget_s=0.05, read_ahead_s=float(rng.choice([1e-9, 1.0])))
            reports = {}
            for rank, carrier in enumerate(carriers):
                carrier.carry_out([orders], wait_s=0.005)
                reports[rank] = carrier.take_report()
            pending.append(StepReport(reports))
            if len(pending) >= tmp_delay:
                stepped.apply(pending.pop(0), 0.001 * step)
            if stepped.done:
                break
        assert stepped.done, "no end in sight"
        assert not stepped.failed, stepped.error
        assert all(buffer.is_right() for buffer in buffers)
    finally:
        for carrier in carriers:
            carrier.close()


@pytest.mark.parametrize("seed", range(24))
def test_carriers_with_their_threads_restore_every_cell_on_every_rank(seed, caplog):
    caplog.set_level(logging.CRITICAL)
    run_live(seed, 1 + seed % 2)
