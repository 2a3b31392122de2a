"""Small restoration problems with costs that look like a transformer's."""

from __future__ import annotations

import numpy as np

from cacheflow.plan.grid import Grid, Tile
from cacheflow.plan.plan import Prediction, RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import LinkCost, RestoreProblem


def transformer_problem(
    *,
    num_tokens: int = 4096,
    suffix_tokens: int = 256,
    ratio: float = 1.0,
    chunk_tokens: int = 512,
    num_blocks: int = 30,
    cost_error: float = 1.0,
    bandwidth_error: float = 1.0,
) -> RestoreProblem:
    """Convex chunk costs, equal blocks; ``ratio`` is load over recompute time; errors scale what is planned with."""
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, num_blocks=num_blocks, suffix_tokens=suffix_tokens
    )

    def cost_s(lo: int, hi: int) -> float:
        q = hi - lo
        return (q * 4.2e-4 + q * (lo + q / 2) * 7e-8) / num_blocks + 2e-5

    ranges = [grid.chunk_range(k) for k in range(grid.num_chunks)]
    compute_KB = np.array([[cost_s(*r)] * num_blocks for r in ranges]).reshape(grid.num_chunks, num_blocks)
    bytes_KB = np.array([[(hi - lo) * 768] * num_blocks for lo, hi in ranges], dtype=np.int64)
    suffix_s = sum(cost_s(*grid.suffix_range(i)) for i in range(len(grid.suffix_ends)))
    recompute_s = compute_KB.sum() or 1.0
    return RestoreProblem(
        grid=grid,
        compute_KB=compute_KB * cost_error,
        kv_only_KB=compute_KB * 0.1 * cost_error,
        load_bytes_KB=bytes_KB.reshape(grid.num_chunks, num_blocks),
        link=LinkCost(bytes_per_s=(bytes_KB.sum() or 1.0) / (recompute_s * ratio) * bandwidth_error),
        suffix_B=np.full(num_blocks, suffix_s) * cost_error,
        head_s=0.002 * cost_error if suffix_tokens else 0.0,
    )


def shared_plan(problem: RestoreProblem, *, bottom_row: bool = False) -> RestorePlan:
    """Column tiles shared by layers, the suffix behind the load: the rules of the ``cacheflow`` policy."""
    grid = problem.grid
    columns = tuple(Tile(k, k + 1, 0, grid.num_blocks) for k in range(grid.num_chunks))
    has_suffix = bool(grid.suffix_ends)
    bottom_row = bottom_row and grid.num_blocks > 1
    load_sequence = columns[::-1]
    if bottom_row:
        upper = tuple(Tile(t.chunk_lo, t.chunk_hi, 1, t.block_hi) for t in load_sequence)
        load_sequence = (*upper, *(Tile(t.chunk_lo, t.chunk_hi, 0, 1) for t in load_sequence))
    return RestorePlan(
        policy="cacheflow",
        compute_sequence=columns,
        load_sequence=load_sequence,
        share=Share.LAYERS,
        suffix_start=SuffixStart.BLOCK_BY_BLOCK if has_suffix else SuffixStart.AFTER_RESTORE,
        levels_K=(0,) * grid.num_chunks,
        predicted=Prediction(restore_s=0.0, ttft_s=0.0, compute_s=0.0, load_s=0.0),
        balance_suffix=has_suffix,
        bottom_row_by_compute=bottom_row,
    )


def whole_chunk_plan(problem: RestoreProblem) -> RestorePlan:
    """Whole chunks from both ends, the suffix after the restoration: the rules of Cake."""
    grid = problem.grid
    columns = tuple(Tile(k, k + 1, 0, grid.num_blocks) for k in range(grid.num_chunks))
    return RestorePlan(
        policy="cake",
        compute_sequence=columns,
        load_sequence=columns[::-1],
        share=Share.NONE,
        suffix_start=SuffixStart.AFTER_RESTORE,
        levels_K=(0,) * grid.num_chunks,
        predicted=Prediction(restore_s=0.0, ttft_s=0.0, compute_s=0.0, load_s=0.0),
        kv_only_top=False,
    )
