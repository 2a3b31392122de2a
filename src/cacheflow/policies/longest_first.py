"""Compute in the order of arrival, the link to whom it saves most: CacheFlow v1's batch-aware two-pointer scheduler.

Source: CacheFlow v1 (arXiv 2604.25080v1), as summarised in NUMBERS.md: I/O goes first to the request with the largest
marginal recompute saving. Where attention makes later tokens dearer that is the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cacheflow.plan.batch import Ranking, WaitingRequest
from cacheflow.policies.base import PlansEachAlone


class LongestFirst(PlansEachAlone):
    """The link goes to the request that still has most to recompute for each second of loading."""

    name: ClassVar[str] = "longest_first"

    def rank(self, now_s: float, waiting: Sequence[WaitingRequest]) -> Ranking:
        """Compute by arrival, the link by saving; of equal savings the one with more left to recompute."""
        by_saving = sorted(waiting, key=_saving, reverse=True)
        return Ranking(
            compute=tuple(request.request_id for request in waiting),
            link=tuple(request.request_id for request in by_saving),
        )


def _saving(request: WaitingRequest) -> tuple[float, float]:
    """Recompute seconds that a second of the link saves, to a hundredth, and the recompute seconds left."""
    left = request.remaining
    return (round(left.compute_s / left.load_s, 2) if left.load_s > 0 else 0.0, left.compute_s)
