"""The worker's side over fake ports: real threads, faults, drops, cancellation; no torch."""

from __future__ import annotations

import threading
import time

import pytest

from cacheflow.plan.grid import Cell, Grid, Tile
from cacheflow.restore.step_executor import StepExecutor
from cacheflow.restore.work import ComputeWork, RankReport, ReadWork, StageWork
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeBuffer, FakeCompute, FakeTransfer, expected_value
from support.problems import transformer_problem
from support.virtual_steps import target_for
from support.waiting import eventually

PATIENCE_S = 10.0
GRID = Grid.regular(num_tokens=2048, chunk_tokens=512, num_blocks=3)
PROBLEM = transformer_problem(num_tokens=2048, suffix_tokens=0, num_blocks=3)


class GatedTransfer(FakeTransfer):
    """Placement and cancellation stop at a gate until the test opens it."""

    def __init__(self, buffer: FakeBuffer, **kwargs) -> None:
        super().__init__(buffer, **kwargs)
        self.may_place, self.may_cancel = threading.Event(), threading.Event()
        self.placing = threading.Event()
        self.placed: list[tuple[int, int]] = []
        self.may_place.set()
        self.may_cancel.set()

    def place(self, ticket) -> None:
        self.placing.set()
        assert self.may_place.wait(PATIENCE_S)
        super().place(ticket)
        self.placed.append(ticket.piece)

    def cancel(self, ticket) -> None:
        assert self.may_cancel.wait(PATIENCE_S)
        super().cancel(ticket)


class Worker:
    """A carrier with a buffer and ports per restoration."""

    def __init__(self, *restore_ids: int, poll_s: float = 0.002, **transfer_args) -> None:
        self.buffers = {each: FakeBuffer(GRID) for each in restore_ids}
        self.computes = {each: FakeCompute(self.buffers[each]) for each in restore_ids}
        self.transfers = {each: GatedTransfer(self.buffers[each], **transfer_args) for each in restore_ids}
        self.refused: set[int] = set()
        self.carrier = StepExecutor(self._ports, poll_s=poll_s)
        self.loads, self.computed, self.finished = [], [], []

    def _ports(self, target):
        if target.restore_id in self.refused:
            raise MemoryError("no blocks")
        return self.computes[target.restore_id], self.transfers[target.restore_id]

    def begin(self) -> None:
        for each in self.buffers:
            self.carrier.begin(target_for(PROBLEM, restore_id=each))

    def step(self, *orders: StageWork, wait_s: float = 0.0) -> RankReport:
        self.carrier.carry_out(orders, wait_s=wait_s)
        report = self.carrier.take_report()
        self.loads.extend(report.loads)
        self.computed.extend(report.computes)
        self.finished.extend(report.finished)
        return report

    def step_until(self, reached) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not reached():
            assert time.monotonic() < end_s, "never reached"
            self.step(wait_s=0.01)

    def outcomes(self, restore_id: int = 1) -> dict[tuple[int, int], LoadOutcome]:
        cells = [each.piece for each in self.loads if each.restore_id == restore_id]
        assert len(set(cells)) == len(cells), "a read is reported once"
        return {each.piece: each.outcome for each in self.loads if each.restore_id == restore_id}


@pytest.fixture
def worker():
    made = Worker(1, 2)
    made.begin()
    yield made
    for transfer in made.transfers.values():
        transfer.may_place.set()
        transfer.may_cancel.set()
    made.carrier.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "cacheflow-io"]


def reads(*cells: tuple[int, int], deadline_s: float = PATIENCE_S) -> tuple[ReadWork, ...]:
    return tuple(ReadWork(Cell(*cell), deadline_s) for cell in cells)


def column(chunk: int, lo: int = 0, hi: int = 3, **kwargs) -> ComputeWork:
    return ComputeWork(Tile(chunk, chunk + 1, lo, hi), **kwargs)


def test_reads_and_compute_restore_a_prefix_and_are_reported(worker):
    cells = [(chunk, block) for chunk in (3, 2) for block in range(3)]
    report = worker.step(StageWork(restore_id=1, reads=reads(*cells), compute=(column(0), column(1))))
    assert [(each.restore_id, each.first, len(each.seconds), each.error) for each in report.computes] == [(1, 0, 2, "")]
    assert report.computes[0].end_s >= sum(report.computes[0].seconds) > 0
    worker.step_until(lambda: len(worker.loads) == len(cells))
    assert set(worker.outcomes().values()) == {LoadOutcome.OK}
    assert all(each.num_bytes == 1000 and each.busy_s >= 0 and each.end_s > 0 for each in worker.loads)
    assert worker.buffers[1].is_right()
    assert not worker.finished
    worker.step(StageWork(restore_id=1, finish=True))
    assert worker.finished == [1]
    assert worker.computes[1].finished
    assert worker.computes[1].thread_ids == {threading.get_ident()}


def test_compute_orders_are_counted_over_steps(worker):
    first = worker.step(StageWork(restore_id=1, compute=(column(0, 0, 2), column(0, 2, 3))))
    second = worker.step(StageWork(restore_id=1, compute=(column(1, 0, 1), column(1, restart=True))))
    assert [report.computes[0].first for report in (first, second)] == [0, 2]
    assert worker.computes[1].height[:2] == [3, 3]


def test_the_sum_of_busy_times_is_no_more_than_what_went_by():
    worker = Worker(1, cell_s=0.004)
    worker.begin()
    start_s = time.perf_counter()
    worker.step(StageWork(restore_id=1, reads=reads(*((3, b) for b in range(3)), *((2, b) for b in range(3)))))
    worker.step_until(lambda: len(worker.loads) == 6)
    assert 0 < sum(each.busy_s for each in worker.loads) <= time.perf_counter() - start_s
    worker.carrier.close()


def test_a_lone_read_tells_how_long_its_tier_takes_to_answer():
    worker = Worker(1, cell_s=0.004)
    worker.begin()
    pieces = [(3, 0), (3, 1), (2, 0), (2, 1)]
    work = [ReadWork(Cell(*cell), PATIENCE_S, tier=3 - cell[0]) for cell in pieces]
    worker.transfers[1].outcome_of = lambda piece: LoadOutcome.MISS if piece == (2, 0) else LoadOutcome.OK
    worker.step(StageWork(restore_id=1, reads=tuple(work)))
    worker.step_until(lambda: len(worker.loads) == 4)
    samples = {each.piece: each.sample for each in worker.loads}
    assert samples[2, 0] is None
    assert samples[3, 0].width == 1
    assert samples[3, 0].took_s >= 0.004
    assert samples[3, 1].width == 2
    assert samples[2, 1].width == 2, "its tier was asked for another one already"
    assert all(sample.reads_per_s <= 250 for sample in samples.values() if sample is not None)
    worker.carrier.close()


@pytest.mark.parametrize("outcome", [LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR])
def test_a_read_that_fails_is_reported_and_freed(worker, outcome):
    worker.transfers[1].outcome_of = lambda cell: outcome if cell.block == 1 else LoadOutcome.OK
    worker.step(StageWork(restore_id=1, reads=reads((3, 0), (3, 1), (3, 2))))
    worker.step_until(lambda: len(worker.loads) == 3)
    assert worker.outcomes() == {(3, 0): LoadOutcome.OK, (3, 1): outcome, (3, 2): LoadOutcome.OK}
    assert worker.buffers[1].cells[3, 1] == -1
    eventually(lambda: all(ticket.freed for ticket in worker.transfers[1].tickets))


def test_a_store_that_cancels_on_its_own_is_an_error_not_the_answer_to_a_drop(worker):
    worker.transfers[1].outcome_of = lambda tile: LoadOutcome.CANCELLED
    worker.step(StageWork(restore_id=1, reads=reads((3, 0))))
    worker.step_until(lambda: worker.loads)
    assert worker.outcomes() == {(3, 0): LoadOutcome.ERROR}


@pytest.mark.parametrize("where", ["start", "wait", "place"])
def test_a_transfer_port_that_raises_costs_its_own_restoration_only(worker, where, caplog):
    worker.transfers[1].raise_in = where
    cells = [(3, block) for block in range(3)]
    orders = [StageWork(restore_id=each, reads=reads(*cells)) for each in (1, 2)]
    worker.step(*orders)
    worker.step_until(lambda: len(worker.loads) == 6)
    assert LoadOutcome.ERROR in worker.outcomes(1).values()
    assert set(worker.outcomes(2).values()) == {LoadOutcome.OK}
    assert f"raised on {where}" in caplog.text


def test_compute_that_raises_costs_its_own_restoration_only(worker, caplog):
    def fail(tile):
        if tile.chunk_lo == 1:
            raise RuntimeError("device lost")

    worker.computes[1].on_recompute = fail
    compute = (column(0), column(1), column(2))
    worker.step(*(StageWork(restore_id=each, compute=compute) for each in (1, 2)))
    broken, sound = worker.computed
    assert (len(broken.seconds), broken.error) == (1, "RuntimeError: device lost")
    assert (len(sound.seconds), sound.error) == (3, "")
    worker.step(StageWork(restore_id=1, compute=(column(3),), finish=True))
    assert len(worker.computed) == 2, "a broken restoration computes nothing more"
    assert not worker.finished
    worker.step(StageWork(restore_id=1, cancel=True))
    assert worker.finished == [1]
    assert "compute failed" in caplog.text


def test_ports_that_cannot_be_made_are_an_error_of_compute(caplog):
    worker = Worker(1, 2)
    worker.refused.add(1)
    worker.begin()
    worker.step(*(StageWork(restore_id=each, compute=(column(0),), reads=reads((3, 2))) for each in (1, 2)))
    assert [(each.restore_id, each.error) for each in worker.computed] == [(1, "MemoryError: no blocks"), (2, "")]
    worker.step_until(lambda: worker.loads)
    assert worker.outcomes(2) == {(3, 2): LoadOutcome.OK}
    worker.step(StageWork(restore_id=1, cancel=True))
    assert worker.finished == [1]
    assert "cannot begin" in caplog.text
    worker.carrier.close()


def test_a_device_that_fails_at_the_end_is_an_error_and_no_end(worker):
    def fail():
        raise RuntimeError("device lost")

    worker.computes[1].finish = fail
    worker.step(StageWork(restore_id=1, compute=(column(0),), finish=True))
    assert [each.error for each in worker.computed] == ["", "RuntimeError: device lost"]
    assert not worker.finished


def test_a_dropped_read_is_never_placed(worker):
    transfer = worker.transfers[1]
    transfer.outcome_of = lambda tile: None
    worker.step(StageWork(restore_id=1, reads=reads((3, 2), (3, 1))))
    eventually(lambda: len(transfer.tickets) == 2)
    report = worker.step(StageWork(restore_id=1, drops=((3, 2),), compute=(column(0),)))
    assert [(each.piece, each.outcome) for each in report.loads] == [(Cell(3, 2), LoadOutcome.CANCELLED)]
    for ticket in transfer.tickets:
        ticket.ready_s = 0.0
    worker.step_until(lambda: len(worker.loads) == 2)
    assert transfer.placed == [(3, 1)]
    assert worker.buffers[1].cells[3, 2] == -1
    eventually(lambda: all(ticket.freed for ticket in transfer.tickets))


def test_a_drop_waits_for_a_placement_that_has_begun(worker):
    transfer = worker.transfers[1]
    transfer.may_place.clear()
    worker.step(StageWork(restore_id=1, reads=reads((3, 2), (3, 1))))
    assert transfer.placing.wait(PATIENCE_S)
    threading.Timer(0.02, transfer.may_place.set).start()
    report = worker.step(StageWork(restore_id=1, drops=((3, 2), (3, 1))))
    assert worker.buffers[1].cells[3, 2] == expected_value(3, 2), "the copy was over before the drop returned"
    assert {(each.piece.block, each.outcome) for each in report.loads} == {
        (2, LoadOutcome.OK),
        (1, LoadOutcome.CANCELLED),
    }
    assert transfer.placed == [(3, 2)]


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_after_the_end_nothing_touches_anything(worker, end):
    transfer = worker.transfers[1]
    transfer.outcome_of = lambda tile: None
    worker.step(StageWork(restore_id=1, reads=reads((3, 2), (3, 1)), compute=(column(0),)))
    eventually(lambda: len(transfer.tickets) == 2)
    worker.step(StageWork(restore_id=1, **{end: True}))
    assert worker.finished == [1]
    for ticket in transfer.tickets:
        ticket.ready_s = 0.0
    eventually(lambda: all(ticket.freed for ticket in transfer.tickets))
    before = worker.buffers[1].cells.copy()
    worker.step(StageWork(restore_id=1, reads=reads((2, 2)), compute=(column(1),), cancel=True))
    assert (worker.buffers[1].cells == before).all()
    assert (transfer.placed, len(transfer.tickets), worker.finished) == ([], 2, [1])


def test_a_late_read_is_reported_at_its_deadline_and_kept_until_the_store_lets_go(worker):
    transfer = worker.transfers[1]
    transfer.outcome_of = lambda tile: None
    transfer.may_cancel.clear()
    worker.step(StageWork(restore_id=1, reads=reads((3, 2), deadline_s=0.01)))
    worker.step_until(lambda: worker.loads)
    assert worker.outcomes() == {(3, 2): LoadOutcome.LATE}
    assert worker.loads[0].end_s >= 0.01
    assert not transfer.tickets[0].freed
    transfer.may_cancel.set()
    eventually(lambda: transfer.tickets[0].freed)


@pytest.mark.parametrize("way", ["late", "drop", "cancel"])
def test_a_store_that_hangs_holds_up_nobody(worker, way):
    hung, sound = worker.transfers[1], worker.transfers[2]
    hung.outcome_of = lambda tile: None
    hung.may_cancel.clear()
    cells = [(3, block) for block in range(3)] + [(2, block) for block in range(3)]
    worker.step(StageWork(restore_id=1, reads=reads(*cells, deadline_s=0.01 if way == "late" else PATIENCE_S)))
    eventually(lambda: len(hung.tickets) == 6)
    if way == "late":
        worker.step_until(lambda: len(worker.loads) == 6)
    else:
        orders = {"drops": tuple(cells)} if way == "drop" else {"cancel": True}
        worker.step(StageWork(restore_id=1, **orders))
    worker.step(StageWork(restore_id=2, reads=reads(*cells), compute=(column(0), column(1))))
    worker.step_until(lambda: len(worker.outcomes(2)) == 6)
    assert worker.buffers[2].is_right()
    assert all(ticket.freed for ticket in sound.tickets)
    assert not any(ticket.freed for ticket in hung.tickets)


def test_a_step_with_nothing_to_compute_waits_for_one_read(worker):
    transfer = worker.transfers[1]
    transfer.outcome_of = lambda tile: None
    worker.step(StageWork(restore_id=1, reads=reads((3, 2), (3, 1))))
    eventually(lambda: len(transfer.tickets) == 2)
    timer = threading.Timer(0.02, lambda: setattr(transfer.tickets[0], "ready_s", 0.0))
    timer.start()
    report = worker.step(wait_s=PATIENCE_S)
    assert [each.piece.block for each in report.loads] == [2]
    timer.join()


def test_close_gives_everything_up():
    before = set(threading.enumerate())  # other tests' stores may still have threads of their own
    worker = Worker(1, 2)
    worker.begin()
    worker.transfers[1].outcome_of = lambda tile: None
    worker.step(*(StageWork(restore_id=each, reads=reads((3, 2), (3, 1))) for each in (1, 2)))
    eventually(lambda: len(worker.transfers[1].tickets) == 2)
    worker.carrier.close()
    worker.carrier.close()
    tickets = [ticket for transfer in worker.transfers.values() for ticket in transfer.tickets]
    eventually(lambda: all(ticket.freed for ticket in tickets))
    eventually(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("cacheflow-")])


def test_a_carrier_that_read_nothing_starts_no_thread():
    worker = Worker(1)
    worker.begin()
    before = threading.active_count()
    assert worker.step(wait_s=PATIENCE_S).idle
    worker.step(StageWork(restore_id=1, compute=(column(0),)))
    assert threading.active_count() == before
    worker.carrier.close()
