import pytest

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import SuffixStart
from cacheflow.policies.cacheflow_v1 import CacheFlowV1
from cacheflow.policies.cacheflow_v2 import CacheFlowV2
from cacheflow.policies.cake import Cake
from cacheflow.policies.layerwise_load import LayerwiseLoad
from cacheflow.policies.load import Load
from cacheflow.policies.recompute import Recompute
from support import exact_solver
from support.random_problems import equal_blocks

PROBLEM = equal_blocks(num_chunks=6, num_blocks=4, growth=0.1, load_ratio=0.5, suffix_s=0.05)


def test_recompute_runs_whole_layers_then_the_suffix():
    plan = Recompute().plan(PROBLEM)
    assert plan.predicted.ttft_s == pytest.approx(PROBLEM.compute_KB.sum() + PROBLEM.suffix_s)
    assert plan.load_sequence == ()


def test_load_starts_the_suffix_after_the_last_byte():
    plan = Load().plan(PROBLEM)
    assert plan.predicted.ttft_s == pytest.approx(PROBLEM.load_s + PROBLEM.suffix_s)
    assert plan.suffix_start is SuffixStart.AFTER_RESTORE


def test_layerwise_load_hides_all_but_the_top_block_of_a_short_suffix():
    plan = LayerwiseLoad().plan(PROBLEM)
    assert plan.load_sequence[0] == Tile(0, 6, 0, 1)
    assert plan.predicted.ttft_s == pytest.approx(PROBLEM.load_s + float(PROBLEM.suffix_B[-1]) + PROBLEM.head_s)


def test_layerwise_load_hides_all_but_the_first_row_behind_a_long_suffix():
    problem = equal_blocks(num_chunks=6, num_blocks=4, load_ratio=0.1, suffix_s=5.0)
    assert LayerwiseLoad().plan(problem).predicted.ttft_s == pytest.approx(problem.load_s / 4 + problem.suffix_s)


def test_cake_meets_on_a_whole_chunk():
    """Equal chunks, load twice as fast: of 6 chunks compute takes 2 and the link 4."""
    problem = equal_blocks(num_chunks=6, growth=0.0, load_ratio=0.4999)
    plan = Cake().plan(problem)
    assert plan.levels_K == (4, 4, 0, 0, 0, 0)
    assert plan.predicted.restore_s == pytest.approx(problem.compute_KB.sum() / 3, rel=1e-3)
    assert plan.load_sequence == plan.compute_sequence[::-1]


def test_v1_follows_the_measured_crossover():
    tokens = PROBLEM.grid.num_tokens
    layer_wise = CacheFlowV1(crossover_tokens=tokens).plan(PROBLEM)
    token_wise = CacheFlowV1(crossover_tokens=tokens - 1).plan(PROBLEM)
    assert layer_wise.compute_sequence[0] == layer_wise.load_sequence[-1] == Tile(0, 6, 0, 1)
    assert token_wise.compute_sequence[0] == token_wise.load_sequence[-1] == Tile(0, 1, 0, 4)
    assert len(set(layer_wise.levels_K)) == 1


def test_v1_without_a_measured_crossover_takes_the_better_prediction():
    tokens = PROBLEM.grid.num_tokens
    both = [CacheFlowV1(crossover_tokens=tokens - more).plan(PROBLEM).predicted.restore_s for more in (0, 1)]
    assert CacheFlowV1().plan(PROBLEM).predicted.restore_s == min(both)


def test_v2_is_the_best_fixed_staircase_of_full_cells():
    plan = CacheFlowV2().plan(PROBLEM)
    least_s, _ = exact_solver.least(PROBLEM, kv_only_top=False)
    assert plan.predicted.restore_s == pytest.approx(least_s)
    assert sum(tile.num_cells for tile in plan.compute_sequence) == sum(plan.levels_K)
