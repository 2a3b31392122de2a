"""A restore policy's plan for one pipeline stage, by where the stage's activations come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, Share
from cacheflow.plan.problem import BoundarySource, RestoreProblem, Seconds
from cacheflow.plan.stage_sources import stage_times
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.cake import token_wise_plan
from cacheflow.policies.load import Load


class StagePolicy:
    """A restore policy that plans any stage for itself: with stored boundaries where the problem has some."""

    name: ClassVar[str] = "staged"

    def __init__(self, policy: RestorePolicy) -> None:
        """Wrap a policy that knows of no stages; plans carry its name."""
        self._policy = policy

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan one stage; see ``plan_stage``."""
        stored = problem.boundary_bytes_K.any()
        return plan_stage(self._policy, problem, BoundarySource.STORED if stored else BoundarySource.FIRST_STAGE)


def plan_stages(
    policy: RestorePolicy, problems: Sequence[RestoreProblem], sources: Sequence[BoundarySource]
) -> list[RestorePlan]:
    """Plan all stages of a model, bottom stage first; see ``plan_stage``."""
    above = [*sources[1:], BoundarySource.NONE]
    return [
        plan_stage(policy, problem, source, expected_s=times.restore_s, hands_over=taker is BoundarySource.HANDED_OVER)
        for problem, source, taker, times in zip(problems, sources, above, stage_times(problems, sources), strict=True)
    ]


def plan_stage(
    policy: RestorePolicy,
    problem: RestoreProblem,
    source: BoundarySource,
    *,
    expected_s: float = 0.0,
    hands_over: bool = False,
) -> RestorePlan:
    """Plan one stage.

    Args:
        policy: Plans a first stage as it is, one with stored boundaries on what the boundaries leave to gain, and one
            that hands activations over or is handed them column by column, so that they come up as soon as can be.
        problem: Of the stage's layers, without a suffix; with boundary bytes when the source is ``STORED``.
        source: Of the stage's activations; ``NONE`` loads.
        expected_s: Seconds it takes at least, waiting for the stage below included.
        hands_over: The stage above takes its activations from this one.
    """
    if source is BoundarySource.NONE or policy.name == Load.name:
        return Load().plan(problem)
    in_chain = hands_over or source is BoundarySource.HANDED_OVER
    if source is BoundarySource.STORED and problem.boundary_bytes_K.any():
        problem = behind_boundaries(problem)
    elif source is BoundarySource.HANDED_OVER:
        problem = replace(problem, kv_only_KB=_kv_only_at_top(problem))
    if hands_over:
        problem = _with_full_top(problem)
    plan = _by_columns(policy, problem) if in_chain else policy.plan(problem)
    if source is BoundarySource.FIRST_STAGE:
        return plan
    return _not_before(_columns_whole(plan), expected_s) if in_chain else _columns_whole(plan)


def _by_columns(policy: RestorePolicy, problem: RestoreProblem) -> RestorePlan:
    """Chunk after chunk from the head, each shared by layers where the policy does; another order: whole chunks."""
    plan, grid = policy.plan(problem), problem.grid
    columns = tuple(Tile(chunk, chunk + 1, 0, grid.num_blocks) for chunk in range(grid.num_chunks))
    if plan.compute_sequence in ((), columns) and (plan.share is Share.LAYERS or not plan.compute_sequence):
        return plan
    if plan.share is not Share.LAYERS:
        return token_wise_plan(policy.name, problem)
    return replace(plan, compute_sequence=columns, load_sequence=columns[::-1], bottom_row_by_compute=False)


def _with_full_top(problem: RestoreProblem) -> RestoreProblem:
    """Keys and values alone are not enough of the top block where it is handed over."""
    kv_only_KB = problem.kv_only_KB.copy()
    kv_only_KB[:, -1] = problem.compute_KB[:, -1]
    return replace(problem, kv_only_KB=kv_only_KB)


def _not_before(plan: RestorePlan, expected_s: float) -> RestorePlan:
    """The plan with its predicted times put off to what the wait for other stages allows."""
    late_s = expected_s - plan.predicted.restore_s
    if late_s <= 0:
        return plan
    times = replace(plan.predicted, restore_s=expected_s, ttft_s=plan.predicted.ttft_s + late_s)
    return replace(plan, predicted=times)


def _kv_only_at_top(problem: RestoreProblem) -> Seconds:
    """Keys and values alone are never worth a chunk's activations: only the top block counts them."""
    kv_only_KB = problem.compute_KB.copy()
    kv_only_KB[:, -1] = problem.kv_only_KB[:, -1]
    return kv_only_KB


def behind_boundaries(problem: RestoreProblem) -> RestoreProblem:
    """A stage with stored boundaries as one without, for a planner that knows of none.

    The boundaries of all chunks come first, as if they were latency, and every chunk saves so much less of its load:
    a split by tokens costs the same either way.
    """
    chunk_bytes_K = problem.load_bytes_KB.sum(axis=1)
    boundary_K = np.minimum(problem.boundary_bytes_K, chunk_bytes_K)
    share_K = 1.0 - boundary_K / np.maximum(chunk_bytes_K, 1)
    latency_s = problem.link.latency_s + float(boundary_K.sum()) / problem.link.bytes_per_s
    return replace(
        problem,
        kv_only_KB=_kv_only_at_top(problem),
        load_bytes_KB=(problem.load_bytes_KB * share_K[:, None]).astype(np.int64),
        link=replace(problem.link, latency_s=latency_s),
        boundary_bytes_K=np.zeros(problem.grid.num_chunks, dtype=np.int64),
    )


def _columns_whole(plan: RestorePlan) -> RestorePlan:
    """The plan without a bottom row of its own: to compute it, every chunk would need its boundary."""
    if not plan.bottom_row_by_compute:
        return plan
    num_blocks = max(tile.block_hi for tile in plan.load_sequence)
    chunks = dict.fromkeys(tile.chunk_lo for tile in plan.load_sequence)
    load_sequence = tuple(Tile(chunk, chunk + 1, 0, num_blocks) for chunk in chunks)
    return replace(plan, load_sequence=load_sequence, bottom_row_by_compute=False)
