"""A model on a GPU with a link, and what restoring prefixes costs there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cacheflow.model_shape import ModelShape
from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.shapes.hardware import find_gpu, find_model
from cacheflow.shapes.roofline import Roofline, problem_from_roofline

COST_SOURCE = "roofline"
PREFILL_CHUNK_TOKENS = 2048
"""An engine's own prefill takes so many tokens in one pass, wherever the prefix ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a figure takes place.

    Attributes:
        gbps: Link in Gbit/s; the GPU's host link caps it.
        chunk_tokens: Tokens of a chunk; 0 for the whole prefix in one.
    """

    model: str = "Qwen3-8B"
    gpu: str = "H100"
    gbps: float = 10.0
    chunk_tokens: int = 512

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return find_model(self.model)

    def problem(self, *, num_tokens: int, suffix_tokens: int) -> RestoreProblem:
        """What one restoration costs, one row of layers a block; new tokens run in the engine's own passes."""
        gpu, shape = find_gpu(self.gpu), self.shape
        grid = Grid(
            chunk_ends=regular_ends(0, num_tokens, self.chunk_tokens or num_tokens),
            num_blocks=shape.num_rows,
            suffix_ends=regular_ends(num_tokens, num_tokens + suffix_tokens, PREFILL_CHUNK_TOKENS),
        )
        link = LinkCost(bytes_per_s=min(self.gbps * 1e9 / 8, gpu.pcie_bytes_per_s))
        return problem_from_roofline(Roofline(shape=shape, gpu=gpu), grid, link=link)

    def prefill(self, problem: RestoreProblem) -> RestoreProblem:
        """The same prompt as an engine that restores nothing prefills it: prefix and new tokens in the same passes."""
        grid = problem.grid
        whole = self.problem(num_tokens=0, suffix_tokens=grid.num_tokens + grid.suffix_tokens)
        return replace(whole, link=problem.link, head_s=problem.head_s)


def with_ratio(problem: RestoreProblem, ratio: float) -> RestoreProblem:
    """The same restoration over a link that loads everything in ``ratio`` times the time to recompute it."""
    num_bytes = float(problem.load_bytes_KB.sum())
    return replace(problem, link=LinkCost(bytes_per_s=num_bytes / (ratio * problem.recompute_s)))
