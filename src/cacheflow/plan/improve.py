"""From the best mixture of staircases to one good staircase: walk between the two it mixes, then swap corner cells.

Shapes: ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

import numpy as np

from cacheflow.plan.staircase import Levels, recomputed_KB
from cacheflow.plan.tradeoff import Tradeoff

MAX_ROUNDS = 4


def best_between(problem: Tradeoff, lower_K: Levels, upper_K: Levels) -> Levels:
    """Best staircase met on the way from ``lower_K`` up to ``upper_K``, column by column or row by row."""
    ends_s = _ends(problem, lower_K)
    between_KB = recomputed_KB(upper_K, problem.num_blocks) & ~recomputed_KB(lower_K, problem.num_blocks)
    chunks, blocks = np.nonzero(between_KB)
    by_row = np.lexsort((chunks, blocks))
    ways = [(chunks, blocks), (chunks[by_row], blocks[by_row])]
    stops = [_best_stop(problem, ends_s, *way) for way in ways]
    way = 0 if stops[0][1] <= stops[1][1] else 1
    return _raised(lower_K, ways[way][0][: stops[way][0]])


def best_by_columns(problem: Tradeoff, lower_K: Levels, upper_K: Levels) -> Levels:
    """Raise one chunk after the other from ``lower_K`` to ``upper_K``, block by block; the best stop."""
    between_KB = recomputed_KB(upper_K, problem.num_blocks) & ~recomputed_KB(lower_K, problem.num_blocks)
    chunks, blocks = np.nonzero(between_KB)
    stop, _ = _best_stop(problem, _ends(problem, lower_K), chunks, blocks)
    return _raised(lower_K, chunks[:stop])


def _ends(problem: Tradeoff, levels_K: Levels) -> tuple[float, float]:
    """Ends of both sides, the link counted as loading something."""
    inside_KB = recomputed_KB(levels_K, problem.num_blocks)
    compute_s = float(problem.compute_KB.sum(where=inside_KB))
    load_s = float(problem.load_KB.sum(where=~inside_KB))
    return compute_s + problem.after_compute_s, load_s + problem.link_end_s


def _best_stop(problem: Tradeoff, ends_s: tuple[float, float], chunks: Levels, blocks: Levels) -> tuple[int, float]:
    """How many of the cells to recompute, in the order given, and the later end then."""
    compute_end, load_end = np.empty(len(chunks) + 1), np.empty(len(chunks) + 1)
    compute_end[0], load_end[0] = ends_s
    np.cumsum(problem.compute_KB[chunks, blocks], out=compute_end[1:])
    np.cumsum(problem.load_KB[chunks, blocks], out=load_end[1:])
    compute_end[1:] += ends_s[0]
    np.subtract(ends_s[1], load_end[1:], out=load_end[1:])
    ends = np.maximum(compute_end, load_end, out=compute_end)
    stop = int(ends.argmin())
    return stop, float(ends[stop])


def _raised(levels_K: Levels, chunks: Levels) -> Levels:
    return levels_K + np.bincount(chunks, minlength=len(levels_K))


def swap_corners(problem: Tradeoff, levels_K: Levels) -> Levels:
    """Add one corner cell, drop one, or both, as long as the later end comes earlier.

    A corner is a cell whose removal, or addition, leaves a staircase.
    """
    levels = levels_K.copy()
    compute_end_s, load_end_s = _ends(problem, levels)
    for _ in range(MAX_ROUNDS):
        swap = _best_swap(problem, levels, compute_end_s, load_end_s)
        if swap is None:
            break
        add, drop, compute_end_s, load_end_s = swap
        levels[add] += 1
        levels[drop] -= 1
    return levels


def _best_swap(
    problem: Tradeoff, levels: Levels, compute_end_s: float, load_end_s: float
) -> tuple[Levels, Levels, float, float] | None:
    """Chunks to raise and to lower by one (each empty or one), and the new ends; None without a gain."""
    before = np.concatenate(([problem.num_blocks], levels[:-1]))
    after = np.append(levels[1:], 0)
    adds, drops = np.flatnonzero(levels < before), np.flatnonzero(levels > after)
    add_compute, add_load = problem.compute_KB[adds, levels[adds]], problem.load_KB[adds, levels[adds]]
    drop_compute, drop_load = problem.compute_KB[drops, levels[drops] - 1], problem.load_KB[drops, levels[drops] - 1]
    # Row and column 0 stand for "none".
    compute = compute_end_s + np.concatenate(([0.0], add_compute))[:, None] - np.concatenate(([0.0], drop_compute))
    load = load_end_s - np.concatenate(([0.0], add_load))[:, None] + np.concatenate(([0.0], drop_load))
    ends = np.maximum(compute, load)
    # Raising the chunk that is lowered, or the one after it, need not leave a staircase.
    distance = adds[:, None] - drops
    ends[1:, 1:][(distance == 0) | (distance == 1)] = np.inf
    row, column = np.unravel_index(int(ends.argmin()), ends.shape)
    if ends[row, column] >= max(compute_end_s, load_end_s) * (1 - 1e-12):
        return None
    add, drop = adds[row - 1 : row] if row else adds[:0], drops[column - 1 : column] if column else drops[:0]
    return add, drop, float(compute[row, column]), float(load[row, column])
