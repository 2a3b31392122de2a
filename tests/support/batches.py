"""Mixed batches of restorations, and their run in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.bench.simulated import SimulatedRequest, SimulatedRun, simulate
from cacheflow.plan.batch import BatchPolicy
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.state.batch import BatchScheduler

BYTES_PER_TOKEN_BLOCK = 768
MIXED = (2048, 1024, 6144, 512, 3072, 1024, 4096, 2048)


def convex_problem(
    num_tokens: int, *, ratio: float = 1.0, suffix_tokens: int = 128, num_blocks: int = 10, chunk_tokens: int = 512
) -> RestoreProblem:
    """Costs that rise along the prefix; ``ratio`` is load over recompute time of a prefix of 4,096 tokens."""
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, num_blocks=num_blocks, suffix_tokens=suffix_tokens
    )
    compute_K = np.array([_cell_s(*grid.chunk_range(chunk)) for chunk in range(grid.num_chunks)]) / num_blocks
    tokens_K = np.diff([0, *grid.chunk_ends])
    suffix_s = sum(_cell_s(*grid.suffix_range(index)) for index in range(len(grid.suffix_ends)))
    ones = np.ones((1, num_blocks))
    whole_s, whole_bytes = _cell_s(0, 4096), 4096 * BYTES_PER_TOKEN_BLOCK * num_blocks
    return RestoreProblem(
        grid=grid,
        compute_KB=compute_K[:, None] * ones,
        kv_only_KB=0.2 * compute_K[:, None] * ones,
        load_bytes_KB=(tokens_K[:, None] * ones * BYTES_PER_TOKEN_BLOCK).astype(np.int64),
        link=LinkCost(bytes_per_s=whole_bytes / (whole_s * ratio)),
        suffix_B=np.full(num_blocks, suffix_s / num_blocks),
        head_s=0.005 if suffix_tokens else 0.0,
    )


def _cell_s(start: int, end: int) -> float:
    return (end - start) * (4e-4 + 2.3e-7 * (start + end) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that comes at a time; ``truth`` is what it really costs."""

    at_s: float
    problem: RestoreProblem
    truth: RestoreProblem | None = None
    first_token_due_s: float | None = None


@dataclass(frozen=True)
class BatchRun(SimulatedRun):
    """Per request, in the order given; and the resources' busy seconds."""

    @property
    def ttft_s(self) -> list[float]:
        return [each.first_token_at_s - each.arrival_s for each in self.restored]

    @property
    def mean_ttft_s(self) -> float:
        return sum(self.ttft_s) / len(self.restored)

    @property
    def makespan_s(self) -> float:
        return max(each.first_token_at_s for each in self.restored)


def run_batch(policy: BatchPolicy, arrivals: Sequence[Arrival], *, starvation_s: float = float("inf")) -> BatchRun:
    """Run a batch to its end on one device in virtual time."""
    cost = arrivals[0].problem.link
    scheduler = BatchScheduler(policy, LiveRates(bytes_per_s=cost.bytes_per_s), starvation_s=starvation_s)
    requests = [
        SimulatedRequest(
            arrival_s=each.at_s, problem=each.problem, truth=each.truth, first_token_due_s=each.first_token_due_s
        )
        for each in arrivals
    ]
    run = simulate(requests, scheduler, cost)
    assert len(scheduler) == 0
    return BatchRun(restored=run.restored, compute_busy_s=run.compute_busy_s, io_busy_s=run.io_busy_s)
