"""A restoration over stages: what stages share, how a chunk is handed over, and how near the bound it ends."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Boundary, Cell, Tile
from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import SpanKind
from cacheflow.restore.pipeline import PipelineRestoration
from cacheflow.restore.step_executor import StepExecutor
from cacheflow.restore.work import ComputeReport, ComputeWork, LoadReport, RankReport, StageWork, StepReport
from cacheflow.state.board import BoundaryState
from cacheflow.state.restoration import RestoreState
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
        self.num_computed = [0] * self.num_ranks
        self.now_s = 0.0

    def next_work(self, *, compute_budget_s=1e-9, read_ahead_s=1e-9):
        self.now_s += 0.01
        return self.staged.next_work(self.now_s, compute_budget_s=compute_budget_s, read_ahead_s=read_ahead_s).by_stage

    def loaded(self, rank, *cells, outcome=LoadOutcome.OK) -> None:
        loads = tuple(
            LoadReport(restore_id=7, piece=piece, outcome=outcome, num_bytes=1000, busy_s=0.01)
            for piece in (each if isinstance(each, Boundary) else Cell(*each) for each in cells)
        )
        self.staged.apply(StepReport({rank: RankReport(loads=loads)}), self.now_s)

    def computed(self, rank, count, *, first=0, error="") -> None:
        report = ComputeReport(restore_id=7, first=first, seconds=(0.01,) * count, error=error)
        self.staged.apply(StepReport({rank: RankReport(computes=(report,))}), self.now_s)

    def boundary(self, stage, chunk):
        return self.staged.stages[stage].state.boundaries.state(chunk)


def reads_of(orders):
    return [read.piece for read in orders.reads]


# Boundary states


def test_a_stage_reads_the_boundaries_of_the_head_before_anything_and_keys_and_values_from_the_tail():
    scheduler = Scheduler(FIRST, STORED)
    first, later = scheduler.next_work(read_ahead_s=0.1)
    assert reads_of(first)[0] == (3, 2)
    assert not any(isinstance(read.piece, Boundary) for read in first.reads)
    assert [isinstance(read.piece, Boundary) for read in later.reads[:3]] == [True, True, False]
    assert reads_of(later)[:3] == [Boundary(0), Boundary(1), (3, 2)]
    assert first.compute
    assert not later.compute, "nothing to recompute from yet"


def test_compute_waits_until_every_rank_of_the_stage_has_the_boundary():
    scheduler = Scheduler(FIRST, STORED, ranks_per_stage=2)
    scheduler.next_work()
    scheduler.loaded(2, Boundary(0))
    assert scheduler.boundary(1, 0) is BoundaryState.READING
    assert not scheduler.next_work()[1].compute
    scheduler.loaded(3, Boundary(0))
    assert scheduler.boundary(1, 0) is BoundaryState.RESIDENT
    assert scheduler.next_work()[1].compute[0].tile == Tile(0, 1, 0, 1)


@pytest.mark.parametrize("outcome", [LoadOutcome.MISS, LoadOutcome.LATE, LoadOutcome.CORRUPT, LoadOutcome.ERROR])
def test_a_lost_boundary_leaves_its_chunk_and_all_later_ones_to_the_link(outcome):
    scheduler = Scheduler(FIRST, STORED)
    scheduler.next_work()
    scheduler.loaded(1, Boundary(0))
    scheduler.loaded(1, Boundary(1), outcome=outcome)
    assert not any(scheduler.staged.stages[1].state.boundaries.computable(chunk) for chunk in (1, 2, 3))
    chunks, reads = set(), set()
    for _ in range(20):
        orders = scheduler.next_work(compute_budget_s=math.inf, read_ahead_s=math.inf)[1]
        chunks |= {order.tile.chunk_lo for order in orders.compute}
        reads |= set(reads_of(orders))
        scheduler.loaded(1, *reads_of(orders))
    assert chunks <= {0}
    assert {(chunk, block) for chunk in (1, 2, 3) for block in range(3)} <= reads
    assert Boundary(2) not in reads, "nothing is read that cannot be used"
    assert not scheduler.staged.failed


def test_a_lost_boundary_makes_a_plan_that_loads_nothing_load():
    scheduler = Scheduler(FIRST, STORED, policy="recompute")
    assert reads_of(scheduler.next_work(read_ahead_s=math.inf)[1]) == [Boundary(0), Boundary(1)]
    scheduler.loaded(1, Boundary(1), outcome=LoadOutcome.MISS)
    scheduler.loaded(1, Boundary(0), outcome=LoadOutcome.MISS)
    reads = reads_of(scheduler.next_work(read_ahead_s=math.inf)[1])
    assert {cell for cell in reads if isinstance(cell, Cell)} == {
        (chunk, block) for chunk in range(4) for block in range(3)
    }


@pytest.mark.parametrize("policy", ["cacheflow", "cacheflow_v1", "cacheflow_v2", "cake", "recompute"])
def test_without_any_boundary_a_stage_loads_everything_whatever_its_plan(policy):
    scheduler = Scheduler(FIRST, STORED, policy=policy, ratio=3.0)
    reads = set()
    for _ in range(60):
        orders = scheduler.next_work(compute_budget_s=math.inf, read_ahead_s=math.inf)[1]
        assert not orders.compute
        for cell in reads_of(orders):
            reads.add(cell)
            scheduler.loaded(1, cell, outcome=LoadOutcome.MISS if isinstance(cell, Boundary) else LoadOutcome.OK)
    assert {cell for cell in reads if isinstance(cell, Cell)} == {
        (chunk, block) for chunk in range(4) for block in range(3)
    }
    assert scheduler.staged.stages[1].restored


def test_what_can_be_neither_loaded_nor_recomputed_ends_every_stage_before_that_chunk():
    scheduler = Scheduler(FIRST, STORED)
    first, later = scheduler.next_work(read_ahead_s=0.1)
    scheduler.loaded(1, Boundary(0))
    scheduler.loaded(1, Boundary(1), outcome=LoadOutcome.MISS)
    lost = next(cell for cell in reads_of(later) if isinstance(cell, Cell))
    scheduler.loaded(1, lost, outcome=LoadOutcome.MISS)
    assert [stage.limit for stage in scheduler.staged.stages] == [4, lost[0]]
    orders = scheduler.next_work(compute_budget_s=math.inf, read_ahead_s=math.inf)
    assert [stage.limit for stage in scheduler.staged.stages] == [lost[0]] * 2
    assert set(orders[0].drops) == {cell for cell in reads_of(first) if cell[0] >= lost[0]}
    for each in orders:
        assert all(read.piece.chunk < lost[0] for read in each.reads)
    assert not scheduler.staged.failed, "what lies before it is still restored"


def test_a_stage_at_its_end_waits_for_the_others_and_all_fail_at_the_same_chunk():
    scheduler = Scheduler(FIRST, NONE)
    first, later = scheduler.next_work(read_ahead_s=math.inf)
    reads = reads_of(later)
    assert all(chunk >= 2 for chunk, _ in reads_of(first)), "of no use once the other stage has lost chunk 2"
    scheduler.computed(0, len(first.compute))
    count = len(first.compute)
    scheduler.loaded(1, *[cell for cell in reads if cell[0] < 2])
    scheduler.loaded(1, *[cell for cell in reads if cell[0] == 2], outcome=LoadOutcome.MISS)
    scheduler.loaded(1, *[cell for cell in reads if cell[0] == 3], outcome=LoadOutcome.CANCELLED)
    first, later = scheduler.next_work(compute_budget_s=1e-9, read_ahead_s=0.1)
    assert first.compute
    assert not later.cancel
    assert not scheduler.staged.failed, "the first stage has work left"
    for _ in range(30):
        count_now = len(first.compute)
        scheduler.computed(0, count_now, first=count)
        scheduler.loaded(0, *reads_of(first))
        count += count_now
        first, later = scheduler.next_work(compute_budget_s=math.inf, read_ahead_s=0.1)
        assert all(read.chunk < 2 for read in first.reads)
        assert all(order.tile.chunk_lo < 2 for order in first.compute)
        if later.cancel:
            break
    assert first.cancel
    assert scheduler.staged.failed
    assert scheduler.staged.resident_tokens() == scheduler.staged.target.chunk_ends[1]
    assert scheduler.staged.resident_tokens() == 1024


# What stages share


def test_a_compute_error_on_one_stage_ends_all():
    scheduler = Scheduler(FIRST, STORED, STORED)
    orders = scheduler.next_work()
    scheduler.computed(0, 0, error="device lost")
    orders = scheduler.next_work()
    orders = [a if a.cancel else b for a, b in zip(orders, scheduler.next_work(), strict=True)]
    assert all(each.cancel for each in orders)
    assert scheduler.staged.failed
    assert scheduler.staged.error == "device lost"
    assert scheduler.staged.resident_tokens() == 0
    for rank in range(3):
        scheduler.staged.apply(StepReport({rank: RankReport(finished=(7,))}), 1.0)
    assert scheduler.staged.done


def test_a_cancellation_reaches_every_stage():
    scheduler = Scheduler(FIRST, HANDED, STORED)
    scheduler.next_work()
    scheduler.staged.cancel()
    assert all(each.cancel and not each.compute for each in scheduler.next_work())
    assert not scheduler.staged.failed


def test_reports_go_to_the_stage_of_their_rank():
    scheduler = Scheduler(FIRST, STORED, ranks_per_stage=2)
    cell = reads_of(scheduler.next_work()[0])[0]
    scheduler.loaded(0, cell)
    scheduler.loaded(1, cell)
    assert scheduler.staged.stages[0].report(0.0).loaded_cells == 1
    assert scheduler.staged.stages[1].report(0.0).loaded_cells == 0


def test_while_a_stage_waits_for_its_boundary_the_others_keep_the_step_short():
    waits = Scheduler(FIRST, STORED, num_blocks=20).next_work(compute_budget_s=math.inf)[0].compute
    alone = Scheduler(FIRST, NONE, num_blocks=20).next_work(compute_budget_s=math.inf)[0].compute
    assert sum(order.tile.num_cells for order in waits) < sum(order.tile.num_cells for order in alone)


def test_what_does_not_fit_is_refused():
    problem = stage_problem(FIRST, num_tokens=2048, num_blocks=3)
    handed = RestoreState(problem, shared_plan(problem), LiveRates(bytes_per_s=1e6), source=HANDED)
    with pytest.raises(ConfigError, match="needs a first stage"):
        PipelineRestoration(target_for(problem), [handed])
    with pytest.raises(ConfigError, match="hands nothing over"):
        Scheduler(FIRST, NONE, HANDED)


def test_a_stage_waits_once_for_the_boundary_it_awaits_whatever_is_ordered_meanwhile():
    scheduler = Scheduler(FIRST, STORED, num_blocks=20)
    awaited_s = (
        1.1 * scheduler.staged.stages[1].state.problem.boundary_bytes_K[0] / scheduler.problems[1].link.bytes_per_s
    )
    first, second, third = (scheduler.next_work(compute_budget_s=1.0) for _ in range(3))
    assert first[1].wait_s == pytest.approx(awaited_s, rel=0.1)
    assert first[0].wait_s == 0.0, "it has work"
    assert second[1].wait_s + third[1].wait_s <= 0.1 * awaited_s
    scheduler.loaded(1, Boundary(0))
    assert scheduler.next_work(compute_budget_s=1.0)[1].wait_s == 0.0
    assert Scheduler(FIRST, STORED, num_blocks=20).next_work(compute_budget_s=0.0)[1].wait_s == 0.0, (
        "nobody may compute"
    )


# Handing over


def run_steps(scheduler, count, **budgets):
    """Orders of so many steps, each carried out at once by every stage; nothing is read."""
    steps = []
    for _ in range(count):
        steps.append(scheduler.next_work(read_ahead_s=0.0, **budgets))
        for rank, orders in enumerate(steps[-1]):
            scheduler.computed(rank, len(orders.compute), first=scheduler.num_computed[rank])
            scheduler.num_computed[rank] += len(orders.compute)
    return steps


def test_every_chunk_is_received_in_the_step_behind_its_send_before_anything_is_computed_from_it():
    scheduler = Scheduler(FIRST, HANDED, HANDED, ratio=4.0)
    received = [set(), set(), set()]
    sent_before = [(), ()]
    sends = 0
    for orders in run_steps(scheduler, 14):
        assert orders[1].receives == sent_before[0]
        assert orders[2].receives == sent_before[1]
        for stage in (1, 2):
            received[stage] |= set(orders[stage].receives)
            assert {order.tile.chunk_lo for order in orders[stage].compute} <= received[stage]
        sent_before = [tuple(o.tile.chunk_lo for o in each.compute if o.sends) for each in orders[:2]]
        sends += sum(map(len, sent_before))
        assert not any(order.sends for order in orders[2].compute), "nobody is above"
    assert sends >= 4


def test_stages_recompute_cell_by_cell_and_send_when_the_top_block_is_through():
    scheduler = Scheduler(FIRST, HANDED, ratio=4.0)
    tiles = [(order.tile, order.sends) for orders in run_steps(scheduler, 3) for order in orders[0].compute]
    assert tiles == [(Tile(0, 1, 0, 1), False), (Tile(0, 1, 1, 2), False), (Tile(0, 1, 2, 3), True)]


def test_the_top_block_of_a_chunk_that_is_handed_over_is_computed_in_full_and_only_there():
    scheduler = Scheduler(FIRST, HANDED, ratio=4.0)
    tops = [
        [order for orders in run for order in orders if order.tile.block_hi == 3]
        for run in zip(*[[each.compute for each in step] for step in run_steps(scheduler, 9)], strict=True)
    ]
    assert all(tops)
    assert all(order.sends and not order.kv_only_top for order in tops[0][:2])
    assert all(order.kv_only_top and not order.sends for order in tops[1])


def test_a_chunk_that_the_stage_above_has_loaded_is_not_sent():
    scheduler = Scheduler(FIRST, HANDED, ratio=4.0)
    upper = scheduler.staged.stages[1].state
    for block in (2, 1, 0):
        for chunk in (3, 2, 1):
            while upper.board.state(chunk, block).name == "OPEN":
                upper.claim_load(0.0)
    assert upper.board.state(1, 0).name == "LOADING"
    sent = [o.tile.chunk_lo for orders in run_steps(scheduler, 9) for o in orders[0].compute if o.sends]
    assert sent == [0]


def test_what_the_stage_below_loads_is_left_to_the_link_once_it_is_through():
    scheduler = Scheduler(FIRST, HANDED, ratio=0.3)
    for _ in range(30):
        orders = scheduler.next_work(read_ahead_s=math.inf)
        scheduler.loaded(0, *reads_of(orders[0]))
        if scheduler.staged.stages[0].settled:
            break
    assert scheduler.staged.stages[0].settled
    scheduler.next_work(read_ahead_s=0.0)
    above = scheduler.staged.stages[1].state
    loaded = [chunk for chunk in range(4) if scheduler.boundary(1, chunk) is not BoundaryState.RESIDENT]
    assert loaded
    assert not any(above.boundaries.computable(chunk) for chunk in loaded)


@pytest.mark.parametrize("last", ["cancel", "finish"])
def test_what_is_on_its_way_is_received_in_the_last_step_too(last):
    """A send that nobody receives would be taken for another chunk's."""
    scheduler = Scheduler(FIRST, HANDED, ratio=4.0)
    sent = ()
    while not sent:
        (orders,) = run_steps(scheduler, 1)
        sent = tuple(order.tile.chunk_lo for order in orders[0].compute if order.sends)
    if last == "cancel":
        scheduler.staged.cancel()
    else:
        above = scheduler.staged.stages[1].state
        above.expect_activations([math.inf] * 4, 0.0)
        above.rates.observe_load(num_bytes=1 << 40, busy_s=1.0)
        while (cell := above.claim_load(0.0)) is not None:
            above.begin_place(cell)
            above.complete_load(cell, 0.0)
    orders = scheduler.next_work()[1]
    assert orders.cancel == (last == "cancel")
    assert orders.finish == (last == "finish")
    assert orders.receives == sent


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
    carriers = [StepExecutor(lambda target, index=index: ports[index]) for index in range(2)]
    return carriers, computes, pipe


def chunk_orders(*, count=3):
    below = tuple(ComputeWork(Tile(chunk, chunk + 1, 0, 3), sends=True) for chunk in range(count))
    above = tuple(ComputeWork(Tile(chunk, chunk + 1, 0, 3)) for chunk in range(count))
    receives = tuple(range(count))
    return StageWork(restore_id=7, compute=below), StageWork(restore_id=7, receives=receives, compute=above)


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
        reports = [each.take_report().computes[0] for each in (below, above)]
        assert [(len(report.seconds), bool(report.error)) for report in reports] == [(1, True), (0, True)]
        assert not pipe, "every send met its receive"
        # Orders that were on their way when it failed.
        below.carry_out([StageWork(restore_id=7, compute=orders[0].compute[:1])])
        assert list(pipe) == [(0, True)]
        above.carry_out([StageWork(restore_id=7, receives=(0,), compute=orders[1].compute[:1])])
        assert not pipe
        below.carry_out([StageWork(restore_id=7, compute=orders[0].compute[:1])])
        above.carry_out([StageWork(restore_id=7, receives=(0,), cancel=True)])
        assert not pipe, "taken by a restoration that ends with this step"
        assert below.take_report().idle
        assert above.take_report().finished == (7,)
    finally:
        for carrier in (below, above):
            carrier.close()


class Answers:
    """What answers for a restoration that could not begin."""

    def __init__(self) -> None:
        self.answered: list[tuple[str, int]] = []

    def receive(self, chunk: int) -> None:
        self.answered.append(("received", chunk))

    def send(self, chunk: int, *, failed: bool) -> None:
        assert failed
        self.answered.append(("sent", chunk))


def test_a_restoration_that_cannot_begin_is_answered_for():
    answers = Answers()

    def no_ports(target):
        raise RuntimeError("no memory")

    carrier = StepExecutor(no_ports, make_answers=lambda target: answers)
    try:
        carrier.begin(target_for(stage_problem(FIRST, num_tokens=2048, num_blocks=3)))
        below, _ = chunk_orders(count=2)
        carrier.carry_out([replace(below, receives=(0,))])
        carrier.carry_out([StageWork(restore_id=7, receives=(1,), cancel=True)])
        assert answers.answered == [("received", 0), ("sent", 0), ("sent", 1), ("received", 1)]
        assert "no memory" in carrier.take_report().computes[0].error
    finally:
        carrier.close()


def test_a_send_that_fails_is_answered_too():
    (below, above), computes, pipe = carrier_pair()
    send = computes[0].send

    def broken_send(chunk, *, failed):
        if not failed:
            raise RuntimeError("no memory")
        send(chunk, failed=True)

    computes[0].send = broken_send
    try:
        for carrier in (below, above):
            carrier.begin(target_for(stage_problem(FIRST, num_tokens=2048, num_blocks=3)))
        below.carry_out([chunk_orders(count=2)[0]])
        assert list(pipe) == [(0, True), (1, True)]
    finally:
        for carrier in (below, above):
            carrier.close()


def test_what_is_lost_behind_a_finite_expectation_is_loaded_however_much_later():
    scheduler = Scheduler(FIRST, HANDED, ratio=1.0)
    state = scheduler.staged.stages[1].state
    state.expect_activations([0.1] * 4, 0.0)
    before = sum(1 for _ in iter(lambda: state.claim_load(0.0), None))
    assert 0 < before < 12, "the link leaves some of it to compute"
    state.end_activations()
    assert before + sum(1 for _ in iter(lambda: state.claim_load(5000.0), None)) == 12


def test_ports_that_know_no_stages_fail_their_restoration_only():
    grid = stage_problem(FIRST, num_tokens=2048, num_blocks=3).grid
    buffer = StageBuffer(grid)
    carrier = StepExecutor(lambda target: (FakeCompute(buffer), FakeTransfer(buffer)), poll_s=0.001)
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


@pytest.mark.parametrize("block", range(4))
def test_handing_over_ends_whatever_costs_turn_out_to_be(block):
    """Planned costs unlike true ones: what was expected of the stage below does not come, or comes late."""
    for seed in range(100 * block, 100 * block + 30):
        rng = np.random.default_rng(seed)
        tokens, ratio = int(rng.integers(1, 6)) * 512, float(10 ** rng.uniform(-0.7, 0.7))
        blocks = [int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 3, 12]))]
        ratios = [ratio, ratio * float(10 ** rng.uniform(-0.2, 0.7))]
        wrong = [float(10 ** rng.uniform(-0.4, 0.2)), float(10 ** rng.uniform(-0.2, 0.4))]
        planned, true = (
            [
                stage_problem(source, num_tokens=tokens, num_blocks=num, ratio=each * error)
                for source, num, each, error in zip((FIRST, HANDED), blocks, ratios, errors, strict=True)
            ]
            for errors in ([1.0, 1.0], wrong)
        )
        staged = staged_for(planned, [FIRST, HANDED])
        run_staged(staged, true, delay=int(rng.integers(1, 3)))
        assert staged.restored, f"seed {seed}"
