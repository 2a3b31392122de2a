"""Restorations of which cells lie in stores of different speed that are read side by side: tiers.

Everything that plans or claims knows one link. So a cell in a slow tier takes more bytes of it than it moves: in
proportion to the tiers' speeds, and together as long as the tier that has the most to do, since the others are read
meanwhile. That is exact for loading all of it and an estimate for a part. What a link is then seen to do is in the same
bytes, so that it stays the link of the fastest tier, whatever tier a read came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cacheflow.plan.problem import RestoreProblem


def over_tiers(problem: RestoreProblem, tiers_K: Sequence[int], bytes_per_s: Sequence[float | None]) -> RestoreProblem:
    """The problem of chunks that lie in several tiers.

    Args:
        problem: What the restoration costs over the link of the fastest tier.
        tiers_K: Of each chunk the number of its tier, the fastest is 0.
        bytes_per_s: Bandwidth of each tier as it is now; None where it is not known: then all count as equally fast.
    """
    if not any(tiers_K):
        return problem
    tier_K = np.array(tiers_K, dtype=np.int64)
    tier_KB = np.repeat(tier_K[:, None], problem.grid.num_blocks, axis=1)
    known = [each for each in bytes_per_s if each is not None and 0 < each < float("inf")]
    if len(known) < len(bytes_per_s) or tier_K.max() >= len(bytes_per_s):
        return replace(problem, tier_KB=tier_KB)
    slowness_K = known[0] / np.array(known)[tier_K]
    chunk_cost_K = problem.load_bytes_KB.sum(axis=1) * slowness_K
    total_cost = float(chunk_cost_K.sum())
    longest_cost = float(np.bincount(tier_K, weights=chunk_cost_K).max())
    side_by_side = longest_cost / total_cost if total_cost > 0 else 1.0
    load_bytes_KB = np.rint(problem.load_bytes_KB * (slowness_K * side_by_side)[:, None]).astype(np.int64)
    return replace(problem, tier_KB=tier_KB, load_bytes_KB=load_bytes_KB, moved_bytes_KB=problem.moved_KB)
