"""The worker's side over a device that works on after a call: seconds and ends are reported late; no torch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.plan.grid import Grid, Tile
from cacheflow.restore.launch_queue import QUEUE_S
from cacheflow.restore.step_executor import StepExecutor
from cacheflow.restore.work import ComputeWork, StageWork
from support.fake_ports import FakeBuffer, FakeCompute, FakeTransfer
from support.one_stream import Device
from support.problems import transformer_problem
from support.virtual_steps import target_for

GRID = Grid.regular(num_tokens=2048, chunk_tokens=512, num_blocks=3)
PROBLEM = transformer_problem(num_tokens=2048, suffix_tokens=0, num_blocks=3)


class LateCompute(FakeCompute):
    """Asks a device for as many seconds as are next in line."""

    def __init__(self, buffer: FakeBuffer, device: Device, seconds: list[float]) -> None:
        super().__init__(buffer)
        self.device, self.seconds = device, seconds

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        super().recompute(tile, kv_only_top=kv_only_top)
        self.device.work(self.seconds.pop(0))

    def record(self):
        return self.device.record()


class LateWorker:
    """A carrier over one device, with restorations 1 and 2; pieces take the seconds given, in sequence."""

    def __init__(self, *seconds: float) -> None:
        self.device, self.left = Device(), list(seconds)
        self.carrier = StepExecutor(self._ports, clock=lambda: 100.0 + self.device.now_s)
        self.computes, self.finished = [], []
        for restore_id in (1, 2):
            self.carrier.begin(target_for(PROBLEM, restore_id=restore_id))

    def _ports(self, target):
        buffer = FakeBuffer(GRID)
        return LateCompute(buffer, self.device, self.left), FakeTransfer(buffer)

    def step(self, *work: StageWork, wait_s: float = 0.0):
        self.carrier.carry_out(work, wait_s=wait_s)
        report = self.carrier.take_report()
        self.computes.extend(report.computes)
        self.finished.extend(report.finished)
        return report


def column(chunk: int, lo: int = 0, hi: int = 3, *, expected_s: float = 0.0) -> ComputeWork:
    return ComputeWork(Tile(chunk, chunk + 1, lo, hi), expected_s=expected_s)


def test_seconds_are_the_devices_own_and_come_once_it_is_done():
    worker = LateWorker(0.25, 0.5)
    assert worker.step(StageWork(restore_id=1, compute=(column(0), column(1)))).computes == ()
    worker.device.now_s = 0.25
    assert [(each.first, each.seconds, each.end_s) for each in worker.step().computes] == [(0, (0.25,), 0.25)]
    worker.device.now_s = 1.0
    assert [(each.first, each.seconds, each.end_s) for each in worker.step().computes] == [(1, (0.5,), 0.75)]
    assert worker.device.waited_for == []


def test_it_is_finished_when_the_device_is_and_nobody_waits():
    worker = LateWorker(0.25, 0.5)
    assert worker.step(StageWork(restore_id=1, compute=(column(0), column(1)), finish=True)).idle
    worker.device.now_s = 0.5
    assert worker.step().finished == ()
    assert not worker.carrier.idle
    worker.device.now_s = 0.75
    report = worker.step()
    assert report.finished == (1,)
    assert [each.seconds for each in worker.computes] == [(0.25,), (0.5,)], "before the end all seconds are known"
    assert worker.device.waited_for == []


def test_what_is_given_up_is_over_at_once_and_its_seconds_still_count():
    worker = LateWorker(0.25, 0.5)
    worker.step(StageWork(restore_id=1, compute=(column(0),)), StageWork(restore_id=2, compute=(column(0),)))
    assert worker.step(StageWork(restore_id=1, cancel=True)).finished == (1,)
    worker.device.now_s = 1.0
    worker.step(StageWork(restore_id=2, finish=True))
    assert [(each.restore_id, each.seconds) for each in worker.computes] == [(1, (0.25,)), (2, (0.5,))]
    assert worker.finished == [1, 2]


def test_an_end_that_is_cancelled_comes_once():
    worker = LateWorker(0.25)
    worker.step(StageWork(restore_id=1, compute=(column(0),), finish=True))
    worker.step(StageWork(restore_id=1, cancel=True))
    worker.device.now_s = 1.0
    worker.step()
    assert worker.finished == [1]


def test_a_failure_is_told_at_once_and_what_ran_before_it_later(caplog):
    worker = LateWorker(0.25)  # nothing is left for the second piece
    report = worker.step(StageWork(restore_id=1, compute=(column(0), column(1)), finish=True))
    assert [(each.first, each.seconds) for each in report.computes] == [(0, ())]
    assert report.computes[0].error.startswith("IndexError")
    worker.device.now_s = 1.0
    assert [(each.first, each.seconds, each.error) for each in worker.step().computes] == [(0, (0.25,), "")]
    assert worker.finished == []
    assert "compute failed" in caplog.text


def test_the_device_gets_no_more_than_enough_ahead():
    """As expected: what was asked before the newest piece is waited for down to ``QUEUE_S``."""
    piece_s = 0.75 * QUEUE_S
    worker = LateWorker(*[piece_s] * 4)
    worker.step(StageWork(restore_id=1, compute=tuple(column(chunk, expected_s=piece_s) for chunk in range(4))))
    assert worker.device.waited_for == pytest.approx([piece_s, 2 * piece_s])
    assert worker.device.free_at_s - worker.device.now_s == pytest.approx(2 * piece_s)


def test_a_step_with_nothing_to_do_waits_for_a_piece_and_no_longer_than_it_may():
    worker = LateWorker(0.25)
    worker.step(StageWork(restore_id=1, compute=(column(0),)))
    assert worker.step(wait_s=0.001).idle
    worker.device.now_s = 0.25
    assert worker.step(wait_s=60.0).computes
    assert worker.device.waited_for == []


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2]), st.floats(1e-4, 0.02), st.floats(0.0, 0.02), st.booleans()),
        max_size=8,
    )
)
def test_every_piece_is_reported_once_in_sequence_and_before_the_end(steps):
    worker = LateWorker(*[seconds for _, seconds, _, _ in steps])
    given_to: dict[int, list[float]] = {1: [], 2: []}
    asked = {1: 0, 2: 0}
    for restore_id, seconds, moves_s, with_report in steps:
        if asked[restore_id] == 12:
            continue
        chunk, block = divmod(asked[restore_id], 3)
        asked[restore_id] += 1
        given_to[restore_id].append(seconds)
        work = StageWork(restore_id=restore_id, compute=(column(chunk, block, block + 1, expected_s=seconds),))
        worker.carrier.carry_out([work])
        if with_report:
            worker.step()
        worker.device.now_s += moves_s
    worker.step(*(StageWork(restore_id=each, finish=True) for each in (1, 2)))
    worker.device.now_s = worker.device.free_at_s
    worker.step()
    assert sorted(worker.finished) == [1, 2]
    for restore_id, seconds in given_to.items():
        reports = [each for each in worker.computes if each.restore_id == restore_id]
        assert [each.first for each in reports] == list(range(len(seconds)))
        assert [each.seconds[0] for each in reports] == pytest.approx(seconds)
