"""A restoration over stages in virtual time: never below the bound, and what the third axis is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.report import Lane, SpanKind
from cacheflow.plan.stage_bounds import staged_bound
from cacheflow.plan.stages import suffix_through_s
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.policies.stages import plan_stages
from cacheflow.sim.rehearsal import rehearse
from cacheflow.sim.stages import run_stages
from support.stage_problems import stages_of

STORED, HANDED, NONE = BoundarySource.STORED, BoundarySource.HANDED_OVER, BoundarySource.NONE


def run_of(stages, *, policy="cacheflow", **kwargs):
    problems, sources = [stage.problem for stage in stages], [stage.source for stage in stages]
    return run_stages(stages, plan_stages(make_policy(policy), problems, sources), **kwargs)


@given(
    num_stages=st.integers(1, 4),
    later=st.sampled_from([STORED, HANDED, NONE]),
    policy=st.sampled_from(sorted(RESTORE_POLICIES)),
    num_tokens=st.integers(1, 5000),
    ratio=st.floats(0.05, 20),
    shared=st.booleans(),
)
def test_no_run_ends_before_the_bound_and_every_cell_is_restored(num_stages, later, policy, num_tokens, ratio, shared):
    stages = stages_of(num_stages, later=later, link_per_rank=not shared, num_tokens=num_tokens, ratio=ratio)
    run = run_of(stages, policy=policy, num_suffix_chunks=1, shared_link=shared)
    least = staged_bound(stages, num_suffix_chunks=1, shared_link=shared)
    assert run.restore_s >= least.restore_s * (1 - 1e-6)
    assert run.ttft_s >= least.ttft_s * (1 - 1e-6)
    assert "." not in "".join(column for stage in run.stages for column in stage.cells_KB)
    assert run.restore_s == max(stage.restore_s for stage in run.stages)


@pytest.mark.parametrize("policy", ["cacheflow", "cake", "load", "recompute"])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 3.0])
def test_one_stage_is_what_a_rehearsal_is(policy, ratio):
    (stage,) = stages_of(1, ratio=ratio)
    whole = rehearse(stage.problem, make_policy(policy).plan(stage.problem))
    run = run_of([stage], policy=policy)
    assert run.restore_s == pytest.approx(whole.restore_s, rel=1e-9)
    assert run.stages[0].cells_KB == whole.cells_KB


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_stored_boundaries_end_near_the_bound_and_before_handing_over(num_stages, ratio):
    stored = run_of(stages_of(num_stages, ratio=ratio))
    handed = run_of(stages_of(num_stages, ratio=ratio, later=HANDED))
    loaded = run_of(stages_of(num_stages, ratio=ratio, later=NONE))
    one = run_of(stages_of(1, ratio=ratio))
    least = staged_bound(stages_of(num_stages, ratio=ratio))
    assert stored.restore_s < 1.05 * least.restore_s
    assert stored.restore_s < handed.restore_s
    assert stored.restore_s < loaded.restore_s
    assert one.restore_s / stored.restore_s > 0.8 * num_stages


def test_only_chunks_that_are_recomputed_have_their_boundary_read():
    run = run_of(stages_of(2, ratio=1.0))
    _, later = run.stages
    read = [span.chunk for span in later.spans if span.kind is SpanKind.BOUNDARY]
    recomputed = [chunk for chunk, column in enumerate(later.cells_KB) if "c" in column]
    assert read == recomputed[: len(read)]
    assert len(recomputed) - len(read) == 0
    assert 0 < len(read) < len(later.cells_KB)
    assert later.boundary_bytes == len(read) * 512 * 768
    assert run.stages[0].boundary_bytes == 0


def test_no_boundary_is_read_for_the_bytes_of_more_than_it_saves():
    # Two layers a stage: the boundary states are half of what they stand for, and on a slow link hardly worth it.
    stages = [replace(stage, problem=stage.problem) for stage in stages_of(8, ratio=8.0)]
    run = run_of(stages)
    assert all(stage.boundary_bytes < sum(each.problem.load_bytes_KB.sum() for each in stages) for stage in run.stages)
    assert run.restore_s < 1.15 * staged_bound(stages).restore_s


def test_handing_over_is_in_order_chunk_by_chunk():
    run = run_of(stages_of(3, later=HANDED, ratio=2.0))
    ends = [{span.chunk: span.end_s for span in stage.spans if span.lane is Lane.COMPUTE} for stage in run.stages]
    starts = [{span.chunk: span.start_s for span in stage.spans if span.lane is Lane.COMPUTE} for stage in run.stages]
    assert len(starts[2]) > 2
    for below, above in ((0, 1), (1, 2)):
        assert set(starts[above]) <= set(ends[below])
        assert all(start_s >= ends[below][chunk] - 1e-12 for chunk, start_s in starts[above].items())


def test_one_shared_link_costs_more_than_links_of_their_own():
    own, shared = run_of(stages_of(2)), run_of(stages_of(2, link_per_rank=False), shared_link=True)
    assert shared.restore_s > own.restore_s
    assert shared.restore_s < 1.15 * staged_bound(stages_of(2, link_per_rank=False), shared_link=True).restore_s


def test_tensor_parallel_ranks_restore_their_part_each():
    one, two = run_of(stages_of(1)), run_of(stages_of(1, tp=2))
    assert two.restore_s == pytest.approx(one.restore_s / 2, rel=0.02)


def test_the_new_tokens_follow_the_slowest_stage():
    stages = stages_of(2, suffix_tokens=256)
    run = run_of(stages, num_suffix_chunks=1)
    assert run.ttft_s == pytest.approx(run.restore_s + suffix_through_s(stages, 1))
