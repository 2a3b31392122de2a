"""The optimal staircase in closed form when all layer blocks cost the same and later chunks cost more.

A column then costs ``v`` (keys and values) for its first level and ``c`` for each further one, with ``v`` and ``c``
rising along the prefix, and every level spares the link the same bytes. So for any number of recomputed cells the
cheapest ones are a staircase: whole columns from the head, after them one level each where ``v`` is below ``c``. The
best number is where compute and the link meet. A shorter last chunk spares fewer bytes; it is tried at every level.

Shapes: ``K`` chunks, ``B`` layer blocks, ``N`` chunks of full size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheflow.plan.problem import Seconds
from cacheflow.plan.staircase import Levels
from cacheflow.plan.tradeoff import Tradeoff


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """Equal blocks: cost of the first and of each further level of a chunk, and link seconds of a cell."""

    first_K: Seconds
    further_K: Seconds
    cell_load_K: Seconds
    num_blocks: int


def equal_block_levels(problem: Tradeoff) -> Levels | None:
    """Levels of the optimal staircase; None when the problem is not of this kind.

    Optimal among staircases that load something; the caller compares with loading nothing.
    """
    blocks = _as_equal_blocks(problem)
    if blocks is None:
        return None
    num_full = problem.num_chunks
    if blocks.cell_load_K[-1] < blocks.cell_load_K[0] or not _rising(blocks, num_full):
        num_full -= 1
    if num_full == 0:
        return None
    best_s, best = float("inf"), None
    last_levels = range(problem.num_blocks + 1) if num_full < problem.num_chunks else range(1)
    for last_level in last_levels:
        base_s = _base_compute_s(blocks, num_full, last_level)
        if base_s + problem.after_compute_s >= best_s:
            break
        value_s, levels = _best_with_last(problem, blocks, num_full, last_level)
        if value_s < best_s:
            best_s, best = value_s, levels
    return best


def _as_equal_blocks(problem: Tradeoff) -> _Blocks | None:
    compute_KB, load_KB = problem.compute_KB, problem.load_KB
    first_K, further_K, cell_load_K = compute_KB[:, 0], compute_KB[:, -1], load_KB[:, 0]
    equal = (compute_KB[:, 1:] == further_K[:, None]).all() and (load_KB == cell_load_K[:, None]).all()
    same_bytes = (cell_load_K[:-1] == cell_load_K[0]).all() and cell_load_K[-1] <= cell_load_K[0]
    if not (equal and same_bytes):
        return None
    blocks = _Blocks(first_K=first_K, further_K=further_K, cell_load_K=cell_load_K, num_blocks=problem.num_blocks)
    return blocks if _rising(blocks, problem.num_chunks - 1) else None


def _rising(blocks: _Blocks, num_chunks: int) -> bool:
    first, further = blocks.first_K[:num_chunks], blocks.further_K[:num_chunks]
    return bool((first[1:] >= first[:-1]).all() and (further[1:] >= further[:-1]).all() and (first <= further).all())


def _base_compute_s(blocks: _Blocks, num_full: int, last_level: int) -> float:
    """Compute seconds that a last chunk at ``last_level`` forces: every chunk before it is at least as high."""
    if last_level == 0:
        return 0.0
    num_chunks = len(blocks.first_K)
    first_s = float(blocks.first_K[:num_full].sum() + blocks.first_K[num_full:num_chunks].sum())
    return first_s + (last_level - 1) * float(blocks.further_K.sum())


def _best_with_last(problem: Tradeoff, blocks: _Blocks, num_full: int, last_level: int) -> tuple[float, Levels]:
    """Best staircase whose last, shorter chunk has this level (with ``num_full == K`` there is no such chunk)."""
    num_blocks, load_s = blocks.num_blocks, float(blocks.cell_load_K[0])
    further = blocks.further_K[:num_full]
    if last_level == 0:
        costs = np.concatenate([blocks.first_K[:num_full], further])
        counts = np.repeat([1, num_blocks - 1], num_full)
    else:
        costs, counts = further, np.full(num_full, num_blocks - last_level)
    order = np.argsort(costs, kind="stable")
    short_load_s = float(blocks.cell_load_K[num_full:].sum()) * (num_blocks - last_level)
    num_taken, value_s = _meeting_point(
        costs[order],
        counts[order],
        compute_end_s=_base_compute_s(blocks, num_full, last_level) + problem.after_compute_s,
        load_end_s=load_s * int(counts.sum()) + short_load_s + problem.link_end_s,
        cell_load_s=load_s,
    )
    taken = np.empty(len(counts), dtype=np.int64)
    before = counts[order].cumsum() - counts[order]
    taken[order] = np.clip(num_taken - before, 0, counts[order])
    levels = np.full(len(blocks.first_K), last_level, dtype=np.int64)
    levels[:num_full] += taken[-num_full:]
    if last_level == 0:
        levels[:num_full] += taken[:num_full]
    return value_s, levels


def _meeting_point(
    costs: Seconds, counts: Levels, *, compute_end_s: float, load_end_s: float, cell_load_s: float
) -> tuple[int, float]:
    """How many cells to recompute, taken in order, so that the later of both ends is earliest; and that end.

    Args:
        costs: Seconds of one cell of each group.
        counts: Cells of each group.
        compute_end_s: End of compute with none taken.
        load_end_s: End of the link with none taken.
        cell_load_s: Link seconds one taken cell spares.
    """
    ends = compute_end_s + np.concatenate(([0.0], (costs * counts).cumsum()))
    taken = np.concatenate(([0], counts.cumsum()))
    group = int(np.searchsorted(ends - (load_end_s - cell_load_s * taken), 0.0)) - 1
    if group < 0:
        return 0, max(compute_end_s, load_end_s)
    group = min(group, len(costs) - 1)
    start, count, cost = int(taken[group]), int(counts[group]), float(costs[group])
    gap_s = load_end_s - cell_load_s * start - float(ends[group])
    whole = min(count, int(gap_s / (cost + cell_load_s))) if cost + cell_load_s > 0 else count
    choices = [
        (max(float(ends[group]) + cost * extra, load_end_s - cell_load_s * (start + extra)), start + extra)
        for extra in range(max(0, whole - 1), min(count, whole + 2) + 1)
        if extra <= count
    ]
    value_s, num_taken = min(choices)
    return num_taken, value_s
