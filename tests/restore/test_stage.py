"""The scheduler's side of a stepped restoration: orders, reports, failures, and how near the bound it ends."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Cell, Tile
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.read_window import ReadSample
from cacheflow.plan.report import Lane, SpanKind
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.restore import stage_reads
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.restore.stage import StageRestoration
from cacheflow.restore.stage_reads import MAX_READS, MIN_READS, StageReads
from cacheflow.restore.work import ComputeReport, LoadReport, RankReport, StepReport
from cacheflow.state.board import RESIDENT, Board, CellState
from cacheflow.state.compute_side import ComputeSide
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome
from cacheflow.vllm.scheduler.pace import IDLE_COMPUTE_BUDGET_S, READ_AHEAD_S
from support.examples import examples
from support.problems import shared_plan, transformer_problem, whole_chunk_plan
from support.virtual_steps import VirtualSteps, run_steps, stepped_for, target_for

NUM_BLOCKS = 4


def small_problem(**kwargs):
    args = {"num_tokens": 2048, "suffix_tokens": 0, "num_blocks": NUM_BLOCKS, **kwargs}
    return transformer_problem(**args)


class Scheduler:
    """A stepped restoration with the reports written by hand."""

    def __init__(self, *, plan=shared_plan, problem=None, **kwargs) -> None:
        self.problem = problem or small_problem()
        self.stepped = stepped_for(self.problem, plan(self.problem), **kwargs)
        self.now_s = 0.0
        self.num_computed = 0

    def next_work(self, *, compute_budget_s=1e-6, read_ahead_s=1e-6):
        self.now_s += 0.01
        return self.stepped.next_work(self.now_s, compute_budget_s=compute_budget_s, read_ahead_s=read_ahead_s)

    def tell(self, rank=0, **kwargs) -> None:
        self.stepped.apply(StepReport({rank: RankReport(**kwargs)}), self.now_s)

    def computed(self, orders, rank=0, **kwargs) -> None:
        seconds = (0.01,) * len(orders.compute)
        first = kwargs.pop("first", self.num_computed)
        self.tell(rank, computes=(ComputeReport(restore_id=7, first=first, seconds=seconds, **kwargs),))

    def loaded(self, *cells, rank=0, outcome=LoadOutcome.OK, busy_s=0.01) -> None:
        self.tell(rank, loads=tuple(self.load(*cell, outcome=outcome, busy_s=busy_s) for cell in cells))

    def load(self, chunk, block, *, outcome=LoadOutcome.OK, busy_s=0.01, restore_id=7):
        piece = Cell(chunk, block)
        return LoadReport(restore_id=restore_id, piece=piece, outcome=outcome, num_bytes=512 * 768, busy_s=busy_s)

    def cell(self, chunk, block):
        return self.stepped.state.board.state(chunk, block)

    @property
    def rates(self):
        return self.stepped.state.rates


def cells_of(reads):
    return [read.piece for read in reads]


def load_plan(problem):
    return make_policy("load").plan(problem)


# Orders


def test_no_budget_orders_no_compute_and_any_budget_orders_one_unit():
    scheduler = Scheduler()
    assert scheduler.next_work(compute_budget_s=0.0).compute == ()
    (order,) = scheduler.next_work(compute_budget_s=1e-9).compute
    assert order.tile == Tile(0, 1, 0, 1)


def test_compute_builds_on_what_was_ordered_before_and_joins_what_continues():
    scheduler = Scheduler(problem=small_problem(num_tokens=8192))
    cell_s = float(scheduler.problem.compute_KB[0, 0])
    (first,) = scheduler.next_work(compute_budget_s=2.5 * cell_s).compute
    second = scheduler.next_work(compute_budget_s=2.5 * cell_s).compute
    assert first.tile == Tile(0, 1, 0, 2), "the budget holds two cells, not a third"
    assert [order.tile for order in second] == [Tile(0, 1, 2, 4), Tile(1, 2, 0, 1)]
    assert [order.kv_only_top for order in second] == [True, False]


def test_a_whole_tile_is_spread_over_steps():
    scheduler = Scheduler(plan=whole_chunk_plan)
    cell_s = float(scheduler.problem.compute_KB[0, 0])
    tiles = [scheduler.next_work(compute_budget_s=1.5 * cell_s).compute[0].tile for _ in range(5)]
    assert tiles == [*(Tile(0, 1, block, block + 1) for block in range(4)), Tile(1, 2, 0, 1)]


def test_an_unbounded_budget_orders_all_there_is_when_nothing_is_loaded():
    problem = small_problem()
    scheduler = Scheduler(problem=problem, plan=lambda problem: replace(shared_plan(problem), load_sequence=()))
    orders = scheduler.next_work(compute_budget_s=math.inf)
    assert [order.tile for order in orders.compute] == [Tile(k, k + 1, 0, NUM_BLOCKS) for k in range(4)]
    assert orders.finish
    assert orders.reads == ()


def test_compute_takes_no_more_than_a_share_of_what_is_left_while_the_link_works():
    scheduler = Scheduler(problem=small_problem(num_blocks=30, num_tokens=4096))
    first = scheduler.next_work(compute_budget_s=math.inf)
    ordered_s = sum(scheduler.problem.compute_KB[cell] for order in first.compute for cell in order.tile.cells())
    assert 0 < ordered_s < 0.3 * bound(scheduler.problem).restore_s
    assert not first.finish


def test_reads_are_kept_ahead_by_time_and_by_number():
    problem = small_problem(num_blocks=30, num_tokens=8192)
    cell_s = float(problem.load_bytes_KB[0, 0]) / problem.link.bytes_per_s
    scheduler = Scheduler(problem=problem)
    assert scheduler.next_work(compute_budget_s=0.0, read_ahead_s=0.0).reads == ()
    assert not scheduler.stepped.loads_under_way
    assert len(scheduler.next_work(compute_budget_s=0.0, read_ahead_s=1e-9).reads) == MIN_READS
    assert len(scheduler.next_work(compute_budget_s=0.0, read_ahead_s=4.5 * cell_s).reads) == 5 - MIN_READS
    assert scheduler.stepped.loads_under_way
    many = scheduler.next_work(compute_budget_s=0.0, read_ahead_s=math.inf).reads
    assert len(many) == MAX_READS - 5


def test_a_store_that_takes_long_to_answer_has_so_much_more_under_way():
    """What steps call for, and what the latency does, from the first reports on and in later restorations too."""
    problem = small_problem(num_blocks=30, num_tokens=8192)
    cell_s = float(problem.load_bytes_KB[0, 0]) / problem.link.bytes_per_s
    scheduler = Scheduler(problem=problem)
    first, _ = cells_of(scheduler.next_work(compute_budget_s=0.0, read_ahead_s=1e-9).reads)
    report = replace(scheduler.load(*first, busy_s=cell_s), num_bytes=int(problem.load_bytes_KB[0, 0]))
    sample = ReadSample(took_s=5 * cell_s, width=1, reads_per_s=1.0 / cell_s)
    scheduler.tell(loads=(replace(report, sample=sample),))
    work = scheduler.next_work(compute_budget_s=0.0, read_ahead_s=4.0 * cell_s)
    assert len(work.reads) == math.ceil(4.0 + 1.5 * 5) - 1
    assert {read.tier for read in work.reads} == {0}
    again = RestoreState(problem, shared_plan(problem), scheduler.rates)
    reads = StageReads(again, num_ranks=1, can_compute=True)
    assert len(reads.next_reads(1.0, 1e-9)) == math.ceil(1.5 * 5)
    assert reads.next_reads(1.1, 0.0) == ()


def test_a_far_store_has_no_more_under_way_than_memory_is_set_aside_for(monkeypatch):
    problem = small_problem(num_blocks=30, num_tokens=8192)
    cell_bytes = int(problem.load_bytes_KB[0, 0])
    cell_s = cell_bytes / problem.link.bytes_per_s
    scheduler = Scheduler(problem=problem)
    scheduler.rates.windows[0].learn(ReadSample(took_s=40 * cell_s, width=1, reads_per_s=1.0 / cell_s))
    monkeypatch.setattr(stage_reads, "MAX_BYTES", 10 * cell_bytes)
    assert len(scheduler.next_work(compute_budget_s=0.0, read_ahead_s=4.0 * cell_s).reads) == 10


def test_a_read_may_take_longer_the_more_is_under_way():
    problem = small_problem()
    cell_s = float(problem.load_bytes_KB[0, 0]) / problem.link.bytes_per_s
    scheduler = Scheduler(problem=problem, deadline=ReadDeadline(floor_s=1.0, factor=2.0))
    reads = scheduler.next_work(compute_budget_s=0.0, read_ahead_s=2.5 * cell_s).reads
    assert [read.deadline_s for read in reads] == pytest.approx([1.0 + 2 * n * cell_s for n in (1, 2, 3)])


def test_orders_and_reports_pickle():
    orders = Scheduler().next_work()
    assert pickle.loads(pickle.dumps(orders)) == orders


def test_ordered_compute_lies_ahead_until_it_is_reported():
    problem = small_problem()
    rates = LiveRates(bytes_per_s=1e6, compute_factor=2.0)
    compute = ComputeSide(problem, shared_plan(problem), rates, Board(problem), min_claim_s=0.0)
    compute.ask(0.1, 1.0)
    compute.ask(0.2, 1.0)
    assert compute.left_s(1.0) == pytest.approx(0.6)
    assert compute.left_s(1.25) == pytest.approx(0.35), "workers are at it"
    compute.note_done(0.1, 1.3)
    assert compute.left_s(1.3) == pytest.approx(0.4), "what comes after it begins now"
    assert compute.left_s(9.0) == 0.0


# Reports


def test_a_cell_is_loaded_once_all_ranks_have_it_and_the_slowest_sets_the_rate():
    scheduler = Scheduler(num_ranks=3)
    reads = scheduler.next_work(compute_budget_s=0.0).reads
    cell = cells_of(reads)[0]
    for rank, busy_s in ((0, 0.02), (2, 5.0)):
        scheduler.loaded(cell, rank=rank, busy_s=busy_s)
        scheduler.loaded(cell, rank=rank, busy_s=busy_s)
        assert scheduler.cell(*cell) is CellState.LOADING
    before = scheduler.rates.bytes_per_s
    scheduler.loaded(cell, rank=1, busy_s=0.02)
    assert scheduler.cell(*cell) is CellState.LOADED
    assert scheduler.rates.bytes_per_s < before / 10


def test_compute_is_observed_at_the_pace_of_the_slowest_rank():
    scheduler = Scheduler(num_ranks=2)
    orders = scheduler.next_work()
    predicted_s = float(scheduler.problem.compute_KB[0, 0])
    for rank, factor in ((0, 1.0), (1, 7.0)):
        assert scheduler.rates.compute_factor == 1.0
        report = ComputeReport(restore_id=7, first=0, seconds=(factor * predicted_s,))
        scheduler.tell(rank, computes=(report,))
    assert len(orders.compute) == 1
    assert scheduler.rates.compute_factor == pytest.approx((0.85 * 2 + 7) / (0.85 * 2 + 1))


@pytest.mark.parametrize("outcome", [LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR, LoadOutcome.LATE])
def test_one_rank_that_fails_fails_the_cell_for_all_and_the_others_are_told(outcome):
    scheduler = Scheduler(num_ranks=2)
    cell = cells_of(scheduler.next_work(compute_budget_s=0.0).reads)[0]
    scheduler.loaded(cell, rank=1, outcome=outcome)
    assert scheduler.cell(*cell) is CellState.OPEN
    assert scheduler.next_work(compute_budget_s=0.0).drops == (cell,)
    scheduler.loaded(cell, rank=0)
    assert scheduler.cell(*cell) is CellState.OPEN, "a report that comes after the cell was given up"
    assert scheduler.stepped.report(1.0).failed_loads == {outcome.value: 1}


def test_compute_that_takes_over_a_read_drops_it_and_that_is_no_failure():
    scheduler = Scheduler(problem=small_problem(num_tokens=512))
    reads = cells_of(scheduler.next_work(compute_budget_s=0.0, read_ahead_s=1.0).reads)
    assert reads[:2] == [(0, 3), (0, 2)]
    scheduler.loaded((0, 3), outcome=LoadOutcome.MISS)
    drops, orders = [], None
    for _ in range(9):
        orders = scheduler.next_work(compute_budget_s=1.0, read_ahead_s=0.0)
        drops.extend(orders.drops)
        if orders.finish:
            break
    assert orders.finish
    assert drops == reads[1:]
    before = scheduler.stepped.state._failed_in_row  # noqa: SLF001 -- a streak that shows only when it closes the link
    scheduler.loaded(*drops, outcome=LoadOutcome.CANCELLED)
    assert scheduler.stepped.state._failed_in_row == before == 1  # noqa: SLF001
    assert not scheduler.stepped.state.link.in_flight_bytes
    report = scheduler.stepped.report(1.0)
    assert report.cells_KB == ("cccc",)
    assert report.failed_loads["miss"] == 1


def test_a_read_that_was_placed_before_its_drop_arrived_counts_as_wasted():
    scheduler = Scheduler(problem=small_problem(num_tokens=512))
    scheduler.next_work(compute_budget_s=0.0, read_ahead_s=1.0)
    scheduler.loaded((0, 3), outcome=LoadOutcome.MISS)
    for _ in range(9):
        scheduler.next_work(compute_budget_s=1.0, read_ahead_s=0.0)
    scheduler.loaded((0, 2))
    assert scheduler.stepped.report(1.0).wasted_bytes == 512 * 768
    assert scheduler.stepped.state.restored


@pytest.mark.parametrize("outcome", [LoadOutcome.CANCELLED, LoadOutcome.OK])
def test_a_read_that_nobody_dropped_and_nobody_has_falls_to_compute(outcome):
    scheduler = Scheduler(num_ranks=2)
    cell = cells_of(scheduler.next_work(compute_budget_s=0.0).reads)[0]
    scheduler.loaded(cell, rank=0, outcome=outcome)
    scheduler.loaded(cell, rank=1, outcome=LoadOutcome.CANCELLED)
    assert scheduler.cell(*cell) is CellState.OPEN
    assert cell not in cells_of(scheduler.next_work(compute_budget_s=0.0).reads)


def test_reports_of_what_is_unknown_change_nothing():
    scheduler = Scheduler()
    orders = scheduler.next_work()
    scheduler.loaded((0, 0), (3, 0), (2, 2))
    scheduler.tell(loads=(scheduler.load(3, 3, restore_id=8),), finished=(8,))
    scheduler.computed(orders, first=40)
    scheduler.tell(5, computes=(ComputeReport(restore_id=8, first=0, seconds=(9.0,), error="other"),))
    assert scheduler.cell(3, 3) is CellState.LOADING
    assert scheduler.rates.compute_factor == 1.0
    assert scheduler.stepped.error == ""
    assert not scheduler.stepped.done


def test_link_that_fails_over_and_over_is_closed_and_compute_restores_the_rest():
    scheduler = Scheduler(problem=small_problem(ratio=0.25))
    num_failed = 0
    for _ in range(100):
        orders = scheduler.next_work(compute_budget_s=1e-9, read_ahead_s=1.0)
        if orders.finish:
            break
        num_failed += len(orders.reads)
        scheduler.loaded(*cells_of(orders.reads), outcome=LoadOutcome.ERROR)
    assert orders.finish
    assert 4 <= num_failed < 16
    assert set("".join(scheduler.stepped.report(1.0).cells_KB)) == {"c"}


# The end


def test_it_finishes_when_every_rank_has_reported_it():
    scheduler = Scheduler(
        num_ranks=2, plan=lambda problem: replace(shared_plan(problem), load_sequence=()), problem=small_problem()
    )
    orders = scheduler.next_work(compute_budget_s=math.inf)
    assert orders.finish
    assert scheduler.next_work().idle, "told once"
    scheduler.computed(orders, rank=0)
    scheduler.tell(0, finished=(7,))
    scheduler.tell(0, finished=(7,))
    assert not scheduler.stepped.done
    assert scheduler.stepped.resident_tokens() == 0, "as far as the other rank has told"
    scheduler.computed(orders, rank=1)
    scheduler.tell(1, finished=(7,))
    assert scheduler.stepped.done
    assert not scheduler.stepped.failed
    assert scheduler.stepped.resident_tokens() == 2048
    assert scheduler.stepped.report(99.0).restore_s == pytest.approx(scheduler.now_s - 0.01)


def test_compute_that_fails_ends_the_restoration_as_failed():
    scheduler = Scheduler()
    orders = scheduler.next_work()
    scheduler.computed(orders)
    scheduler.num_computed = 1
    scheduler.next_work(compute_budget_s=1.0)
    report = ComputeReport(restore_id=7, first=1, seconds=(), error="RuntimeError: device lost")
    scheduler.tell(computes=(report,))
    assert scheduler.stepped.failed
    assert scheduler.stepped.error == "RuntimeError: device lost"
    assert scheduler.stepped.resident_tokens() == 0
    last = scheduler.next_work()
    assert (last.cancel, last.finish, last.compute, last.reads) == (True, False, (), ())
    assert scheduler.next_work().idle
    scheduler.tell(finished=(7,))
    assert scheduler.stepped.done


def test_compute_that_fails_at_the_finish_is_cancelled_after_all():
    scheduler = Scheduler(plan=lambda problem: replace(shared_plan(problem), load_sequence=()))
    assert scheduler.next_work(compute_budget_s=math.inf).finish
    scheduler.tell(computes=(ComputeReport(restore_id=7, first=0, seconds=(), error="device lost"),))
    assert scheduler.next_work().cancel
    assert scheduler.stepped.failed


def test_cancel_gives_up_and_reports_do_no_harm_afterwards():
    scheduler = Scheduler()
    orders = scheduler.next_work()
    scheduler.stepped.cancel()
    assert scheduler.next_work().cancel
    assert scheduler.next_work().idle
    scheduler.loaded(*cells_of(orders.reads), outcome=LoadOutcome.CANCELLED)
    scheduler.computed(orders)
    assert not scheduler.stepped.done
    scheduler.tell(finished=(7,))
    assert scheduler.stepped.done
    assert not scheduler.stepped.failed
    scheduler.stepped.cancel()
    assert scheduler.next_work().idle


def test_cancel_before_the_first_order_still_asks_the_workers_to_end_it():
    scheduler = Scheduler()
    scheduler.stepped.cancel()
    assert scheduler.next_work().cancel


def test_close_link_leaves_the_rest_to_compute():
    scheduler = Scheduler(problem=small_problem(ratio=0.25))
    under_way = cells_of(scheduler.next_work(compute_budget_s=0.0).reads)
    scheduler.stepped.close_link()
    orders = scheduler.next_work(compute_budget_s=math.inf, read_ahead_s=1.0)
    assert orders.reads == ()
    scheduler.loaded(*under_way)
    assert scheduler.next_work(compute_budget_s=math.inf, read_ahead_s=1.0).finish


# Load only


def test_load_only_restores_without_compute():
    scheduler = Scheduler(plan=load_plan, can_compute=False)
    for _ in range(40):
        orders = scheduler.next_work(compute_budget_s=math.inf)
        assert orders.compute == ()
        if orders.finish:
            break
        scheduler.loaded(*cells_of(orders.reads))
    assert orders.finish
    assert scheduler.stepped.resident_tokens() == 2048
    assert not scheduler.stepped.failed


def test_load_only_fails_with_the_leading_part_that_is_there():
    scheduler = Scheduler(plan=load_plan, can_compute=False)
    seen, drops = set(), set()
    for _ in range(40):
        orders = scheduler.next_work(read_ahead_s=1e-9)
        if orders.cancel:
            break
        drops.update(orders.drops)
        for cell in cells_of(orders.reads):
            seen.add(cell)
            scheduler.loaded(cell, outcome=LoadOutcome.MISS if cell == (2, 1) else LoadOutcome.OK)
    assert orders.cancel
    assert scheduler.stepped.failed
    assert scheduler.stepped.resident_tokens() == 1024
    assert all(chunk <= 2 for chunk, _ in seen), "nothing behind a hole is of use"


def test_load_only_needs_a_plan_that_loads_everything():
    with pytest.raises(ConfigError, match="may only load"):
        Scheduler(can_compute=False)


def test_a_step_without_reads_does_not_fail_a_load_only_restoration():
    scheduler = Scheduler(plan=load_plan, can_compute=False)
    assert scheduler.next_work(read_ahead_s=0.0).idle
    assert not scheduler.stepped.failed
    assert scheduler.next_work().reads


def test_without_compute_and_link_it_is_given_up_though_others_read():
    """Not only when it would be its turn to read: who cannot read any more never gets a turn."""
    scheduler = Scheduler(plan=load_plan, can_compute=False)
    reads = cells_of(scheduler.next_work().reads)
    scheduler.stepped.close_link()
    assert not scheduler.next_work(read_ahead_s=0.0).cancel, "what is under way may still come"
    scheduler.loaded(*reads)
    assert scheduler.next_work(read_ahead_s=0.0).cancel
    assert scheduler.stepped.failed


@pytest.mark.parametrize("problem", [small_problem(suffix_tokens=32), small_problem(num_tokens=512)])
def test_a_target_of_another_grid_or_a_suffix_is_refused(problem):
    state = stepped_for(small_problem(), shared_plan(small_problem())).state
    other = stepped_for(small_problem(), shared_plan(small_problem()))
    state.problem = problem
    with pytest.raises(ConfigError, match="needs a grid of as many, without a suffix"):
        StageRestoration(other.target, state)


def test_resident_tokens_count_from_the_start_of_the_target():
    problem = small_problem()
    stepped = StageRestoration(
        target_for(problem, start=48, object_start=0), stepped_for(problem, shared_plan(problem)).state
    )
    assert stepped.resident_tokens() == 48


# A whole restoration by a virtual clock


def test_the_report_adds_up():
    problem = transformer_problem(num_tokens=4096, suffix_tokens=0)
    stepped = stepped_for(problem, shared_plan(problem))
    worker = VirtualSteps(problem, stepped, budget_s=IDLE_COMPUTE_BUDGET_S, read_ahead_s=READ_AHEAD_S).run()
    report = stepped.report(worker.now, planning_s=0.25)
    assert report.recomputed_cells + report.loaded_cells == 8 * 30
    assert report.loaded_bytes == report.loaded_cells * 512 * 768
    assert report.restore_s == pytest.approx(worker.now)
    assert report.planning_s == 0.25
    assert report.ttft_s is None
    assert report.compute_busy == pytest.approx(worker.compute_s / worker.now)
    assert report.io_busy > 0.8
    lanes = {lane: [span for span in report.spans if span.lane is lane] for lane in Lane}
    assert len(lanes[Lane.IO]) == report.loaded_cells
    assert {span.kind for span in lanes[Lane.IO]} == {SpanKind.LOAD}
    covered = {(s.chunk, b) for s in lanes[Lane.COMPUTE] for b in range(s.block_lo, s.block_hi)}
    assert len(covered) == report.recomputed_cells


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("num_chunks", [8, 16, 32])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 2, 4])
def test_an_idle_engine_ends_near_the_bound(ratio, num_chunks, delay):
    problem = transformer_problem(num_tokens=512 * num_chunks, suffix_tokens=0, ratio=ratio)
    plan = make_policy("cacheflow").plan(problem)
    worker = run_steps(problem, plan, budget_s=IDLE_COMPUTE_BUDGET_S, read_ahead_s=READ_AHEAD_S, delay=delay)
    assert worker.finished_s <= 1.08 * bound(problem).restore_s


@settings(max_examples=examples(60))
@given(
    num_tokens=st.integers(1, 4000),
    num_blocks=st.integers(1, 9),
    ratio=st.floats(0.05, 20),
    policy=st.sampled_from(sorted(RESTORE_POLICIES)),
    budget_s=st.sampled_from([1e-9, 0.002, 0.025, math.inf]),
    read_ahead_s=st.sampled_from([1e-9, 0.01, 0.06, 10.0]),
    delay=st.integers(1, 4),
    cost_error=st.floats(0.3, 3),
    bandwidth_error=st.floats(0.3, 3),
)
def test_any_plan_budget_and_delay_restores_every_cell(
    num_tokens, num_blocks, ratio, policy, budget_s, read_ahead_s, delay, cost_error, bandwidth_error
):
    args = {"num_tokens": num_tokens, "suffix_tokens": 0, "ratio": ratio, "num_blocks": num_blocks}
    truth = transformer_problem(**args)
    planned = transformer_problem(**args, cost_error=cost_error, bandwidth_error=bandwidth_error)
    stepped = stepped_for(planned, make_policy(policy).plan(planned))
    VirtualSteps(truth, stepped, budget_s=budget_s, read_ahead_s=read_ahead_s, delay=delay).run()
    grid = truth.grid
    assert {stepped.state.board.state(k, b) for k in range(grid.num_chunks) for b in range(num_blocks)} <= set(RESIDENT)
    assert stepped.resident_tokens() == num_tokens
