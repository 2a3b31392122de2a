"""The survey of chunk costs on a clock that the test moves: what a round, a limit and a busy machine do to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.plan.steadiness import judge
from cacheflow.profiling.survey import ChunkCost, ChunkPoint, Survey, Surveyor, median_cost

LENGTHS, OFFSETS = (1, 256, 512), (0, 512, 1024, 2048, 4096, 8192)


def true_s(point: ChunkPoint) -> float:
    return 1e-3 * point.num_tokens + 2e-7 * point.num_tokens * point.offset + 1e-2


class Machine:
    """A clock, and a compute port that moves it; ``slow(now_s)`` is how many times as long work takes then."""

    def __init__(self, slow: Callable[[float], float] = lambda now_s: 1.0) -> None:
        self.now_s = 100.0
        self.asked: list[ChunkPoint] = []
        self._slow = slow

    def clock(self) -> float:
        return self.now_s

    def measure(self, point: ChunkPoint) -> ChunkCost:
        self.asked.append(point)
        seconds = true_s(point) * self._slow(self.now_s - 100.0)
        self.now_s += seconds
        return ChunkCost(full_s=seconds, kv_only_s=0.1 * seconds)

    def survey(self, *, limit_s: float = 1e9, rounds: int = 2, **options) -> Survey:
        surveyor = Surveyor(self.measure, lengths=LENGTHS, offsets=OFFSETS, rounds=rounds)
        return surveyor.survey(limit_s=limit_s, clock=self.clock, **options)


def complaint(found: Survey) -> str:
    return judge(found.times(num_layers=1)).complaint


WHOLE_S = sum(true_s(ChunkPoint(length, offset)) for length in LENGTHS for offset in OFFSETS)


def test_everything_is_measured_round_by_round_where_time_allows():
    steps: list[tuple[int, int]] = []
    machine = Machine()
    found = machine.survey(on_step=lambda done, total: steps.append((done, total)))
    assert found.offsets == OFFSETS
    assert found.num_measured == found.num_wanted == 2 * len(LENGTHS) * len(OFFSETS)
    assert steps == [(done, 36) for done in range(1, 37)]
    assert machine.asked[:18] == machine.asked[18:] == list(found.costs)
    assert found.seconds == pytest.approx(2 * WHOLE_S)
    assert {len(rounds) for rounds in found.costs.values()} == {2}
    assert complaint(found) == ""


def test_what_the_time_does_not_allow_is_the_far_end_and_the_rest_is_repeated():
    found = Machine().survey(limit_s=WHOLE_S)
    assert found.offsets == OFFSETS[: len(found.offsets)]
    assert 2 <= len(found.offsets) < len(OFFSETS)
    assert set(found.costs) == {ChunkPoint(length, offset) for length in LENGTHS for offset in found.offsets}
    assert {len(rounds) for rounds in found.costs.values()} == {2}
    assert found.num_measured < found.num_wanted


@given(limit_s=st.floats(0.01, 3 * WHOLE_S), rounds=st.integers(1, 3))
def test_a_steady_machine_keeps_the_limit(limit_s, rounds):
    """Nothing is begun that is expected to end later, but for what nothing is known of: the first offsets."""
    found = Machine().survey(limit_s=limit_s, rounds=rounds)
    unknown_s = max(true_s(ChunkPoint(512, offset)) for offset in OFFSETS[:3])
    assert found.seconds <= limit_s + unknown_s
    if len(found.offsets) == len(OFFSETS) and rounds > 1:
        assert found.seconds >= WHOLE_S


def test_a_machine_that_becomes_busy_is_noticed_in_the_next_round():
    found = Machine(lambda now_s: 1.0 if now_s < WHOLE_S else 2.5).survey()
    assert "the same 18 chunks took" in complaint(found)
    assert "2.50 times as long" in complaint(found)


def test_a_machine_that_becomes_quiet_in_the_first_round_is_noticed_by_times_that_fall():
    found = Machine(lambda now_s: 6.0 if now_s < WHOLE_S else 1.0).survey(rounds=1)
    assert "and only" in complaint(found)
    costs = {point: median_cost(rounds).full_s for point, rounds in found.costs.items()}
    assert costs[ChunkPoint(512, 0)] > costs[ChunkPoint(512, 8192)]


def test_a_machine_that_becomes_busy_does_not_keep_the_user_for_ever():
    """Ten times as slow from the first offsets on: the far end is left out, and the bound held but for one chunk."""
    found = Machine(lambda now_s: 10.0 if now_s > 1.0 else 1.0).survey(limit_s=2 * WHOLE_S)
    assert found.offsets != OFFSETS
    assert found.seconds <= 2 * WHOLE_S + 10 * true_s(ChunkPoint(512, 8192))
    assert complaint(found)


def test_without_time_for_two_offsets_nothing_is_repeated():
    found = Machine().survey(limit_s=0.5)
    assert len(found.offsets) < 2
    assert found.num_measured < 6


def test_keys_and_values_alone_never_cost_more_than_all():
    kept = median_cost([ChunkCost(1.0, 2.0), ChunkCost(3.0, 0.5), ChunkCost(2.0, 9.0)])
    assert kept == ChunkCost(2.0, 1.0)
