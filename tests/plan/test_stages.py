"""Cutting a model into stages and ranks, and the least time all of them need."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.bound import bound
from cacheflow.plan.planner import plan_levels
from cacheflow.plan.problem import BoundarySource, LinkCost
from cacheflow.plan.stage_bounds import stage_bound, staged_bound
from cacheflow.plan.stages import RankLayout, boundary_bytes_per_token, split_layers, stage_problems, suffix_through_s
from cacheflow.plan.staircase import staircase_compute_s, staircase_load_bytes
from support.problems import transformer_problem

SHAPE = ModelShape(
    name="test", num_layers=30, hidden_size=64, num_q_heads=8, num_kv_heads=4, head_dim=16, intermediate_size=128,
    vocab_size=100, dtype="bfloat16",
)  # fmt: skip
LATER = [BoundarySource.STORED, BoundarySource.HANDED_OVER, BoundarySource.NONE]


def whole(**kwargs):
    return transformer_problem(**{"num_blocks": SHAPE.num_layers, **kwargs})


def stages_of(problem, num_stages, *, tp=1, later=BoundarySource.STORED, link_per_rank=True):
    layout = RankLayout(pipeline_parallel_size=num_stages, tensor_parallel_size=tp, link_per_rank=link_per_rank)
    return stage_problems(problem, SHAPE, layout, later)


problems = st.builds(
    whole,
    num_tokens=st.integers(1, 6000),
    suffix_tokens=st.sampled_from([0, 100, 700]),
    ratio=st.floats(0.05, 20),
)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "parts"),
    # As vllm.distributed.utils.get_pp_indices cuts them.
    [(30, 2, [15, 15]), (30, 4, [7, 8, 8, 7]), (31, 2, [16, 15]), (31, 4, [8, 8, 8, 7]), (29, 4, [7, 7, 8, 7]),
     (36, 4, [9, 9, 9, 9]), (5, 5, [1, 1, 1, 1, 1]), (7, 1, [7])],
)  # fmt: skip
def test_layers_are_cut_as_vllm_cuts_them(num_layers, num_stages, parts):
    cuts = split_layers(num_layers, num_stages)
    assert [hi - lo for lo, hi in cuts] == parts
    assert cuts[0][0] == 0
    assert all(below[1] == above[0] for below, above in itertools.pairwise(cuts))


@given(num_layers=st.integers(1, 100), num_stages=st.integers(1, 100))
def test_any_split_covers_the_layers_or_is_refused(num_layers, num_stages):
    if num_stages > num_layers:
        with pytest.raises(ConfigError, match="cannot be split"):
            split_layers(num_layers, num_stages)
        return
    sizes = [hi - lo for lo, hi in split_layers(num_layers, num_stages)]
    assert sum(sizes) == num_layers
    assert max(sizes) - min(sizes) <= 1


@given(problem=problems, num_stages=st.integers(1, 6))
def test_stages_hold_the_whole_model_once(problem, num_stages):
    stages = stages_of(problem, num_stages)
    assert np.array_equal(np.hstack([stage.problem.compute_KB for stage in stages]), problem.compute_KB)
    assert np.array_equal(np.hstack([stage.problem.load_bytes_KB for stage in stages]), problem.load_bytes_KB)
    assert sum(stage.suffix_s for stage in stages) == pytest.approx(problem.suffix_s)
    assert stages[0].source is BoundarySource.FIRST_STAGE
    assert not stages[0].problem.boundary_bytes_K.any()
    assert boundary_bytes_per_token(SHAPE) == 2 * 64 * 2
    for stage in stages[1:]:
        assert stage.problem.boundary_bytes_K.sum() == problem.grid.num_tokens * 256


def test_tensor_parallel_ranks_share_compute_and_heads_but_not_boundaries():
    problem = whole()
    (one, later), (half, half_later) = stages_of(problem, 2), stages_of(problem, 2, tp=2)
    assert half.problem.compute_KB.sum() == pytest.approx(one.problem.compute_KB.sum() / 2)
    assert half.problem.load_bytes_KB.sum() * 2 == one.problem.load_bytes_KB.sum()
    assert np.array_equal(half_later.problem.boundary_bytes_K, later.problem.boundary_bytes_K)
    eight = stages_of(problem, 1, tp=8)[0]
    assert eight.problem.load_bytes_KB.sum() * 4 == problem.load_bytes_KB.sum(), "4 KV heads make at most 4 parts"
    assert eight.problem.compute_KB.sum() * 8 == pytest.approx(problem.compute_KB.sum())
    with pytest.raises(ConfigError, match="cannot be shared by tensor_parallel_size 3"):
        stages_of(problem, 1, tp=3)
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 0"):
        RankLayout(pipeline_parallel_size=0)


def test_a_shared_link_is_shared_by_all_ranks():
    problem = whole()
    alone, shared = stages_of(problem, 2, tp=2), stages_of(problem, 2, tp=2, link_per_rank=False)
    assert alone[0].problem.link == problem.link
    assert shared[0].problem.link.bytes_per_s == pytest.approx(problem.link.bytes_per_s / 4)


@given(problem=problems)
def test_one_stage_has_the_bound_of_the_whole(problem):
    alone = staged_bound(stages_of(problem, 1), num_suffix_chunks=len(problem.grid.suffix_ends))
    assert alone.restore_s == pytest.approx(bound(problem).restore_s)
    # The bound of one GPU knows which blocks the suffix passes; this one only how many.
    assert alone.ttft_s <= bound(problem).ttft_s * (1 + 1e-9)
    assert alone.ttft_s >= problem.suffix_s * (1 - 1e-9)


@given(problem=problems, num_stages=st.integers(1, 5), later=st.sampled_from(LATER), factor=st.floats(1.0, 8.0))
def test_a_faster_link_never_makes_the_bound_later(problem, num_stages, later, factor):
    faster = replace(problem, link=LinkCost(bytes_per_s=problem.link.bytes_per_s * factor))
    for shared in (False, True):
        slow_s, fast_s = (
            staged_bound(stages_of(each, num_stages, later=later, link_per_rank=not shared), shared_link=shared)
            for each in (problem, faster)
        )
        assert fast_s.restore_s <= slow_s.restore_s * (1 + 1e-6)
        assert fast_s.ttft_s <= slow_s.ttft_s * (1 + 1e-6)


@given(problem=problems, num_stages=st.integers(2, 5))
def test_sharing_one_link_never_helps_and_boundaries_cost(problem, num_stages):
    own = staged_bound(stages_of(problem, num_stages)).restore_s
    shared = staged_bound(stages_of(problem, num_stages, link_per_rank=False), shared_link=True).restore_s
    even = staged_bound(stages_of(problem, num_stages, link_per_rank=False)).restore_s
    assert own <= shared * (1 + 1e-9)
    assert shared <= even * (1 + 1e-6), "an even share is one way to share"
    free = tuple(replace(stage, problem=_without_boundaries(stage.problem)) for stage in stages_of(problem, num_stages))
    assert staged_bound(free).restore_s <= own * (1 + 1e-9)


def _without_boundaries(problem):
    return replace(problem, boundary_bytes_K=np.zeros(problem.grid.num_chunks, dtype=np.int64))


@given(problem=problems, boundary=st.integers(0, 4000), data=st.data())
def test_no_staircase_with_its_boundaries_ends_before_the_stage_s_bound(problem, boundary, data):
    grid = problem.grid
    tokens_K = np.array([hi - lo for lo, hi in (grid.chunk_range(k) for k in range(grid.num_chunks))])
    stage = replace(_without_suffix(problem), boundary_bytes_K=tokens_K * boundary)
    least_s = stage_bound(stage, BoundarySource.STORED).restore_s
    levels = sorted(data.draw(st.lists(st.integers(0, 30), min_size=grid.num_chunks, max_size=grid.num_chunks)))[::-1]
    for levels_K in (np.array(levels), np.array(plan_levels(stage).levels_K)):
        num_bytes = staircase_load_bytes(stage, levels_K) + int(stage.boundary_bytes_K[levels_K > 0].sum())
        compute_s = staircase_compute_s(stage, levels_K)
        if levels_K.any():
            compute_s += stage.link.load_s(float(stage.boundary_bytes_K[0]))
        assert max(compute_s, stage.link.load_s(num_bytes)) >= least_s * (1 - 1e-9)


def _without_suffix(problem):
    grid = replace(problem.grid, suffix_ends=())
    return replace(problem, grid=grid, suffix_B=np.zeros(grid.num_blocks), head_s=0.0)


def test_without_the_axis_the_last_stage_waits_for_the_first_chunk():
    problem = whole(suffix_tokens=0)
    handed = stages_of(problem, 4, later=BoundarySource.HANDED_OVER)
    chunk_s = [float(stage.problem.compute_KB[0].sum()) for stage in handed]
    least = staged_bound(handed)
    alone = bound(handed[3].problem)
    assert least.stages[3].restore_s > alone.restore_s
    assert least.stages[3].restore_s <= alone.restore_s + sum(chunk_s[:3])
    assert staged_bound(stages_of(problem, 4, later=BoundarySource.NONE)).restore_s == pytest.approx(
        max(stage.problem.load_s for stage in handed[1:])
    )


def test_new_tokens_pass_the_stages_one_after_the_other():
    stages = stages_of(whole(suffix_tokens=512), 3)
    total_s = sum(stage.suffix_s for stage in stages)
    assert suffix_through_s(stages, 0) == 0.0
    assert suffix_through_s(stages, 1) == pytest.approx(total_s)
    # Equal stages and many chunks: a pipeline.
    assert suffix_through_s(stages, 1000) == pytest.approx(max(stage.suffix_s for stage in stages), rel=0.01)
    assert staged_bound(stages, num_suffix_chunks=1).ttft_s >= total_s
