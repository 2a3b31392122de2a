"""A restoration over stages: what stages share, how a chunk is handed over, and how near the bound it ends."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import pytest

from cacheflow.errors import ConfigError
from cacheflow.plan.boundaries import BOUNDARY_ROW, BoundarySource, BoundaryState
from cacheflow.plan.explain import SpanKind
from cacheflow.plan.grid import Tile
from cacheflow.plan.pointers import RestoreState
from cacheflow.plan.rates import LiveRates
from cacheflow.restore.carrier import OrderCarrier
from cacheflow.restore.orders import ComputeOrder, ComputeReport, LoadReport, RankReport, RestoreOrders, StepReport
from cacheflow.restore.staged import StagedRestoration
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeCompute, FakeTransfer
from support.problems import shared_plan
from support.stage_ports import StageBuffer, StageCompute, StageTransfer
from support.stage_problems import stage_problem, staged_for
from support.virtual_stages import run_staged
from support.virtual_steps import target_for

FIRST, STORED = BoundarySource.FIRST_STAGE, BoundarySource.STORED
HANDED, NONE = BoundarySource.HANDED_OVER, BoundarySource.NONE


class Scheduler:
    """A staged restoration with the reports written by hand; every stage has four chunks of three blocks."""

    def __init__(self, *sources, ranks_per_stage=1, policy="cacheflow", num_blocks=3, **kwargs) -> None:
        args = {"num_tokens": 2048, "boundary_bytes_per_token": 100, "num_blocks": num_blocks, **kwargs}
        self.problems = [stage_problem(source, **args) for source in sources]
        self.staged = staged_for(self.problems, sources, policy=policy, ranks_per_stage=ranks_per_stage)
        self.num_ranks = ranks_per_stage * len(sources)
        self.now_s = 0.0

    def orders(self, *, compute_budget_s=1e-9, read_ahead_s=1e-9):
        self.now_s += 0.01
        return self.staged.orders(self.now_s, compute_budget_s=compute_budget_s, read_ahead_s=read_ahead_s).by_stage

    def loaded(self, rank, *cells, outcome=LoadOutcome.OK) -> None:
        loads = tuple(
            LoadReport(restore_id=7, chunk=chunk, block=block, outcome=outcome, num_bytes=1000, busy_s=0.01)
            for chunk, block in cells
        )
        self.staged.apply(StepReport({rank: RankReport(loads=loads)}), self.now_s)

    def computed(self, rank, count, *, first=0, error="") -> None:
        report = ComputeReport(restore_id=7, first=first, seconds=(0.01,) * count, error=error)
        self.staged.apply(StepReport({rank: RankReport(computes=(report,))}), self.now_s)

    def boundary(self, stage, chunk):
        return self.staged.stages[stage].state.boundary.state(chunk)


def reads_of(orders):
    return [(read.chunk, read.block) for read in orders.reads]


# Boundary states


def test_a_stage_reads_the_boundaries_of_the_head_before_anything_and_keys_and_values_from_the_tail():
    scheduler = Scheduler(FIRST, STORED)
    first, later = scheduler.orders(read_ahead_s=0.1)
    assert reads_of(first)[0] == (3, 2)
    assert not any(read.is_boundary for read in first.reads)
    assert [read.is_boundary for read in later.reads[:3]] == [True, True, False]
    assert reads_of(later)[:3] == [(0, BOUNDARY_ROW), (1, BOUNDARY_ROW), (3, 2)]
    assert first.compute
    assert not later.compute, "nothing to recompute from yet"


def test_compute_waits_until_every_rank_of_the_stage_has_the_boundary():
    scheduler = Scheduler(FIRST, STORED, ranks_per_stage=2)
    scheduler.orders()
    scheduler.loaded(2, (0, BOUNDARY_ROW))
    assert scheduler.boundary(1, 0) is BoundaryState.READING
    assert not scheduler.orders()[1].compute
    scheduler.loaded(3, (0, BOUNDARY_ROW))
    assert scheduler.boundary(1, 0) is BoundaryState.RESIDENT
    assert scheduler.orders()[1].compute[0].tile == Tile(0, 1, 0, 1)


@pytest.mark.parametrize("outcome", [LoadOutcome.MISS, LoadOutcome.LATE, LoadOutcome.CORRUPT, LoadOutcome.ERROR])
def test_a_lost_boundary_leaves_its_chunk_and_all_later_ones_to_the_link(outcome):
    scheduler = Scheduler(FIRST, STORED)
    scheduler.orders()
    scheduler.loaded(1, (0, BOUNDARY_ROW))
    scheduler.loaded(1, (1, BOUNDARY_ROW), outcome=outcome)
    assert not any(scheduler.staged.stages[1].state.boundary.possible(chunk) for chunk in (1, 2, 3))
    chunks, reads = set(), set()
    for _ in range(20):
        orders = scheduler.orders(compute_budget_s=math.inf, read_ahead_s=math.inf)[1]
        chunks |= {order.tile.chunk_lo for order in orders.compute}
        reads |= set(reads_of(orders))
        scheduler.loaded(1, *reads_of(orders))
    assert chunks <= {0}
    assert {(chunk, block) for chunk in (1, 2, 3) for block in range(3)} <= reads
    assert (2, BOUNDARY_ROW) not in reads, "nothing is read that cannot be used"
    assert not scheduler.staged.failed


def test_a_lost_boundary_makes_a_plan_that_loads_nothing_load():
    scheduler = Scheduler(FIRST, STORED, policy="recompute")
    assert reads_of(scheduler.orders(read_ahead_s=math.inf)[1]) == [(0, BOUNDARY_ROW), (1, BOUNDARY_ROW)]
    scheduler.loaded(1, (1, BOUNDARY_ROW), outcome=LoadOutcome.MISS)
    scheduler.loaded(1, (0, BOUNDARY_ROW), outcome=LoadOutcome.MISS)
    reads = reads_of(scheduler.orders(read_ahead_s=math.inf)[1])
    assert {cell for cell in reads if cell[1] >= 0} == {(chunk, block) for chunk in range(4) for block in range(3)}


@pytest.mark.parametrize("policy", ["cacheflow", "cacheflow_v1", "cacheflow_v2", "cake", "recompute"])
def test_without_any_boundary_a_stage_loads_everything_whatever_its_plan(policy):
    scheduler = Scheduler(FIRST, STORED, policy=policy, ratio=3.0)
    reads = set()
    for _ in range(60):
        orders = scheduler.orders(compute_budget_s=math.inf, read_ahead_s=math.inf)[1]
        assert not orders.compute
        for cell in reads_of(orders):
            reads.add(cell)
            scheduler.loaded(1, cell, outcome=LoadOutcome.MISS if cell[1] < 0 else LoadOutcome.OK)
    assert {cell for cell in reads if cell[1] >= 0} == {(chunk, block) for chunk in range(4) for block in range(3)}
    assert scheduler.staged.stages[1].restored


def test_what_can_be_neither_loaded_nor_recomputed_ends_every_stage_before_that_chunk():
    scheduler = Scheduler(FIRST, STORED)
    first, later = scheduler.orders(read_ahead_s=0.1)
    scheduler.loaded(1, (0, BOUNDARY_ROW))
    scheduler.loaded(1, (1, BOUNDARY_ROW), outcome=LoadOutcome.MISS)
    lost = next(cell for cell in reads_of(later) if cell[1] >= 0)
    scheduler.loaded(1, lost, outcome=LoadOutcome.MISS)
    assert [stage.limit for stage in scheduler.staged.stages] == [4, lost[0]]
    orders = scheduler.orders(compute_budget_s=math.inf, read_ahead_s=math.inf)
    assert [stage.limit for stage in scheduler.staged.stages] == [lost[0]] * 2
    assert set(orders[0].drops) == {cell for cell in reads_of(first) if cell[0] >= lost[0]}
    for each in orders:
        assert all(read.chunk < lost[0] for read in each.reads)
    assert not scheduler.staged.failed, "what lies before it is still restored"


def test_a_stage_at_its_end_waits_for_the_others_and_all_fail_at_the_same_chunk():
    scheduler = Scheduler(FIRST, NONE)
    first, later = scheduler.orders(read_ahead_s=math.inf)
    reads = reads_of(later)
    assert all(chunk >= 2 for chunk, _ in reads_of(first)), "of no use once the other stage has lost chunk 2"
    scheduler.computed(0, len(first.compute))
    count = len(first.compute)
    scheduler.loaded(1, *[cell for cell in reads if cell[0] < 2])
    scheduler.loaded(1, *[cell for cell in reads if cell[0] == 2], outcome=LoadOutcome.MISS)
    scheduler.loaded(1, *[cell for cell in reads if cell[0] == 3], outcome=LoadOutcome.CANCELLED)
    first, later = scheduler.orders(compute_budget_s=1e-9, read_ahead_s=0.1)
    assert first.compute
    assert not later.cancel
    assert not scheduler.staged.failed, "the first stage has work left"
    for _ in range(30):
        count_now = len(first.compute)
        scheduler.computed(0, count_now, first=count)
        scheduler.loaded(0, *reads_of(first))
        count += count_now
        first, later = scheduler.orders(compute_budget_s=math.inf, read_ahead_s=0.1)
        assert all(read.chunk < 2 for read in first.reads)
        assert all(order.tile.chunk_lo < 2 for order in first.compute)
        if later.cancel:
            break
    assert first.cancel
    assert scheduler.staged.failed
    assert scheduler.staged.failed_chunk == 2
    assert scheduler.staged.resident_tokens() == 1024


# What stages share


def test_a_compute_error_on_one_stage_ends_all():
    scheduler = Scheduler(FIRST, STORED, STORED)
    orders = scheduler.orders()
    scheduler.computed(0, 0, error="device lost")
    orders = scheduler.orders()
    orders = [a if a.cancel else b for a, b in zip(orders, scheduler.orders(), strict=True)]
    assert all(each.cancel for each in orders)
    assert scheduler.staged.failed
    assert scheduler.staged.error == "device lost"
    assert scheduler.staged.failed_chunk == 0
    for rank in range(3):
        scheduler.staged.apply(StepReport({rank: RankReport(finished=(7,))}), 1.0)
    assert scheduler.staged.done


def test_a_cancellation_reaches_every_stage():
    scheduler = Scheduler(FIRST, HANDED, STORED)
    scheduler.orders()
    scheduler.staged.cancel()
    assert all(each.cancel and not each.compute for each in scheduler.orders())
    assert not scheduler.staged.failed


def test_reports_go_to_the_stage_of_their_rank():
    scheduler = Scheduler(FIRST, STORED, ranks_per_stage=2)
    cell = reads_of(scheduler.orders()[0])[0]
    scheduler.loaded(0, cell)
    scheduler.loaded(1, cell)
    assert scheduler.staged.stages[0].report(0.0).loaded_cells == 1
    assert scheduler.staged.stages[1].report(0.0).loaded_cells == 0


def test_while_a_stage_waits_for_its_boundary_the_others_keep_the_step_short():
    waits = Scheduler(FIRST, STORED, num_blocks=20).orders(compute_budget_s=math.inf)[0].compute
    alone = Scheduler(FIRST, NONE, num_blocks=20).orders(compute_budget_s=math.inf)[0].compute
    assert sum(order.tile.num_cells for order in waits) < sum(order.tile.num_cells for order in alone)


def test_what_does_not_fit_is_refused():
    problem = stage_problem(FIRST, num_tokens=2048, num_blocks=3)
    states = [
        RestoreState(problem, shared_plan(problem), LiveRates(bytes_per_s=1e6), source=source)
        for source in (FIRST, HANDED)
    ]
    with pytest.raises(ConfigError, match="needs a plan of whole chunks"):
        StagedRestoration(target_for(problem), states)
    with pytest.raises(ConfigError, match="needs a first stage"):
        StagedRestoration(target_for(problem), states[1:])
    with pytest.raises(ConfigError, match="hands nothing over"):
        Scheduler(FIRST, NONE, HANDED)


# Handing over


def test_a_chunk_is_ordered_on_all_stages_in_the_same_step_whole_and_with_its_top_in_full():
    scheduler = Scheduler(FIRST, HANDED, HANDED, ratio=4.0)
    for chunk in range(2):
        first, middle, last = (each.compute for each in scheduler.orders())
        assert [order.tile for each in (first, middle, last) for order in each] == [Tile(chunk, chunk + 1, 0, 3)] * 3
        assert [(each[0].receives, each[0].sends) for each in (first, middle, last)] == [
            (False, True), (True, True), (True, False),
        ]  # fmt: skip
        for rank in range(3):
            scheduler.computed(rank, 1, first=chunk)


def test_the_top_block_of_a_chunk_that_is_handed_over_is_computed_in_full_whatever_the_plan():
    problem = stage_problem(FIRST, num_tokens=2048, num_blocks=3)
    staged = staged_for([problem, problem], [FIRST, HANDED])
    states = [
        RestoreState(problem, replace(stage.state.plan, kv_only_top=True), LiveRates(bytes_per_s=1e3), source=source)
        for stage, source in zip(staged.stages, (FIRST, HANDED), strict=True)
    ]
    staged = StagedRestoration(target_for(problem), states)
    first, last = staged.orders(0.0, compute_budget_s=1e-9, read_ahead_s=0.0).by_stage
    assert (first.compute[0].sends, first.compute[0].kv_only_top) == (True, False)
    assert last.compute[0].kv_only_top


def test_a_stage_that_leaves_a_chunk_to_its_link_leaves_the_later_ones_too():
    scheduler = Scheduler(FIRST, HANDED, ratio=4.0)
    upper = scheduler.staged.stages[1].state
    for cell in [(1, 0), (1, 1), (1, 2)]:
        while upper.cell(1, 0).name == "OPEN":
            upper.claim_load(0.0)
        assert upper.cell(*cell).name == "LOADING"
    computed = [[], []]
    for _ in range(4):
        for stage, orders in enumerate(scheduler.orders()):
            computed[stage] += [(order.tile.chunk_lo, order.sends) for order in orders.compute]
    assert computed[0][:2] == [(0, True), (1, False)]
    assert computed[1] == [(0, False)]
    assert not upper.boundary.possible(2)


def test_more_than_one_chunk_a_step_makes_a_pipeline():
    scheduler = Scheduler(FIRST, HANDED, ratio=20.0)
    orders = scheduler.orders(compute_budget_s=math.inf)
    assert len(orders[0].compute) == len(orders[1].compute) == 1, "a share of what is left at once"
    scheduler.staged.close_link()
    orders = scheduler.orders(compute_budget_s=math.inf)
    assert [order.tile.chunk_lo for order in orders[1].compute] == [1, 2], "the link has the last one"


def carrier_pair():
    """Two stages that hand over through a pipe, on carriers."""
    grid = stage_problem(FIRST, num_tokens=2048, num_blocks=3).grid
    pipe: deque = deque()
    buffers = [StageBuffer(grid), StageBuffer(grid)]
    computes = [
        StageCompute(buffers[0], stored=False, below=None, above=pipe),
        StageCompute(buffers[1], stored=False, below=pipe, above=None),
    ]
    ports = [(compute, StageTransfer(buffer)) for compute, buffer in zip(computes, buffers, strict=True)]
    carriers = [OrderCarrier(lambda target, index=index: ports[index]) for index in range(2)]
    return carriers, computes, pipe


def chunk_orders(*, count=3):
    below = tuple(ComputeOrder(Tile(chunk, chunk + 1, 0, 3), sends=True) for chunk in range(count))
    above = tuple(ComputeOrder(Tile(chunk, chunk + 1, 0, 3), receives=True) for chunk in range(count))
    return RestoreOrders(restore_id=7, compute=below), RestoreOrders(restore_id=7, compute=above)


def test_a_stage_that_fails_answers_every_hand_over_it_was_ordered():
    (below, above), computes, pipe = carrier_pair()
    target = target_for(stage_problem(FIRST, num_tokens=2048, num_blocks=3))

    def fail(tile):
        if tile.chunk_lo == 1:
            raise RuntimeError("device lost")

    computes[0].on_recompute = fail
    for carrier in (below, above):
        carrier.begin(target)
    orders = chunk_orders()
    try:
        below.carry_out([orders[0]])
        above.carry_out([orders[1]])
        assert [len(each.take_report().computes[0].seconds) for each in (below, above)] == [1, 1]
        assert not pipe, "every send met its receive"
        # Orders that were on their way when it failed.
        below.carry_out([RestoreOrders(restore_id=7, compute=orders[0].compute[:1])])
        assert list(pipe) == [(0, True)]
        above.carry_out([RestoreOrders(restore_id=7, compute=orders[1].compute[:1])])
        assert not pipe
        assert all(each.take_report().idle for each in (below, above))
    finally:
        for carrier in (below, above):
            carrier.close()


def test_ports_that_know_no_stages_fail_their_restoration_only():
    grid = stage_problem(FIRST, num_tokens=2048, num_blocks=3).grid
    buffer = StageBuffer(grid)
    carrier = OrderCarrier(lambda target: (FakeCompute(buffer), FakeTransfer(buffer)), poll_s=0.001)
    carrier.begin(target_for(stage_problem(FIRST, num_tokens=2048, num_blocks=3)))
    try:
        carrier.carry_out([chunk_orders(count=1)[1]])
        (report,) = carrier.take_report().computes
        assert "FakeCompute hands no activations over" in report.error
    finally:
        carrier.close()


# How near the bound


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("delay", "limit"), [(1, 1.07), (2, 1.10)])
def test_stages_end_near_the_bound_of_the_slowest(ratio, delay, limit):
    sources = [FIRST, STORED, STORED]
    problems = [stage_problem(source, num_tokens=8192, num_blocks=15, ratio=ratio) for source in sources]
    staged = staged_for(problems, sources)
    workers = run_staged(staged, problems, delay=delay)
    report = staged.stage_reports(0.0)
    assert max(worker.finished_s for worker in workers) < limit * report.bound_restore_s
    assert staged.restored
    assert not staged.failed
    for stage in report.stages[1:]:
        read = [span for span in stage.spans if span.kind is SpanKind.BOUNDARY]
        recomputed = sum("c" in column for column in stage.cells_KB)
        assert recomputed <= len(read) <= recomputed + 1, "boundaries are read for what is recomputed"


def test_reports_of_stages_and_of_the_whole_say_how_each_was_restored():
    sources = [FIRST, STORED]
    problems = [stage_problem(source, num_tokens=4096, num_blocks=5) for source in sources]
    staged = staged_for(problems, sources)
    run_staged(staged, problems)
    records = staged.stage_reports(0.0).as_dicts()
    assert [record["boundary_source"] for record in records] == ["first_stage", "stored"]
    assert records[0]["boundary_bytes"] == 0 < records[1]["boundary_bytes"]
    assert all(record["restore_s"] >= record["bound_restore_s"] > 0 for record in records)
    whole = staged.report(0.0, planning_s=0.5)
    assert all(len(column) == 10 for column in whole.cells_KB)
    assert whole.recomputed_cells + whole.loaded_cells == 10 * 8
    assert whole.recomputed_cells == sum(record["recomputed_cells"] for record in records)
    assert whole.restore_s == max(record["restore_s"] for record in records)
    assert {span.block_hi for span in whole.spans} >= {5, 10}
    assert whole.as_dict()["boundary_bytes"] == records[1]["boundary_bytes"]
