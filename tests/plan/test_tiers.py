"""What a restoration costs whose chunks lie in stores of different speed."""

import numpy as np
import pytest

from cacheflow.plan.bound import bound
from cacheflow.plan.tiers import over_tiers
from cacheflow.policies.registry import make_policy
from support.problems import transformer_problem


@pytest.fixture
def problem():
    """Eight chunks that take as long to load over the fastest tier as to recompute."""
    return transformer_problem(suffix_tokens=0)


def test_one_tier_is_the_problem_as_it_was(problem):
    assert over_tiers(problem, [0] * 8, [1e9, 1e8]) is problem


@pytest.mark.parametrize("slow_chunks", [1, 4, 7, 8])
@pytest.mark.parametrize("slowness", [1.0, 3.0, 50.0])
def test_loading_all_of_it_takes_as_long_as_the_tier_that_has_most_to_do(problem, slow_chunks, slowness):
    fast = problem.link.bytes_per_s
    tiers = [1] * slow_chunks + [0] * (8 - slow_chunks)
    tiered = over_tiers(problem, tiers, [fast, fast / slowness])
    bytes_K = problem.load_bytes_KB.sum(axis=1)
    slow_s = bytes_K[:slow_chunks].sum() / (fast / slowness)
    fast_s = bytes_K[slow_chunks:].sum() / fast
    assert tiered.load_s == pytest.approx(max(slow_s, fast_s), rel=1e-4)
    cells = tiered.load_bytes_KB / problem.load_bytes_KB
    assert cells[0, 0] == pytest.approx(slowness * cells[-1, 0] if slow_chunks < 8 else slowness, rel=1e-3)
    assert np.array_equal(tiered.moved_KB, problem.load_bytes_KB)
    assert tiered.num_tiers == 2
    assert tiered.tier_KB[:, 0].tolist() == tiers


@pytest.mark.parametrize("rates", [[None, 1e8], [1e9, None], [None, None], [1e9, float("inf")], []])
def test_tiers_of_unknown_speed_count_as_equally_fast(problem, rates):
    tiered = over_tiers(problem, [1] * 4 + [0] * 4, rates)
    assert np.array_equal(tiered.load_bytes_KB, problem.load_bytes_KB)
    assert tiered.num_tiers == 2


def test_a_plan_leaves_more_to_compute_where_the_head_is_in_a_slow_tier(problem):
    rate = problem.link.bytes_per_s
    policy = make_policy("cacheflow")
    computed, ends_s = [], []
    for slowness in (1.0, 4.0, 16.0):
        tiered = over_tiers(problem, [1] * 6 + [0] * 2, [rate, rate / slowness])
        plan = policy.plan(tiered)
        computed.append(sum(plan.levels_K))
        ends_s.append(plan.predicted.restore_s)
        assert plan.predicted.restore_s >= bound(tiered).restore_s * (1 - 1e-9)
    assert computed == sorted(computed)
    assert ends_s == sorted(ends_s)
    assert computed[0] < computed[-1] <= 6 * 30
