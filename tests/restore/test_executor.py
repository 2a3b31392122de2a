"""The executor over fake ports: threads, faults, deadlines, cancellation; no torch."""

from __future__ import annotations

import threading

import pytest

from cacheflow.errors import ConfigError, RestoreCancelled
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import Lane, SpanKind
from cacheflow.restore.executor import execute
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeBuffer, FakeCompute, FakeTransfer
from support.problems import shared_plan, transformer_problem, whole_chunk_plan
from support.waiting import eventually


class Setup:
    def __init__(
        self, *, suffix_tokens=64, cell_s=0.001, load_s=0.001, whole=False, num_tokens=2048, ratio=1.0
    ) -> None:
        self.problem = transformer_problem(
            num_tokens=num_tokens, suffix_tokens=suffix_tokens, num_blocks=5, ratio=ratio
        )
        self.plan = whole_chunk_plan(self.problem) if whole else shared_plan(self.problem)
        self.state = RestoreState(self.problem, self.plan, LiveRates(bytes_per_s=self.problem.link.bytes_per_s))
        self.buffer = FakeBuffer(self.problem.grid)
        self.compute = FakeCompute(self.buffer, cell_s=cell_s)
        self.transfer = FakeTransfer(self.buffer, cell_s=load_s)

    def begin_computing_when(self, condition):
        """Or a busy machine lets compute do it all before the link has begun."""
        recompute = self.compute.on_recompute

        def waiting(tile):
            eventually(condition)
            recompute(tile)

        self.compute.on_recompute = waiting

    def run(self, **kwargs):
        report = execute(self.state, self.compute, self.transfer, **kwargs)
        assert self.buffer.is_right()
        assert all(ticket.freed for ticket in self.transfer.tickets)
        assert not [t for t in threading.enumerate() if t.name == "cacheflow-io"]
        return report


@pytest.mark.parametrize("suffix_tokens", [0, 64])
@pytest.mark.parametrize("whole", [False, True])
def test_both_sides_restore_a_share_and_the_report_adds_up(suffix_tokens, whole):
    setup = Setup(suffix_tokens=suffix_tokens, whole=whole)
    setup.begin_computing_when(lambda: any(each.freed for each in setup.transfer.tickets))
    report = setup.run(planning_s=0.5)
    assert report.recomputed_cells + report.loaded_cells == 20
    assert report.recomputed_cells > 0
    assert report.loaded_cells > 0
    letters = "".join(report.cells_KB)
    assert (letters.count("c"), letters.count("l")) == (report.recomputed_cells, report.loaded_cells)
    assert report.planning_s == 0.5
    assert (report.ttft_s is None) == (suffix_tokens == 0)
    assert report.end_s >= report.restore_s > 0
    assert 0 < report.compute_busy <= 1
    assert 0 < report.io_busy <= 1
    assert setup.compute.finished
    assert setup.compute.thread_ids == {threading.get_ident()}
    assert report.as_dict()["recomputed_cells"] == report.recomputed_cells
    for lane in Lane:
        spans = [s for s in report.spans if s.lane is lane]
        assert all(0 <= s.start_s <= s.end_s for s in spans)
        assert all(s.start_s <= report.end_s for s in spans)


@pytest.mark.parametrize("outcome", [LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR])
def test_a_failed_read_is_recomputed_and_counted(outcome):
    setup = Setup()
    failed = []

    def outcome_of(tile):
        if not failed:
            failed.append(tile)
            return outcome
        return LoadOutcome.OK

    setup.transfer.outcome_of = outcome_of
    setup.begin_computing_when(lambda: any(each.freed and each.outcome is outcome for each in setup.transfer.tickets))
    report = setup.run()
    assert report.failed_loads == {outcome.value: 1}
    assert report.cells_KB[failed[0].chunk][failed[0].block] == "c"
    assert any(s.kind is SpanKind.FAILED for s in report.spans)


def test_a_read_that_hangs_is_late_and_recomputed():
    setup = Setup()
    setup.transfer.outcome_of = lambda piece: None if piece.chunk == 3 else LoadOutcome.OK
    setup.begin_computing_when(lambda: any(each.freed for each in setup.transfer.tickets))
    report = setup.run(options=ExecutorOptions(deadline=ReadDeadline(floor_s=0.02, factor=0.1)))
    assert report.failed_loads["late"] >= 1
    assert report.cells_KB[3].count("l") == 0


def test_a_read_whose_cell_compute_has_taken_back_is_given_up_at_once():
    """Long before its deadline: it would keep its place in the store, and in what may be under way."""
    setup = Setup(ratio=1.0)
    hung, seen = [], []

    def outcome_of(piece):
        if setup.transfer.tickets and not hung:
            hung.append(piece)
            return None
        return LoadOutcome.OK

    def on_recompute(tile):
        if hung and hung[0] in list(tile.cells()):
            (ticket,) = [each for each in setup.transfer.tickets if each.piece == hung[0]]
            eventually(lambda: ticket.freed)
            seen.append(tile)

    setup.transfer.outcome_of, setup.compute.on_recompute = outcome_of, on_recompute
    setup.begin_computing_when(lambda: hung)
    report = setup.run(options=ExecutorOptions(deadline=ReadDeadline(floor_s=60.0)))
    assert seen
    assert report.failed_loads == {}
    assert report.wasted_bytes == setup.problem.load_bytes_KB[hung[0]]


def test_a_dead_link_leaves_everything_to_compute():
    setup = Setup(ratio=0.2)
    setup.transfer.outcome_of = lambda tile: LoadOutcome.ERROR
    setup.begin_computing_when(lambda: any(each.freed for each in setup.transfer.tickets))
    report = setup.run()
    assert report.loaded_cells == 0
    assert report.failed_loads["error"] <= 4 + 3


@pytest.mark.parametrize("where", ["start", "wait", "place"])
def test_a_port_that_raises_closes_the_link_and_the_request_is_right(where, caplog):
    setup = Setup(ratio=0.5, whole=True)
    setup.transfer.raise_in = where
    setup.begin_computing_when(lambda: "transfer port raised" in caplog.text)
    report = setup.run()
    assert report.failed_loads.get("error", 0) >= 1
    assert "transfer port raised" in caplog.text


@pytest.mark.parametrize("when", ["before", "during"])
def test_cancel_leaves_nothing_running(when):
    setup = Setup(cell_s=0.005)
    cancel = threading.Event()
    if when == "before":
        cancel.set()
    setup.compute.on_recompute = lambda tile: cancel.set() if setup.buffer.cells.max() > 0 else None
    with pytest.raises(RestoreCancelled, match="cancelled after"):
        execute(setup.state, setup.compute, setup.transfer, cancel=cancel)
    assert all(ticket.freed for ticket in setup.transfer.tickets)
    assert not [t for t in threading.enumerate() if t.name == "cacheflow-io"]
    assert not setup.compute.finished


def test_compute_that_raises_stops_the_link_and_reaches_the_caller():
    setup = Setup()

    def fail(tile):
        raise RuntimeError("device lost")

    setup.compute.on_recompute = fail
    with pytest.raises(RuntimeError, match="device lost"):
        execute(setup.state, setup.compute, setup.transfer)
    assert all(ticket.freed for ticket in setup.transfer.tickets)


def test_nothing_to_restore_runs_the_suffix():
    report = Setup(num_tokens=0, suffix_tokens=32).run()
    assert report.restore_s == 0.0
    assert report.ttft_s is not None
    assert report.cells_KB == ()


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        (ExecutorOptions, {"max_reads_in_flight": 0}),
        (ExecutorOptions, {"poll_s": 0.0}),
        (ReadDeadline, {"floor_s": -1.0}),
        (ReadDeadline, {"factor": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(options, bad):
    ((key, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"{key}.* {value}"):
        options(**bad)
