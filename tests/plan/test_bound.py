from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.problem import LinkCost
from support import exact_solver
from support.examples import examples
from support.random_problems import equal_blocks, problems


@settings(max_examples=examples(150))
@given(problems())
def test_no_staircase_ends_before_the_bound(problem):
    limits = bound(problem)
    assert limits.restore_s <= exact_solver.least(problem)[0] * (1 + 1e-9)
    assert limits.ttft_s <= exact_solver.least(problem, exact_solver.ttft_s)[0] * (1 + 1e-9)
    assert limits.ttft_s >= problem.suffix_s * (1 - 1e-9)


@pytest.mark.parametrize("load_ratio", [0.1, 0.5, 1.0, 3.0])
def test_uniform_cost_gives_the_closed_form(load_ratio):
    """Source: CacheFlow v1, Eq. 1."""
    problem = equal_blocks(growth=0.0, kv_share=1.0, load_ratio=load_ratio)
    compute_s, load_s = problem.recompute_s, problem.load_s
    assert bound(problem).restore_s == pytest.approx(compute_s * load_s / (compute_s + load_s))


def test_rising_chunk_costs_give_the_fractional_token_split():
    """The least over ``x`` of ``max(compute(x), load(rest))``, compute linear inside a chunk."""
    problem = equal_blocks(num_chunks=7, growth=0.4, kv_share=1.0, load_ratio=0.8)
    x = np.linspace(0, 7, 700_001)
    compute_s = np.interp(x, np.arange(8), np.append(0.0, problem.compute_KB.sum(axis=1).cumsum()))
    load_s = problem.load_s * (1 - x / 7)
    assert bound(problem).restore_s == pytest.approx(np.maximum(compute_s, load_s).min(), rel=1e-5)


def test_the_first_level_of_a_chunk_is_cheap_so_the_bound_is_below_the_token_split():
    full, cheap = (bound(equal_blocks(kv_share=share, load_ratio=1.0)).restore_s for share in (1.0, 0.1))
    assert cheap < full


def test_with_a_suffix_the_top_block_waits_for_the_last_byte_but_the_rest_does_not():
    problem = equal_blocks(num_blocks=10, load_ratio=0.05, suffix_s=10.0, kv_share=1.0)
    restore_then_suffix_s = bound(problem).restore_s + problem.suffix_s
    assert problem.suffix_s <= bound(problem).ttft_s < restore_then_suffix_s
    slow = replace(problem, compute_KB=problem.compute_KB * 1e6, kv_only_KB=problem.kv_only_KB * 1e6)
    last_s = float(problem.suffix_B[-1]) + problem.head_s
    assert bound(slow).ttft_s == pytest.approx(max(problem.suffix_s, slow.load_s + last_s), rel=1e-3)


def test_latency_is_due_as_soon_as_anything_is_loaded():
    problem = equal_blocks(load_ratio=1.0)
    late = replace(problem, link=LinkCost(bytes_per_s=problem.link.bytes_per_s, latency_s=0.9 * problem.recompute_s))
    assert bound(late).restore_s == pytest.approx(max(0.9 * problem.recompute_s, 0.0), rel=0.1)
    too_late = replace(problem, link=LinkCost(bytes_per_s=problem.link.bytes_per_s, latency_s=1e6))
    assert bound(too_late).restore_s == pytest.approx(problem.recompute_s)


def test_an_infinitely_fast_link_restores_at_once():
    problem = replace(equal_blocks(), link=LinkCost(bytes_per_s=float("inf")))
    assert bound(problem).restore_s == pytest.approx(0.0, abs=1e-12)


def test_nothing_to_restore_leaves_the_suffix():
    assert bound(equal_blocks(num_chunks=0, suffix_s=0.5)) == Bound(restore_s=0.0, ttft_s=pytest.approx(0.5))
