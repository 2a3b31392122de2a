"""Arrival processes have the rate and shape they state, and a retimed trace keeps its sessions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.arrivals import Bursts, Poisson, TraceTiming, Uniform, retime
from cacheflow.workloads.request import TraceRequest


def rng(seed=7):
    return np.random.Generator(np.random.PCG64(seed))


PROCESSES = (Poisson(4.0), Uniform(4.0), Bursts(4.0, burst_size=8))


@pytest.mark.parametrize("process", PROCESSES)
def test_rate_order_and_start(process):
    times = list(process.times_s(20_000, rng()))
    assert len(times) == 20_000
    assert times[0] == 0.0
    assert times == sorted(times)
    assert 20_000 / times[-1] == pytest.approx(4.0, rel=0.05)
    assert times == list(process.times_s(20_000, rng()))
    assert list(itertools.islice(process.times_s(None, rng()), 9)) == times[:9]
    assert list(process.times_s(0, rng())) == []


def test_shapes_differ():
    """Squared variation of the gaps: 1 for Poisson, 0 for equal gaps, 2 * 8 - 1 for bursts of 8."""
    spread = []
    for process in PROCESSES:
        gaps = np.diff(list(process.times_s(40_000, rng())))
        spread.append(gaps.var() / gaps.mean() ** 2)
    assert spread == pytest.approx([1.0, 0.0, 15.0], rel=0.1, abs=1e-6)


def test_seeds_differ():
    assert list(Poisson(1.0).times_s(5, rng(1))) != list(Poisson(1.0).times_s(5, rng(2)))


def test_impossible_processes_are_refused():
    for make in (
        lambda: Poisson(0.0), lambda: Uniform(-1.0), lambda: Bursts(math.inf, 2), lambda: TraceTiming(math.nan),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="must be a finite number above 0"):
            make()
    with pytest.raises(ConfigError, match=r"Bursts.burst_size 0 must be 1 or more"):
        Bursts(1.0, 0)


def request(request_id, arrival_s, *, session="", after=None, delay_s=0.0):
    return TraceRequest(
        request_id=request_id, arrival_s=arrival_s, input_tokens=5, output_tokens=1, block_ids=(request_id,),
        block_tokens=16, session_id=session, after=after, delay_s=delay_s,
    )  # fmt: skip


END_TO_END = [
    request(0, 0.0, session="a"),
    request(1, 30.0, session="a", after=0, delay_s=20.0),
    request(2, 40.0, session="b"),
    request(3, 41.0, session="b", after=2, delay_s=1.0),
    request(4, 50.0, session="c"),
]


def test_sessions_start_anew_and_turns_keep_their_distance():
    requests = list(retime(END_TO_END, Uniform(0.1), seed=0))
    assert [(r.session_id, r.arrival_s) for r in requests] == [
        ("a", 0.0), ("b", 10.0), ("b", 11.0), ("c", 20.0), ("a", 30.0),
    ]  # fmt: skip
    assert [r.request_id for r in requests] == [0, 1, 2, 3, 4]
    assert [r.after for r in requests] == [None, None, 1, None, 0]
    # Pauses and content are the sessions' own.
    assert [(r.block_ids, r.delay_s) for r in requests] == [((0,), 0), ((2,), 0), ((3,), 1.0), ((4,), 0), ((1,), 20.0)]


def test_the_traces_own_timing_stretches():
    requests = list(retime(END_TO_END, TraceTiming(0.5), seed=0))
    assert [r.arrival_s for r in requests] == [0.0, 15.0, 20.0, 20.5, 25.0]
    assert [r.delay_s for r in requests] == [0.0, 10.0, 0.0, 0.5, 0.0]
    assert [r.after for r in requests] == [r.after for r in END_TO_END]


def test_the_traces_own_timing_streams():
    endless = (request(number, float(number)) for number in itertools.count())
    assert next(retime(endless, TraceTiming(2.0), seed=0)).request_id == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1e6)), min_size=1, max_size=20),
    st.sampled_from(PROCESSES),
    st.integers(0, 5),
)
def test_any_trace_keeps_its_requests_and_its_chains(turns, process, seed):
    last, requests = {}, []
    for request_id, (session, arrival_s) in enumerate(sorted(turns, key=lambda turn: turn[1])):
        requests.append(request(request_id, arrival_s, session=str(session), after=last.get(session)))
        last[session] = request_id
    moved = list(retime(requests, process, seed))
    assert moved == list(retime(requests, process, seed))
    assert sorted(r.block_ids for r in moved) == sorted(r.block_ids for r in requests)
    assert [r.request_id for r in moved] == list(range(len(requests)))
    assert [r.arrival_s for r in moved] == sorted(r.arrival_s for r in moved)
    for r in moved:
        before = requests[r.block_ids[0]].after
        assert (None if r.after is None else moved[r.after].block_ids) == (None if before is None else (before,))


def test_a_turn_without_the_one_before_it_is_refused():
    with pytest.raises(TraceError, match="request 1: after is 0, which did not come before it"):
        list(retime(END_TO_END[1:], Poisson(1.0), seed=0))
