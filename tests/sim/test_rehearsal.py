from itertools import pairwise

import pytest

from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import Lane, busy_share
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.sim.rehearsal import rehearse
from support.problems import transformer_problem


@pytest.fixture(params=[0.25, 1.0, 4.0], ids=lambda ratio: f"ratio {ratio}")
def problem(request: pytest.FixtureRequest) -> RestoreProblem:
    return transformer_problem(ratio=request.param)


@pytest.mark.parametrize("name", list(RESTORE_POLICIES))
def test_every_policy_restores_every_cell(name: str, problem: RestoreProblem):
    rehearsal = rehearse(problem, make_policy(name).plan(problem))
    assert set("".join(rehearsal.cells_KB)) <= {"c", "l"}
    assert len(rehearsal.cells_KB) == problem.grid.num_chunks
    assert rehearsal.ttft_s >= rehearsal.restore_s
    assert max(span.end_s for span in rehearsal.spans) == pytest.approx(rehearsal.ttft_s - problem.head_s)


@pytest.mark.parametrize("name", list(RESTORE_POLICIES))
def test_no_lane_does_two_things_at_once(name: str, problem: RestoreProblem):
    rehearsal = rehearse(problem, make_policy(name).plan(problem))
    for lane in Lane:
        spans = sorted((s for s in rehearsal.spans if s.lane is lane), key=lambda s: s.start_s)
        for before, after in pairwise(spans):
            assert after.start_s >= before.end_s - 1e-12


def test_pure_ways_take_what_the_problem_says(problem: RestoreProblem):
    recompute = rehearse(problem, make_policy("recompute").plan(problem))
    assert recompute.loaded_bytes == 0
    assert recompute.recomputed_share == 1.0
    assert recompute.restore_s == pytest.approx(problem.compute_KB.sum())
    load = rehearse(problem, make_policy("load").plan(problem))
    assert load.restore_s == pytest.approx(problem.load_s)
    assert load.ttft_s == pytest.approx(problem.load_s + problem.suffix_s)
    assert busy_share(load.spans, Lane.IO, load.restore_s) == pytest.approx(1.0)


def test_without_a_suffix_the_end_is_the_restoration():
    problem = transformer_problem(suffix_tokens=0)
    rehearsal = rehearse(problem, make_policy("cake").plan(problem))
    assert rehearsal.ttft_s == rehearsal.restore_s
