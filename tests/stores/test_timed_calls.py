"""Calls that may hang, and the buffers they may still write to."""

import errno
import threading

import numpy as np
import pytest

import cacheflow.stores.timed_calls as timed_calls
from cacheflow.stores.staging import StagingBuffers, copy_record, gather
from cacheflow.stores.timed_calls import GivenUpError, TimedCalls, closes_in_time
from support.manual_clock import ManualClock
from support.store_objects import TIMEOUT_S


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def open_calls():
    """Makes calls, and lets those that hang end at the end of the test."""
    made, release = [], threading.Event()

    def make(clock, **options):
        made.append(TimedCalls("the server", clock=clock, **({"num_threads": 2, "timeout_s": 0.05} | options)))
        return made[-1]

    make.release = release
    yield make
    release.set()
    for each in made:
        each.close()


def test_a_call_returns_what_its_function_does_and_raises_what_it_raises(open_calls, clock):
    calls = open_calls(clock, timeout_s=TIMEOUT_S)
    assert calls.call(lambda: 7) == 7
    assert calls.call(lambda: None) is None
    with pytest.raises(KeyError):
        calls.call(lambda: {}["no"])
    assert calls.call(threading.get_ident) != threading.get_ident()


def test_a_call_that_hangs_is_given_up_and_says_when_it_ends(open_calls, clock):
    calls, ended = open_calls(clock), threading.Event()
    with pytest.raises(GivenUpError) as raised:
        calls.call(open_calls.release.wait, given_up=ended.set)
    assert raised.value.errno == errno.ETIMEDOUT
    assert "the server did not answer for 0.05 s" in str(raised.value)
    assert not ended.is_set()
    open_calls.release.set()
    assert ended.wait(TIMEOUT_S)


def test_what_hangs_while_it_closes_is_left_behind(open_calls, monkeypatch):
    assert closes_in_time(lambda: None)
    monkeypatch.setattr(timed_calls, "CLOSE_TIMEOUT_S", 0.01)
    assert not closes_in_time(open_calls.release.wait)


def test_after_one_that_hangs_others_fail_at_once_for_a_second(open_calls, clock):
    calls, carried_out = open_calls(clock, num_threads=4), []
    with pytest.raises(GivenUpError):
        calls.call(open_calls.release.wait)
    for check in (calls.check, lambda: calls.call(lambda: carried_out.append(1))):
        with pytest.raises(OSError, match="did not answer a moment ago"):
            check()
    assert not carried_out
    clock.now_s += 1.0
    assert calls.call(lambda: 7) == 7


def test_closed_calls_are_refused_and_say_whether_one_still_runs(open_calls, clock):
    idle, busy = open_calls(clock), open_calls(clock)
    assert idle.call(lambda: 7) == 7
    assert idle.close()
    with pytest.raises(OSError, match="the server is closed"):
        idle.call(lambda: 7)
    with pytest.raises(GivenUpError):
        busy.call(open_calls.release.wait)
    assert not busy.close()


def test_a_buffer_is_lent_again_after_its_transfer_and_not_before_a_given_up_one_ends():
    registered, dropped = [], []
    buffers = StagingBuffers(register=registered.append, unregister=dropped.append)

    def address(num_bytes):
        with buffers.lend(num_bytes) as (staging, _):
            assert staging.nbytes == num_bytes
            return staging.ctypes.data

    first = address(100)
    assert address(5000) == first
    with pytest.raises(RuntimeError), buffers.lend(100) as (staging, _):
        raise RuntimeError
    assert address(100) == first
    with pytest.raises(GivenUpError), buffers.lend(100) as (staging, give_back):
        raise GivenUpError
    with buffers.lend(100) as (other, _):
        assert other.ctypes.data != staging.ctypes.data == first
    give_back()
    assert {address(100), address(100)} & {first, other.ctypes.data}
    assert len(registered) == 2
    with buffers.lend(3 << 20) as (staging, _):
        assert len(registered) == 3
    assert len(dropped) == 1, "no more of them than transfers at once"


def test_a_buffer_that_cannot_be_registered_is_an_error():
    def refuse(_):
        raise OSError(errno.ENOMEM, "no room")

    with pytest.raises(OSError, match="no room"), StagingBuffers(register=refuse).lend(1):
        pass


@pytest.mark.parametrize(
    ("num_bytes", "returned"), [(0, -4096), (4095, -1), (4096, 0), (4100, 4), (4106, 10), (4107, 11)]
)
def test_a_record_is_copied_as_far_as_the_buffers_go(num_bytes, returned):
    record = np.full(num_bytes, 7, np.uint8)
    header, payload = bytearray(4096), bytearray(10)
    assert copy_record(record, memoryview(header), memoryview(payload)) == returned
    assert bytes(header) == (b"\7" * 4096 if returned >= 0 else bytes(4096))
    num_copied = returned if 0 <= returned <= 10 else 0
    assert bytes(payload) == (b"\7" * num_copied).ljust(10, b"\0")


def test_parts_are_gathered_one_after_the_other():
    staging = np.zeros(6, np.uint8)
    gather([memoryview(b"ab"), memoryview(b"cdef")], staging)
    assert staging.tobytes() == b"abcdef"


def test_without_a_thread_a_call_fails_and_holds_up_no_closing(open_calls, clock, monkeypatch):
    calls = open_calls(clock)
    with monkeypatch.context() as lacking:
        lacking.setattr(threading.Thread, "start", _refuse)
        with pytest.raises(OSError, match="the server was not called: no thread could be started"):
            calls.call(lambda: 7)
    assert calls.call(lambda: 7) == 7
    assert calls.close()


def _refuse(_thread):
    raise RuntimeError("can't start new thread")
