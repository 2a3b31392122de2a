"""The best fixed staircase by dynamic programming: CacheFlow v2.

Source: CacheFlow v2 (26 September 2026) as summarised in NUMBERS.md: decision ``j`` chunks per layer block, never
increasing with depth, minimising the later of compute and load. Its paper quantises the state; here the search is
exact, so this is the best that it could plan for one request.
"""

from __future__ import annotations

from typing import ClassVar

from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.planner import Objective, plan_levels
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.staircase import check_levels, compute_tiles, load_tiles
from cacheflow.policies.base import empty_plan
from cacheflow.policies.predict import after_restore

EXACT_CELLS = 1024


class CacheFlowV2:
    """A planned split that does not move, its cells in full; the suffix follows the restoration.

    Exact with equal layers, and on grids of up to ``EXACT_CELLS`` cells unless their costs leave too many states to
    keep; on larger ones the Lagrangian planner's staircase, typically within 0.1 % of the bound.
    """

    name: ClassVar[str] = "cacheflow_v2"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan the staircase with the least restoration time."""
        grid = problem.grid
        if grid.num_chunks == 0:
            return empty_plan(self.name, problem)
        planned = plan_levels(problem, Objective.RESTORE, kv_only_top=False, exact_cells=EXACT_CELLS)
        levels_K = check_levels(planned.levels_K, grid.num_blocks)
        return RestorePlan(
            policy=self.name,
            compute_sequence=compute_tiles(levels_K),
            load_sequence=load_tiles(levels_K, grid.num_blocks),
            share=Share.NONE,
            suffix_start=SuffixStart.AFTER_RESTORE,
            levels_K=planned.levels_K,
            predicted=after_restore(problem, compute_s=planned.predicted.compute_s, load_s=planned.predicted.load_s),
            kv_only_top=False,
        )
