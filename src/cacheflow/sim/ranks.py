"""A replica of several GPUs, seen from the rank that everyone waits for.

Tensor-parallel ranks do the same at the same time. Stages restore side by side and are equal but for a layer, so the
largest one after the first stands for all: its compute resource, its link, its state machine. What the other stages
add to a first token is the time the new tokens take in them, one after the other. Decoding passes all stages and
keeps each waiting meanwhile. What collectives cost is not counted.
"""

from __future__ import annotations

from dataclasses import replace

from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import BoundarySource, LinkCost, RestoreProblem
from cacheflow.plan.stage_sources import StageTimes, sooner, stage_times
from cacheflow.plan.stages import RankLayout, StageProblem, stage_problems
from cacheflow.sim.costs import ModelCosts


class RankCosts:
    """``ModelCosts`` of one rank of the stage that stands for all."""

    def __init__(self, costs: ModelCosts, layout: RankLayout, *, boundary_states: bool) -> None:
        """Share a model.

        Args:
            costs: Of the model on one GPU.
            layout: Stages and ranks. Links are given with each problem, as one rank has them.
            boundary_states: Stages read stored boundary states where that is sooner than waiting for the first chunk.

        Raises:
            ConfigError: The layout does not fit the model.
        """
        layout.kv_parts(costs.shape)
        self.model, self.gpu, self.source, self.shape = costs.model, costs.gpu, costs.source, costs.shape
        self._costs, self._boundary_states = costs, boundary_states
        self._layout = replace(layout, link_per_rank=True)

    def problem(self, grid: Grid, *, link: LinkCost) -> RestoreProblem:
        """See ``ModelCosts``; ``grid`` has the whole model's rows, the problem those of the stage."""
        whole = self._costs.problem(grid, link=link)
        handed = stage_problems(whole, self.shape, self._layout, BoundarySource.HANDED_OVER)
        chosen = _slowest(handed)
        if self._boundary_states and self._layout.pipeline_parallel_size > 1:
            stored = stage_problems(whole, self.shape, self._layout, BoundarySource.STORED)
            ways = {BoundarySource.STORED: _slowest_times(stored), BoundarySource.HANDED_OVER: _slowest_times(handed)}
            chosen = _slowest(stored if sooner(ways) is BoundarySource.STORED else handed)
        num_rows, own = self.shape.num_rows, chosen.problem.grid.num_blocks
        tp = self._layout.tensor_parallel_size
        return replace(
            chosen.problem,
            grid=replace(chosen.problem.grid, suffix_ends=grid.suffix_ends),
            suffix_B=whole.suffix_B[num_rows - own :] / tp,
            head_s=whole.head_s / tp,
        )

    def longest_pass(self, num_tokens: int) -> int:
        """See ``ModelCosts``."""
        return self._costs.longest_pass(num_tokens)

    def decode_step_s(self, num_requests: int, context_tokens: int) -> float:
        """See ``ModelCosts``."""
        return self._costs.decode_step_s(num_requests, context_tokens) / self._layout.tensor_parallel_size

    def elsewhere_s(self, problem: RestoreProblem) -> float:
        """Seconds that a first token needs in the other stages, and, handed over, until the first chunk came up."""
        own = problem.grid.num_blocks
        new_s = float(problem.suffix_B.sum()) * (self.shape.num_rows / own - 1.0)
        waits = problem.grid.num_chunks > 0 and not problem.boundary_bytes_K.any()
        return new_s + (_fill_s(problem, self._layout) if waits else 0.0)


def _slowest(stages: tuple[StageProblem, ...]) -> StageProblem:
    """The largest stage, one after the first where there are several."""
    return max(stages[1:] or stages, key=lambda stage: stage.problem.grid.num_blocks)


def _slowest_times(stages: tuple[StageProblem, ...]) -> StageTimes:
    times = stage_times([stage.problem for stage in stages], [stage.source for stage in stages])
    return max(times, key=lambda each: each.restore_s)


def _fill_s(problem: RestoreProblem, layout: RankLayout) -> float:
    return (layout.pipeline_parallel_size - 1) * float(problem.compute_KB[:1].sum())
