from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import Choice, SuffixStart
from cacheflow.policies.cacheflow import CacheFlow
from support.hybrids import hybrid_problem
from support.random_problems import equal_blocks
from support.virtual_driver import Conditions, run_virtual


def test_equal_blocks_keep_the_meeting_point_free():
    problem = equal_blocks(num_chunks=8, num_blocks=30, suffix_s=0.02)
    plan = CacheFlow().plan(problem)
    assert [tile.chunk_lo for tile in plan.compute_sequence] == list(range(8))
    tail_first = plan.compute_sequence[::-1]
    assert plan.load_sequence[:8] == tuple(replace(tile, block_lo=1) for tile in tail_first)
    assert plan.load_sequence[8:] == tuple(replace(tile, block_hi=1) for tile in tail_first)
    assert plan.bottom_row_by_compute
    assert plan.suffix_start is SuffixStart.BLOCK_BY_BLOCK
    assert plan.balance_suffix
    assert plan.guard.choice is Choice.HYBRID
    assert plan.predicted.ttft_s <= bound(problem).ttft_s * 1.04


def test_a_wide_staircase_is_claimed_first():
    problem = equal_blocks(num_chunks=8, num_blocks=6, growth=0.0, kv_share=1.0)
    rows = np.array([0.1, 0.1, 0.1, 2.0, 2.0, 2.0])
    problem = replace(problem, compute_KB=problem.compute_KB * rows, kv_only_KB=problem.kv_only_KB * rows)
    plan = CacheFlow().plan(problem)
    planned = sum(level > 0 for level in plan.levels_K)
    assert plan.levels_K[-1] > 0, "cheap bottom blocks are recomputed in every chunk"
    assert [tile.block_hi for tile in plan.compute_sequence[:planned]] == list(plan.levels_K)
    assert plan.load_sequence == plan.compute_sequence[::-1]
    assert not plan.bottom_row_by_compute


@pytest.mark.parametrize("slower", [1.0, 1.06, 1.15])
@pytest.mark.parametrize("bytes_per_s", [2e8, 4e8, 8e8])
def test_compute_and_the_link_of_a_hybrid_meet_among_cells_without_states(bytes_per_s, slower):
    problem = hybrid_problem(num_tokens=32 * 1056, bytes_per_s=bytes_per_s)
    plan = CacheFlow().plan(problem)
    num_chunks, num_blocks = problem.grid.num_chunks, problem.grid.num_blocks
    whole = min(min(plan.levels_K), max(plan.levels_K) - 1)
    assert whole > 0, "rows that are recomputed whole, and one above them in part or whole too"
    assert plan.compute_sequence[:num_chunks] == tuple(Tile(k, k + 1, 0, whole) for k in range(num_chunks))
    heights = [0] * num_chunks
    for tile in plan.compute_sequence:
        assert tile.block_lo == heights[tile.chunk_lo]
        heights[tile.chunk_lo] = tile.block_hi
        assert heights == sorted(heights, reverse=True), "a staircase at any time"
    assert heights == [num_blocks] * num_chunks
    assert plan.load_sequence == plan.compute_sequence[::-1]

    truth = replace(problem, compute_KB=problem.compute_KB * slower, kv_only_KB=problem.kv_only_KB * slower)
    run = run_virtual(problem, plan, Conditions(truth=truth))
    letters = run.state.board.letters()
    assert letters[-1].count("l") <= num_blocks - whole, "only of the highest row a state more than planned"
    assert run.restore_s <= 1.03 * bound(truth).restore_s


def test_a_slow_link_is_not_used():
    plan = CacheFlow().plan(equal_blocks(load_ratio=1e4))
    assert plan.guard.choice is Choice.RECOMPUTE
    assert plan.load_sequence == ()
    assert "not 1% and 1 ms sooner" in plan.guard.reason


def test_a_fast_link_loads_everything_and_compute_stands_by():
    problem = equal_blocks(load_ratio=0.01, suffix_s=0.5)
    plan = CacheFlow().plan(problem)
    assert plan.guard.choice is Choice.LOAD
    assert set(plan.levels_K) == {0}
    assert len(plan.compute_sequence) == problem.grid.num_chunks
    assert plan.guard.reason.startswith("load: ")


def test_recompute_counts_its_top_row_for_keys_and_values_only_on_both_sides_of_the_guard():
    problem = equal_blocks(load_ratio=1e4, kv_share=0.1)
    plan = CacheFlow().plan(problem)
    assert plan.predicted.restore_s == pytest.approx(problem.recompute_s)
    assert problem.recompute_s < problem.compute_KB.sum()


def test_the_guard_leaves_a_prompt_to_the_engines_own_prefill_where_nothing_is_sooner():
    problem = equal_blocks(load_ratio=1.0, suffix_s=0.05)
    hybrid_s = CacheFlow().plan(problem).predicted.ttft_s
    own = CacheFlow().plan(replace(problem, prefill_s=hybrid_s * 0.9))
    assert own.left_to_prefill
    assert own.guard.choice is Choice.PREFILL
    assert own.guard.without_loading_s == pytest.approx(hybrid_s * 0.9)
    assert own.guard.reason.startswith(f"prefill: it takes {hybrid_s * 900:.1f} ms")
    slower = CacheFlow().plan(replace(problem, prefill_s=hybrid_s * 1.1))
    assert slower.guard.choice is Choice.HYBRID
    assert not slower.left_to_prefill


def test_recomputing_in_chunks_stays_a_choice_where_it_is_sooner_than_the_prefill():
    problem = equal_blocks(load_ratio=1e4, kv_share=0.1)
    plan = CacheFlow().plan(replace(problem, prefill_s=problem.recompute_s * 1.05))
    assert plan.guard.choice is Choice.RECOMPUTE
    assert not plan.left_to_prefill


def test_a_prefill_that_takes_no_possible_time_is_refused():
    with pytest.raises(ConfigError, match="prefill_s is -1"):
        replace(equal_blocks(), prefill_s=-1.0)
