from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.plan.steadiness import STEADY_DROP, STEADY_SPREAD, ChunkTimes, judge


def chunk(num_tokens: int, offset: int, *seconds: float) -> ChunkTimes:
    return ChunkTimes(num_tokens=num_tokens, offset=offset, seconds=seconds)


def quiet(*factors: float) -> list[ChunkTimes]:
    """Chunks of three lengths at four offsets, each round slower by a factor."""
    return [
        chunk(length, offset, *((1e-3 * length + 1e-7 * length * offset) * factor for factor in factors))
        for length in (1, 256, 512)
        for offset in (0, 1024, 4096, 8192)
    ]


def test_rounds_that_agree_and_costs_that_rise_are_believed():
    found = judge(quiet(1.0, 1.1), cpu_share=1.9)
    assert (found.busy, found.complaint) == (False, "")
    assert (found.num_compared, found.spread, found.drop) == (12, pytest.approx(1.1), None)


def test_a_slow_round_is_said_with_its_numbers():
    times = quiet(1.0, 1.0)
    slow = next(i for i, each in enumerate(times) if (each.num_tokens, each.offset) == (512, 4096))
    times[slow] = chunk(512, 4096, 0.72, 5.0)
    found = judge(times)
    fastest_s = sum(min(each.seconds) for each in times)
    assert found.spread == pytest.approx((fastest_s + 5.0 - 0.72) / fastest_s)
    assert found.complaint.startswith("the machine was busy: the same 12 chunks took ")
    assert "worst: 512 tokens after 4,096 took 720 ms and 5 s" in found.complaint


def test_times_that_fall_with_the_offset_are_said_with_their_numbers():
    found = judge([chunk(512, 0, 0.812), chunk(512, 1024, 0.9), chunk(512, 4096, 0.42), chunk(64, 0, 9.0)])
    assert found.complaint == (
        "the machine was busy: 512 tokens took 900 ms after 1,024 tokens and only 420 ms after 4,096, although they "
        "attend to more"
    )


def test_short_chunks_may_cost_the_same_anywhere():
    times = [chunk(512, 0, 1.0, 1.0), chunk(512, 512, 1.0, 1.0), chunk(1, 0, 0.02, 0.02), chunk(1, 512, 0.01, 0.01)]
    assert judge(times).complaint == ""


def test_a_process_that_gets_little_of_a_processor_is_starved_however_steadily():
    found = judge(quiet(1.0, 1.0), cpu_share=0.35)
    assert found.busy
    assert "this process got 0.35 of a processor while it computed all the time" in found.complaint


def test_nobody_is_believed_whose_rounds_could_not_be_compared():
    once = judge(quiet(1.0))
    assert not once.busy
    assert once.spread == 1.0
    assert "cannot be told: in the time given 0 of 12 chunks were timed more than once" in once.complaint
    assert judge([]).complaint == ""


@given(
    rounds=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4),
    drop=st.floats(0.5, 1.0),
)
def test_a_machine_is_busy_where_rounds_or_offsets_differ_by_more_than_steady(rounds, drop):
    times = [chunk(512, 0, *rounds), chunk(512, 512, *(each * drop for each in rounds))]
    spread = max(rounds) / min(rounds)
    assert judge(times).busy is (spread > STEADY_SPREAD * (1 + 1e-12) or 1 / drop > STEADY_DROP * (1 + 1e-12)) or (
        abs(spread - STEADY_SPREAD) < 1e-9 or abs(1 / drop - STEADY_DROP) < 1e-9
    )
