"""Load layer by layer while the suffix climbs after it: SGLang HiCache."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import empty_plan
from cacheflow.policies.predict import climb


class LayerwiseLoad:
    """Row by row from the bottom; the suffix runs a block as soon as its row is there."""

    name: ClassVar[str] = "layerwise_load"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan to load every row."""
        grid = problem.grid
        if grid.num_chunks == 0:
            return empty_plan(self.name, problem)
        return RestorePlan(
            policy=self.name,
            compute_sequence=(),
            load_sequence=tuple(Tile(0, grid.num_chunks, block, block + 1) for block in range(grid.num_blocks)),
            share=Share.NONE,
            suffix_start=SuffixStart.BLOCK_BY_BLOCK,
            levels_K=(0,) * grid.num_chunks,
            predicted=climb(problem, np.zeros(grid.num_chunks, dtype=np.int64)),
            kv_only_top=False,
        )
