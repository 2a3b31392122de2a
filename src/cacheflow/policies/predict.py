"""Closed simulations of how a plan runs when every cost is as expected.

``after_restore`` for a fixed split, ``meet`` for two pointers that take whole tiles, ``climb`` for a suffix that runs
block by block after the load. Shapes: ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheflow.plan.plan import Prediction
from cacheflow.plan.problem import RestoreProblem, Seconds
from cacheflow.plan.staircase import Levels, recomputed_KB, staircase_compute_s, staircase_load_bytes
from cacheflow.state.link_pointer import CLIMB_MARGIN

TIE = 1e-9
"""Ends that differ by less, relatively, are a tie: sums of equal costs round apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where two pointers met.

    Attributes:
        num_computed: Tiles compute took, from the front of its order.
        predicted: Times, the suffix after the restoration.
    """

    num_computed: int
    predicted: Prediction


def after_restore(problem: RestoreProblem, *, compute_s: float, load_s: float) -> Prediction:
    """Both sides start at once, and the suffix follows the later."""
    restore_s = max(compute_s, load_s)
    return Prediction(restore_s=restore_s, ttft_s=restore_s + problem.suffix_s, compute_s=compute_s, load_s=load_s)


def meet(problem: RestoreProblem, compute_tile_s: Seconds, tile_bytes: Seconds) -> Meeting:
    """Two pointers that take whole tiles, compute from the front and the link from the back, until none is left.

    A free side takes the next tile even when the other would have finished it sooner; at a tie the link is first, as
    in the executor, where it starts first.

    Args:
        problem: Link and suffix.
        compute_tile_s: Compute seconds of each tile, in compute's order.
        tile_bytes: Bytes of each tile, in the same order.
    """
    compute, loads = compute_tile_s.tolist(), tile_bytes.tolist()
    front, back, compute_free_s, link_free_s, num_bytes = 0, len(compute), 0.0, 0.0, 0.0
    while front < back:
        if compute_free_s < link_free_s * (1 - TIE):
            compute_free_s += compute[front]
            front += 1
        else:
            back -= 1
            num_bytes += loads[back]
            link_free_s = problem.link.load_s(num_bytes)
    predicted = after_restore(problem, compute_s=compute_free_s, load_s=problem.link.load_s(num_bytes))
    return Meeting(num_computed=front, predicted=predicted)


def climb(problem: RestoreProblem, levels_K: Levels, *, kv_only_top: bool = True) -> Prediction:
    """A staircase recomputed, the rest loaded, and the suffix climbing block by block after both.

    The link takes chunks from the tail, and for the last stretch, about as long as the suffix, bottom rows first; all
    of it bottom rows first when nothing is recomputed (SGLang HiCache).

    Args:
        problem: What everything costs.
        levels_K: The staircase.
        kv_only_top: Count the topmost recomputed cell of each chunk for its keys and values only.
    """
    compute_s = staircase_compute_s(problem, levels_K, kv_only_top=kv_only_top)
    load_s = problem.link.load_s(float(staircase_load_bytes(problem, levels_K)))
    restore_s = max(compute_s, load_s)
    now_s = compute_s
    for row_s, suffix_s in zip(_rows_loaded_s(problem, levels_K), problem.suffix_B.tolist(), strict=True):
        now_s = max(now_s, row_s) + suffix_s
    ttft_s = max(restore_s, now_s) + problem.head_s if problem.suffix_s else restore_s
    return Prediction(restore_s=restore_s, ttft_s=ttft_s, compute_s=compute_s, load_s=load_s)


def _rows_loaded_s(problem: RestoreProblem, levels_K: Levels) -> list[float]:
    """When the last load of each block is there, as far as it was left for the bottom-up stretch."""
    outside_KB = ~recomputed_KB(levels_K, problem.grid.num_blocks)
    bytes_KB = problem.load_bytes_KB * outside_KB
    left_B = bytes_KB.sum(axis=0).astype(np.float64)
    if not left_B.any():
        return [0.0] * problem.grid.num_blocks
    tail_bytes = _tail_bytes(problem, bytes_KB.sum(axis=1)) if levels_K.any() else 0.0
    if tail_bytes > 0:
        left_B = _left_after(bytes_KB, tail_bytes)
    rows_s = problem.link.latency_s + (tail_bytes + left_B.cumsum()) / problem.link.bytes_per_s
    return [float(row_s) for row_s in rows_s]


def _tail_bytes(problem: RestoreProblem, bytes_K: Levels) -> float:
    """Bytes the link takes from the tail before it turns to bottom rows."""
    stretch_s = CLIMB_MARGIN * problem.suffix_s
    if problem.link.bytes_per_s == float("inf"):
        return 0.0
    chunk_bytes = float(problem.load_bytes_KB.sum(axis=1).max())
    return max(0.0, float(bytes_K.sum()) - stretch_s * problem.link.bytes_per_s - chunk_bytes)


def _left_after(bytes_KB: Levels, tail_bytes: float) -> Seconds:
    """Bytes of each block that are left once ``tail_bytes`` were loaded: tail chunk first, top block first."""
    bytes_K = bytes_KB.sum(axis=1)
    behind_K = bytes_K.sum() - bytes_K.cumsum()
    # The chunk in which the tail's bytes run out; everything after it is loaded.
    chunk = int(np.flatnonzero(behind_K <= tail_bytes)[0])
    left_B: Seconds = bytes_KB[:chunk].sum(axis=0).astype(np.float64)
    cells_B = bytes_KB[chunk].astype(np.float64)
    left_bytes = float(bytes_K[chunk]) - (tail_bytes - float(behind_K[chunk]))
    below_B = cells_B.cumsum() - cells_B
    left_B += np.clip(left_bytes - below_B, 0.0, cells_B)
    return left_B
