"""What a restoration under way still needs of compute and of the link."""

from __future__ import annotations

import math

from cacheflow.plan.remaining import NO_LINK_S, Remaining
from cacheflow.state.board import CellState
from cacheflow.state.boundary import BoundaryState
from cacheflow.state.progress import Progress

WHOLE_MARGIN = 1.15
"""A chunk that ends so much later than both sides should, or two cells, may still be compute's. What turns out
otherwise is put right as soon as the link has a cell of it."""


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
        whole = p.computable(chunk) and p.board.state(chunk, top) in (
            CellState.OPEN,
            CellState.COMPUTING,
            CellState.COMPUTED,
        )
        if whole and p.boundaries.state(chunk) is BoundaryState.UNREAD:
            end_s = max(end_s, p.boundaries.due_s(chunk) - now_s)
        end_s += float(p.board.open_compute_K[chunk]) * p.rates.compute_factor
        late_s = 2.0 * p.board.compute_s(chunk, top) * p.rates.compute_factor
        seconds.append(end_s if whole and end_s <= latest_s + late_s else math.inf)
    return seconds
