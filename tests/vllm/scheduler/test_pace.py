"""How much of an engine step goes to recomputation: a virtual engine decodes beside a restoration."""

import random

import pytest

from cacheflow.vllm.scheduler.pace import READ_AHEAD_S, StepPace

CHUNK_S, UNIT_S = 0.4, 0.002


class Engine:
    """Steps that take their own time and the recomputation they were given, which is reported a step later."""

    def __init__(self, pace: StepPace, *, own_s: float, jitter: float = 0.0) -> None:
        self.pace, self.own_s, self.jitter = pace, own_s, jitter
        self.now_s, self._chance, self._report_s = 0.0, random.Random(1), 0.0

    def step(self) -> tuple[float, float]:
        """One step with a restoration under way: how long it took, and how much of that was recomputation."""
        budget = self.pace.budget(self.now_s, busy=True, chunk_s=CHUNK_S, unit_s=UNIT_S)
        compute_s = budget.compute_s // UNIT_S * UNIT_S
        took_s = self.own_s * (1 + self.jitter * self._chance.uniform(-1, 1)) + compute_s
        self.now_s += took_s
        self.pace.note_computed(self._report_s)
        self._report_s = compute_s
        return took_s, compute_s


@pytest.mark.parametrize("slo_ms", [20.0, 30.0, 60.0])
def test_steps_keep_within_the_latency_asked_for_from_the_first_one_on(slo_ms: float):
    engine = Engine(StepPace(recompute_budget_ms=None, itl_slo_ms=slo_ms), own_s=0.012, jitter=0.1)
    took_s, computed_s = zip(*(engine.step() for _ in range(300)), strict=True)
    assert max(took_s) <= slo_ms * 1e-3
    # Nor is it kept by doing nothing: half of what is left beside the engine's own step is used.
    assert sum(computed_s) / 300 > 0.5 * min(slo_ms * 1e-3 - 0.012, 0.1 * CHUNK_S)


def test_a_unit_larger_than_a_tenth_of_a_chunk_is_computed_where_the_bound_has_room_for_it():
    for slo_ms, expected_s in ((200.0, 0.1), (100.0, 0.0)):
        pace = StepPace(recompute_budget_ms=None, itl_slo_ms=slo_ms)
        for step in range(5):
            budget = pace.budget(step * 0.012, busy=True, chunk_s=0.4, unit_s=0.1)
        assert budget.compute_s == expected_s


def test_a_bound_that_leaves_no_room_leaves_loading_alone():
    engine = Engine(StepPace(recompute_budget_ms=None, itl_slo_ms=14.0), own_s=0.012)
    assert sum(engine.step()[1] for _ in range(50)) == 0.0


def test_without_a_bound_a_step_gets_a_tenth_of_a_chunk_or_what_the_operator_says():
    assert Engine(StepPace(recompute_budget_ms=None, itl_slo_ms=None), own_s=0.01).step()[1] == pytest.approx(0.04)
    assert Engine(StepPace(recompute_budget_ms=8.0, itl_slo_ms=None), own_s=0.01).step()[1] == pytest.approx(0.008)


@pytest.mark.parametrize("itl_slo_ms", [None, 60.0])
def test_the_time_between_two_restorations_is_not_taken_for_a_step(itl_slo_ms: float | None):
    pace = StepPace(recompute_budget_ms=None, itl_slo_ms=itl_slo_ms)
    engine = Engine(pace, own_s=0.012)
    for _ in range(20):
        engine.step()
    pace.rest()
    engine.now_s += 30.0
    budget = pace.budget(engine.now_s, busy=True, chunk_s=CHUNK_S, unit_s=UNIT_S)
    assert budget.compute_s > 5 * UNIT_S
    assert budget.read_ahead_s < READ_AHEAD_S + 3 * 0.1


def test_a_rest_too_small_for_a_unit_is_given_to_nobody():
    budget = StepPace(recompute_budget_ms=10.0, itl_slo_ms=None).budget(0.0, busy=True, chunk_s=CHUNK_S, unit_s=UNIT_S)
    assert budget.left_s(0.0) == pytest.approx(0.010)
    assert budget.left_s(0.005) == pytest.approx(0.005)
    assert budget.left_s(0.009) == 0.0
