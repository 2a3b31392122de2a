"""How far the host runs ahead of a device, and when the device did what; no torch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.restore.launch_queue import QUEUE_S, LaunchQueue
from support.one_stream import Device


def launch(queue, device, what, seconds, *, expected_s=None, ahead_s=100.0):
    expected_s = seconds if expected_s is None else expected_s
    queue.launch(what, device.record, lambda: device.work(seconds), expected_s=expected_s, now_s=ahead_s + device.now_s)


def test_device_time_comes_back_on_the_clock_of_the_host():
    device, queue = Device(), LaunchQueue()
    device.now_s = 7.0
    launch(queue, device, "a", 0.001)
    launch(queue, device, "b", 0.0005)
    assert queue.take_ended() == []
    device.now_s = 7.00125
    [first] = queue.take_ended()
    assert (first.what, first.start_s, first.end_s) == ("a", 107.0, pytest.approx(107.001))
    device.now_s = 8.0
    [second] = queue.take_ended()
    assert (second.what, second.start_s, second.end_s) == ("b", pytest.approx(107.001), pytest.approx(107.0015))
    launch(queue, device, "c", 0.001, ahead_s=100.5)  # the clocks drift apart, and are compared anew after a pause
    device.now_s = 9.0
    assert [(each.what, each.start_s) for each in queue.take_ended()] == [("c", 108.5)]


def test_the_host_waits_while_more_than_enough_is_queued_and_never_for_the_newest():
    device, queue = Device(), LaunchQueue()
    for index in range(3):
        launch(queue, device, index, QUEUE_S / 2)
    assert device.waited_for == [QUEUE_S / 2]  # then as much as is wanted is still queued
    launch(queue, device, "long", 10 * QUEUE_S)
    assert device.free_at_s not in device.waited_for
    assert device.free_at_s - device.now_s >= QUEUE_S


@given(st.lists(st.tuples(st.floats(1e-5, 0.02), st.floats(0.3, 3.0), st.booleans()), max_size=30))
def test_nothing_is_lost_and_the_device_never_runs_dry(pieces):
    """Whatever pieces really take: each comes back once and in sequence, and after a wait work is still queued."""
    device, queue, seen, asked = Device(), LaunchQueue(), [], []
    for index, (seconds, off, take) in enumerate(pieces):
        waits = len(device.waited_for)
        launch(queue, device, index, seconds, expected_s=seconds * off)
        asked.append(seconds)
        if len(device.waited_for) > waits:
            assert device.free_at_s > device.now_s
            assert device.free_at_s not in device.waited_for
        if take:
            seen += queue.take_ended()
    device.now_s = device.free_at_s
    seen += queue.take_ended()
    assert [each.what for each in seen] == list(range(len(pieces)))
    assert [each.end_s - each.start_s for each in seen] == pytest.approx(asked)


def test_what_is_expected_of_the_queue_stays_bounded():
    device, queue = Device(), LaunchQueue()
    for index in range(50):
        launch(queue, device, index, 0.0013)
        assert device.free_at_s - device.now_s <= QUEUE_S + 2 * 0.0013
