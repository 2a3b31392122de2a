from dataclasses import replace

import numpy as np
import pytest

from cacheflow.plan.bound import bound
from cacheflow.plan.planner import Objective, plan_levels, plan_token_wise
from support import exact_solver
from support.count_calls import count_calls
from support.random_problems import equal_blocks, random_problem

OBJECTIVES = [(Objective.RESTORE, exact_solver.restore_s), (Objective.TTFT, exact_solver.ttft_s)]


def random_grids(count, seed=7):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield random_problem(rng, num_chunks=int(rng.integers(1, 6)), num_blocks=int(rng.integers(1, 5)))


@pytest.mark.parametrize(("objective", "value_of"), OBJECTIVES)
@pytest.mark.parametrize("kv_only_top", [True, False])
def test_small_grids_are_solved_exactly(objective, value_of, kv_only_top):
    for problem in random_grids(300):
        planned = plan_levels(problem, objective, kv_only_top=kv_only_top)
        least_s, _ = exact_solver.least(problem, value_of, kv_only_top=kv_only_top)
        assert planned.optimal
        assert planned.gap == 0
        assert value_of(problem, planned.levels_K, kv_only_top=kv_only_top) == pytest.approx(least_s)


@pytest.mark.parametrize(("objective", "value_of"), OBJECTIVES)
def test_without_the_exact_search_the_claims_still_hold(objective, value_of):
    num_heuristic = 0
    for problem in random_grids(300, seed=8):
        planned = plan_levels(problem, objective, exact_cells=0)
        least_s, _ = exact_solver.least(problem, value_of)
        value_s = value_of(problem, planned.levels_K)
        assert value_s >= least_s * (1 - 1e-9)
        assert value_s <= least_s * (1 + planned.gap) + 1e-9
        num_heuristic += not planned.optimal
    assert num_heuristic > 50


@pytest.mark.parametrize("last", [1.0, 0.7, 0.05])
@pytest.mark.parametrize("load_ratio", [0.2, 1.0, 4.0])
def test_equal_blocks_have_a_closed_form_also_with_a_short_last_chunk(last, load_ratio):
    """Excludes the formula that ignores that the last chunk's cells spare fewer bytes."""
    for kv_share in (0.05, 0.5, 1.0):
        problem = equal_blocks(num_chunks=6, num_blocks=5, last=last, load_ratio=load_ratio, kv_share=kv_share)
        planned = plan_levels(problem, exact_cells=0)
        assert planned.optimal
        assert planned.predicted.restore_s == pytest.approx(exact_solver.least(problem)[0])


def test_equal_blocks_share_the_last_chunk_by_layers():
    levels = plan_levels(equal_blocks(num_chunks=8, num_blocks=4, kv_share=1.0)).levels_K
    assert sorted(levels, reverse=True) == list(levels)
    assert sum(0 < level < 4 for level in levels) <= 1


def test_token_wise_is_never_better_than_the_plan():
    for problem in random_grids(100, seed=9):
        token_wise, planned = plan_token_wise(problem), plan_levels(problem)
        assert token_wise.predicted.restore_s >= planned.predicted.restore_s * (1 - 1e-9)
        assert sum(0 < level < problem.grid.num_blocks for level in token_wise.levels_K) <= 1


def test_unequal_blocks_on_a_large_grid_come_close_to_the_bound():
    problem = equal_blocks(num_chunks=64, num_blocks=24, growth=0.02)
    rows = np.random.default_rng(3).uniform(0.3, 1.5, 24)
    problem = replace(problem, compute_KB=problem.compute_KB * rows, kv_only_KB=problem.kv_only_KB * rows)
    planned = plan_levels(problem)
    assert planned.gap < 0.002
    assert planned.predicted.restore_s <= bound(problem).restore_s * 1.002


def test_nothing_to_restore_needs_no_levels():
    planned = plan_levels(equal_blocks(num_chunks=0, suffix_s=0.5), Objective.TTFT)
    assert planned.levels_K == ()
    assert planned.predicted.ttft_s == pytest.approx(0.5)


@pytest.mark.parametrize(("equal", "limit"), [(True, 200), (False, 1300)])
def test_planning_makes_no_more_calls_for_more_chunks(equal, limit):
    """About a millisecond for 256 chunks of 32 blocks; a loop over chunks or cells would show at once."""
    rows = np.ones(32) if equal else np.random.default_rng(0).uniform(0.3, 1.5, 32)
    for num_chunks in (16, 64, 256, 1024):
        problem = equal_blocks(num_chunks=num_chunks, num_blocks=32, growth=0.01)
        problem = replace(problem, compute_KB=problem.compute_KB * rows, kv_only_KB=problem.kv_only_KB * rows)
        assert count_calls(lambda problem=problem: plan_levels(problem)) < limit
