"""Load everything, then run the suffix: what LMCache does."""

from __future__ import annotations

from typing import ClassVar

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import empty_plan
from cacheflow.policies.predict import after_restore


class Load:
    """Chunk by chunk from the head; nothing is computed unless a load fails."""

    name: ClassVar[str] = "load"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan to load every column."""
        grid = problem.grid
        if grid.num_chunks == 0:
            return empty_plan(self.name, problem)
        return RestorePlan(
            policy=self.name,
            compute_sequence=(),
            load_sequence=tuple(Tile(chunk, chunk + 1, 0, grid.num_blocks) for chunk in range(grid.num_chunks)),
            share=Share.NONE,
            suffix_start=SuffixStart.AFTER_RESTORE,
            levels_K=(0,) * grid.num_chunks,
            predicted=after_restore(problem, compute_s=0.0, load_s=problem.load_s),
            kv_only_top=False,
        )
