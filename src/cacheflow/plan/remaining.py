"""What a restoration still needs of compute and of the link, and how long that takes at best.

Source: the closed form of CacheFlow v1, Eq. 1, with the new tokens as work that only compute can do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cacheflow.plan.boundaries import BoundaryState
from cacheflow.plan.cells import Cell
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.progress import Progress

NO_LINK_S = 1e9
"""Stands for a link that brings nothing any more."""


WHOLE_MARGIN = 1.15
"""A chunk that ends so much later than both sides should, or two cells, may still be compute's. What turns out
otherwise is put right as soon as the link has a cell of it."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """Work that is left of a restoration, in corrected seconds.

    Attributes:
        compute_s: To recompute every cell that nobody has restored.
        load_s: To load every one of them instead; ``NO_LINK_S`` when the link is down.
        suffix_s: To run the new tokens, which only compute can do.
    """

    compute_s: float
    load_s: float
    suffix_s: float

    @property
    def alone_s(self) -> float:
        """Seconds to the first token with compute and the link to itself, work infinitely divisible."""
        return together_s(compute_s=self.compute_s, load_s=self.load_s, suffix_s=self.suffix_s)


def together_s(*, compute_s: float, load_s: float, suffix_s: float) -> float:
    """Seconds until compute and link end together, when compute has ``suffix_s`` of its own to do.

    Uniform cost: recomputing the share ``x`` takes ``x * compute_s``, loading the rest ``(1 - x) * load_s``.
    """
    share = compute_share(compute_s=compute_s, load_s=load_s, ahead_s=suffix_s)
    return max(suffix_s + share * compute_s, (1.0 - share) * load_s)


def compute_share(*, compute_s: float, load_s: float, ahead_s: float) -> float:
    """The share that compute takes of a restoration so that it ends with the link, as far as that is possible.

    Args:
        compute_s: To recompute everything.
        load_s: To load everything.
        ahead_s: By how much compute is busier with other work than the link; negative when the link is busier.
    """
    total_s = compute_s + load_s
    return min(1.0, max(0.0, (load_s - ahead_s) / total_s)) if total_s > 0 else 0.0


def remaining_of(problem: RestoreProblem, *, compute_factor: float, bytes_per_s: float) -> Remaining:
    """What a restoration needs that has not started.

    Args:
        problem: What it costs.
        compute_factor: Seconds that one predicted compute second takes now.
        bytes_per_s: Bandwidth of the link now.
    """
    return Remaining(
        compute_s=problem.recompute_s * compute_factor,
        load_s=float(problem.load_bytes_KB.sum()) / bytes_per_s,
        suffix_s=problem.suffix_s * compute_factor,
    )


def remaining(p: Progress, now_s: float) -> Remaining:
    """What a restoration under way still needs."""
    open_s = p.board.open_compute_s * p.rates.compute_factor
    compute_s = p.compute_left_s(now_s) - p.others_compute_s + open_s
    load_s = NO_LINK_S if p.link_down else p.link_s(p.board.open_bytes) - p.others_link_s
    if p.board.num_missing == 0:
        compute_s = load_s = 0.0
    return Remaining(compute_s=compute_s, load_s=load_s, suffix_s=p.suffix_left_s())


def expected_left_s(p: Progress, now_s: float) -> float:
    """Seconds to the end of a restoration if compute and link shared what is open so as to end together."""
    compute_s, open_s = p.compute_left_s(now_s), p.board.open_compute_s * p.rates.compute_factor
    if p.link_down:
        return max(p.link_s(0), compute_s + open_s)
    link_s = p.link_s(p.board.open_bytes)
    total_s = open_s + link_s - p.link_s(0)
    share = min(1.0, max(0.0, (link_s - compute_s) / total_s)) if total_s > 0 else 0.0
    return max(p.link_s(0), compute_s + share * open_s)


def whole_chunks_s(p: Progress, now_s: float) -> list[float]:
    """Seconds until compute is through with each chunk up to its top block; infinite where the link is to have a part.

    A chunk whose activations are still to come waits for them.
    """
    end_s, latest_s = p.compute_left_s(now_s), WHOLE_MARGIN * expected_left_s(p, now_s)
    seconds, top = [], p.board.num_blocks - 1
    for chunk in range(p.board.num_chunks):
        whole = p.computable(chunk) and p.board.state(chunk, top) in (Cell.OPEN, Cell.COMPUTING, Cell.COMPUTED)
        if whole and p.boundaries.state(chunk) is BoundaryState.UNREAD:
            end_s = max(end_s, p.boundaries.due_s(chunk) - now_s)
        end_s += float(p.board.open_compute_K[chunk]) * p.rates.compute_factor
        late_s = 2.0 * p.board.compute_s(chunk, top) * p.rates.compute_factor
        seconds.append(end_s if whole and end_s <= latest_s + late_s else math.inf)
    return seconds
