"""Staircases: which cells are recomputed, as levels per chunk or heights per block, what they cost, their tiles.

A staircase is the only shape compute can restore without waiting for I/O: ``levels_K[k]`` bottom blocks of chunk ``k``,
never increasing along the prefix, or equally ``heights_B[b]`` leading chunks of block ``b``, never increasing upwards.
Its cost is a sum over its cells although the topmost cell of a column is cheaper (keys and values only): raising a
column by block ``b`` costs the keys and values of ``b`` plus the attention and MLP that block ``b - 1`` had skipped.

Shapes: ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cacheflow.plan.grid import Tile
from cacheflow.plan.problem import RestoreProblem, Seconds

Levels = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def check_levels(levels_K: Sequence[int] | Levels, num_blocks: int) -> Levels:
    """Return the levels as an array, once they are a staircase.

    Raises:
        ValueError: A level is outside ``0..num_blocks``, or one is higher than the level before it.
    """
    levels = np.asarray(levels_K, dtype=np.int64)
    if levels.size and (levels.min() < 0 or levels.max() > num_blocks):
        raise ValueError(f"levels must lie in 0..{num_blocks}, got {levels.min()}..{levels.max()}")
    rises = np.flatnonzero(levels[1:] > levels[:-1])
    if rises.size:
        chunk = int(rises[0]) + 1
        raise ValueError(f"levels must never increase: chunk {chunk} has {levels[chunk]} after {levels[chunk - 1]}")
    return levels


def heights_of(levels_K: Levels, num_blocks: int) -> Levels:
    """Leading chunks recomputed in each block; shape ``(B,)``."""
    per_level = np.bincount(levels_K, minlength=num_blocks + 1)
    return per_level[:0:-1].cumsum()[::-1].astype(np.int64)


def levels_of(heights_B: Levels, num_chunks: int) -> Levels:
    """Bottom blocks recomputed in each chunk; shape ``(K,)``. The inverse of ``heights_of``."""
    return heights_of(heights_B, num_chunks)


def recomputed_KB(levels_K: Levels, num_blocks: int) -> Mask:
    """Which cells a staircase recomputes; shape ``(K, B)``."""
    mask: Mask = np.arange(num_blocks) < levels_K[:, None]
    return mask


def marginal_compute_KB(problem: RestoreProblem, *, kv_only_top: bool = True) -> Seconds:
    """Seconds by which recomputing a cell raises the cost of its column, the cells below it being recomputed.

    Summed over any staircase this is the staircase's compute time. Shape ``(K, B)``.

    Args:
        problem: What the cells cost.
        kv_only_top: Count the topmost cell of each column for its keys and values only.
    """
    if not kv_only_top:
        return problem.compute_KB
    marginal = problem.kv_only_KB.copy()
    marginal[:, 1:] += problem.compute_KB[:, :-1] - problem.kv_only_KB[:, :-1]
    return marginal


def staircase_compute_s(problem: RestoreProblem, levels_K: Levels, *, kv_only_top: bool = True) -> float:
    """Compute seconds of a staircase, in the order of its columns."""
    inside = recomputed_KB(levels_K, problem.grid.num_blocks)
    return float(marginal_compute_KB(problem, kv_only_top=kv_only_top)[inside].sum())


def staircase_load_bytes(problem: RestoreProblem, levels_K: Levels) -> int:
    """Bytes of the cells outside a staircase."""
    outside = ~recomputed_KB(levels_K, problem.grid.num_blocks)
    return int(problem.load_bytes_KB[outside].sum())


def compute_tiles(levels_K: Sequence[int] | Levels) -> tuple[Tile, ...]:
    """The staircase as one tile a chunk, head chunk first: every prefix of it is a staircase."""
    return tuple(Tile(chunk, chunk + 1, 0, int(level)) for chunk, level in enumerate(levels_K) if level)


def upper_tiles(levels_K: Sequence[int] | Levels, num_blocks: int) -> tuple[Tile, ...]:
    """The cells above the staircase as one tile a chunk, head chunk first.

    After ``compute_tiles`` in one sequence they complete the grid, and every prefix is still a staircase.
    """
    return tuple(
        Tile(chunk, chunk + 1, int(level), num_blocks) for chunk, level in enumerate(levels_K) if level < num_blocks
    )


def load_tiles(levels_K: Sequence[int] | Levels, num_blocks: int) -> tuple[Tile, ...]:
    """The cells outside the staircase as one tile a chunk, tail chunk first."""
    return upper_tiles(levels_K, num_blocks)[::-1]
