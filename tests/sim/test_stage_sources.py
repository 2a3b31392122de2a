"""What is expected of stored boundary states and of hand-overs, beside what the state machines make of it."""

from __future__ import annotations

import pytest

from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.stage_sources import sooner, stage_times, times_of
from cacheflow.policies.registry import make_policy
from cacheflow.policies.stages import plan_stages
from cacheflow.sim.stages import run_stages
from support.problems import transformer_problem
from support.stage_problems import stage_problem, stages_of

STORED, HANDED, FIRST = BoundarySource.STORED, BoundarySource.HANDED_OVER, BoundarySource.FIRST_STAGE


@pytest.mark.parametrize("later", [STORED, HANDED])
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_a_restoration_takes_about_as_long_as_was_expected(later, num_stages, ratio):
    stages = stages_of(num_stages, ratio=ratio, later=later, num_tokens=16_384)
    problems, sources = [stage.problem for stage in stages], [stage.source for stage in stages]
    expected_s = max(times.restore_s for times in stage_times(problems, sources))
    run = run_stages(stages, plan_stages(make_policy("cacheflow"), problems, sources))
    assert run.restore_s == pytest.approx(expected_s, rel=0.12), "a chunk more or less"


def test_a_stage_is_handed_only_what_the_one_below_recomputes_whole():
    problem = transformer_problem(num_tokens=4096, suffix_tokens=0, num_blocks=6)
    below = times_of(problem, FIRST)
    above = times_of(problem, HANDED, below=below)
    assert 0 < len(above.whole_s) <= len(below.whole_s) < 8
    assert all(ours > theirs for ours, theirs in zip(above.whole_s, below.whole_s, strict=False))
    assert above.restore_s > below.restore_s


def test_states_behind_the_last_stored_one_are_loaded():
    problem = stage_problem(STORED, num_tokens=4096, num_blocks=6, boundary_bytes_per_token=10)
    everything, two, nothing = (times_of(problem, STORED, num_boundaries=num).restore_s for num in (None, 2, 0))
    assert everything < two < nothing == pytest.approx(problem.load_s)


@pytest.mark.parametrize(("states", "source"), [(10, STORED), (100_000, HANDED)])
def test_the_dearer_the_states_the_rather_they_are_handed_over(states, source):
    problem = stage_problem(STORED, num_tokens=8192, num_blocks=6, boundary_bytes_per_token=states)
    below = times_of(problem, FIRST)
    ways = {way: times_of(problem, way, below=below) for way in (STORED, HANDED)}
    assert sooner(ways) is source


def test_hand_overs_must_promise_more_than_a_little():
    problem = stage_problem(STORED, num_tokens=8192, num_blocks=6)
    times = times_of(problem, STORED)
    assert sooner({STORED: times, HANDED: times}) is STORED
