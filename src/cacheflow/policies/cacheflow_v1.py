"""Layer-wise below a crossover length, token-wise above: CacheFlow v1.

Source: CacheFlow v1 (arXiv 2604.25080v1): layers recomputed bottom-up and loaded top-down on short prefixes, chunks
from both ends on long ones; the crossover length ``L_delta`` is found by offline profiling.
"""

from __future__ import annotations

from typing import ClassVar

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import empty_plan
from cacheflow.policies.cake import token_wise_plan
from cacheflow.policies.predict import meet


class CacheFlowV1:
    """Two pointers over whole rows or whole columns, in full; the suffix follows the restoration."""

    name: ClassVar[str] = "cacheflow_v1"

    def __init__(self, *, crossover_tokens: int | None = None) -> None:
        """Take the crossover length.

        Args:
            crossover_tokens: Prefixes up to this length go layer-wise, longer ones token-wise; None compares both
                predictions for each problem, which is never worse than one measured length.

        Raises:
            ConfigError: The length is negative.
        """
        if crossover_tokens is not None and crossover_tokens < 0:
            raise ConfigError(f"crossover_tokens is {crossover_tokens}, must be 0 or more, or None to predict it")
        self._crossover_tokens = crossover_tokens

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan two pointers over the rows or the columns."""
        if problem.grid.num_chunks == 0:
            return empty_plan(self.name, problem)
        if self._crossover_tokens is not None:
            layer_wise = problem.grid.num_tokens <= self._crossover_tokens
            return layer_wise_plan(self.name, problem) if layer_wise else token_wise_plan(self.name, problem)
        plans = (token_wise_plan(self.name, problem), layer_wise_plan(self.name, problem))
        return min(plans, key=lambda plan: plan.predicted.restore_s)


def layer_wise_plan(policy: str, problem: RestoreProblem) -> RestorePlan:
    """Two pointers over whole rows, compute from the bottom and the link from the top."""
    grid = problem.grid
    rows = tuple(Tile(0, grid.num_chunks, block, block + 1) for block in range(grid.num_blocks))
    met = meet(problem, problem.compute_KB.sum(axis=0), problem.load_bytes_KB.sum(axis=0))
    return RestorePlan(
        policy=policy,
        compute_sequence=rows,
        load_sequence=rows[::-1],
        share=Share.NONE,
        suffix_start=SuffixStart.AFTER_RESTORE,
        levels_K=(met.num_computed,) * grid.num_chunks,
        predicted=met.predicted,
        kv_only_top=False,
    )
