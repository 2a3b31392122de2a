"""Compute from the head, load from the tail, whole chunks: Cake.

Source: Cake (ICML 2025, arXiv 2410.03065); the token-wise way of CacheFlow v1 is the same.
"""

from __future__ import annotations

from typing import ClassVar

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import empty_plan
from cacheflow.policies.predict import meet


class Cake:
    """A chunk belongs whole to the side that takes it first, in full; the suffix follows the restoration."""

    name: ClassVar[str] = "cake"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan two pointers over the columns."""
        return token_wise_plan(self.name, problem)


def token_wise_plan(policy: str, problem: RestoreProblem) -> RestorePlan:
    """Two pointers over whole columns, compute from the head and the link from the tail."""
    grid = problem.grid
    if grid.num_chunks == 0:
        return empty_plan(policy, problem)
    columns = tuple(Tile(chunk, chunk + 1, 0, grid.num_blocks) for chunk in range(grid.num_chunks))
    met = meet(problem, problem.compute_KB.sum(axis=1), problem.load_bytes_KB.sum(axis=1))
    return RestorePlan(
        policy=policy,
        compute_sequence=columns,
        load_sequence=columns[::-1],
        share=Share.NONE,
        suffix_start=SuffixStart.AFTER_RESTORE,
        levels_K=(grid.num_blocks,) * met.num_computed + (0,) * (grid.num_chunks - met.num_computed),
        predicted=met.predicted,
        kv_only_top=False,
    )
