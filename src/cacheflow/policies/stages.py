"""A restore policy's plan for one pipeline stage, by where the stage's activations come from."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from cacheflow.plan.boundaries import BoundarySource
from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
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


def plan_stage(policy: RestorePolicy, problem: RestoreProblem, source: BoundarySource) -> RestorePlan:
    """Plan one stage.

    Args:
        policy: Plans a first stage as it is, and one with stored boundaries on what the boundaries leave to gain.
        problem: Of the stage's layers, without a suffix; with boundary bytes when the source is ``STORED``.
        source: ``HANDED_OVER``, or ``FIRST_STAGE`` below such a stage: see ``plan_handing_over``. ``NONE`` loads.
    """
    if source is BoundarySource.NONE:
        return Load().plan(problem)
    if source is BoundarySource.HANDED_OVER:
        return plan_handing_over(policy.name, problem)
    if not problem.boundary_bytes_K.any():
        return policy.plan(problem)
    return _columns_whole(policy.plan(behind_boundaries(problem)))


def plan_handing_over(policy: str, problem: RestoreProblem) -> RestorePlan:
    """Whole chunks from both ends, for every stage of a chain that hands activations over, its bottom one included."""
    return token_wise_plan(policy, problem)


def behind_boundaries(problem: RestoreProblem) -> RestoreProblem:
    """A stage with stored boundaries as one without, for a planner that knows of none.

    The boundaries of all chunks come first, as if they were latency, and every chunk saves so much less of its load:
    a split by tokens costs the same either way. Keys and values alone are never worth a boundary, so that only the
    stage's top block counts them.
    """
    chunk_bytes_K = problem.load_bytes_KB.sum(axis=1)
    boundary_K = np.minimum(problem.boundary_bytes_K, chunk_bytes_K)
    share_K = 1.0 - boundary_K / np.maximum(chunk_bytes_K, 1)
    kv_only_KB = problem.compute_KB.copy()
    kv_only_KB[:, -1] = problem.kv_only_KB[:, -1]
    latency_s = problem.link.latency_s + float(boundary_K.sum()) / problem.link.bytes_per_s
    return replace(
        problem,
        kv_only_KB=kv_only_KB,
        load_bytes_KB=(problem.load_bytes_KB * share_K[:, None]).astype(np.int64),
        link=replace(problem.link, latency_s=latency_s),
        boundary_bytes_K=np.zeros(problem.grid.num_chunks, dtype=np.int64),
    )


def _columns_whole(plan: RestorePlan) -> RestorePlan:
    """The plan without a bottom row of its own: to compute it, every chunk would need its boundary."""
    if not plan.bottom_row_by_compute:
        return plan
    num_blocks = max(tile.block_hi for tile in plan.load_order)
    chunks = dict.fromkeys(tile.chunk_lo for tile in plan.load_order)
    load_order = tuple(Tile(chunk, chunk + 1, 0, num_blocks) for chunk in chunks)
    return replace(plan, load_order=load_order, bottom_row_by_compute=False)
