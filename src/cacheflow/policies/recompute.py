"""Recompute everything: what an engine without a KV store does."""

from __future__ import annotations

from typing import ClassVar

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import empty_plan
from cacheflow.policies.predict import after_restore


class Recompute:
    """Chunk by chunk through all blocks, in full (engines do not skip the top row's attention and MLP)."""

    name: ClassVar[str] = "recompute"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan to compute every column; nothing is loaded."""
        grid = problem.grid
        if grid.num_chunks == 0:
            return empty_plan(self.name, problem)
        return RestorePlan(
            policy=self.name,
            compute_sequence=tuple(Tile(chunk, chunk + 1, 0, grid.num_blocks) for chunk in range(grid.num_chunks)),
            load_sequence=(),
            share=Share.NONE,
            suffix_start=SuffixStart.AFTER_RESTORE,
            levels_K=(grid.num_blocks,) * grid.num_chunks,
            predicted=after_restore(problem, compute_s=float(problem.compute_KB.sum()), load_s=0.0),
            kv_only_top=False,
        )
