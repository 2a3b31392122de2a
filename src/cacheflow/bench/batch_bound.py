"""The least possible times of several requests on one compute resource and one link.

Weigh compute with ``mu`` and the link with ``1 - mu``: both together do at most one second of weighted work a second,
however they are scheduled, and a request needs at least the sum over its cells of the cheaper way, its new tokens on
compute. So one machine of speed 1 that may interrupt jobs of that size ends no later: its last end and its mean time
from arrival to end (least with the shortest remaining first) bound ours from below. Every ``mu`` gives a bound; the
greatest counts. Cells count as infinitely divisible and free of order, the topmost of a column for its keys and values
only; latency of the link counts nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.plan.bound import bound
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.staircase import marginal_compute_KB

STEPS = 24
"""Weights are tried to either side of the one at which the link and compute are worth the same, ..."""
STEP = 2.0**0.25
"""... each this many times nearer to one of the two than the one before."""


@dataclass(frozen=True, slots=True)
class BatchBound:
    """Seconds that no schedule can beat.

    Attributes:
        makespan_s: From the first arrival to the last first token.
        mean_ttft_s: Mean time from arrival to first token.
    """

    makespan_s: float
    mean_ttft_s: float


def batch_bound(problems: Sequence[RestoreProblem], arrivals_s: Sequence[float]) -> BatchBound:
    """The bounds of requests with these costs and arrivals.

    Raises:
        ValueError: No requests, or not one arrival for each.
    """
    if not problems or len(problems) != len(arrivals_s):
        raise ValueError(f"{len(problems)} requests with {len(arrivals_s)} arrivals")
    alone_s = [bound(problem).ttft_s for problem in problems]
    first_s = min(arrivals_s)
    makespan_s = max(arrival + alone for arrival, alone in zip(arrivals_s, alone_s, strict=True)) - first_s
    mean_s = sum(alone_s) / len(alone_s)
    for mu in _weights(problems):
        ends_s = shortest_first_ends_s(arrivals_s, [weighted_work_s(problem, mu) for problem in problems])
        makespan_s = max(makespan_s, ends_s[-1] - first_s)
        mean_s = max(mean_s, (sum(ends_s) - sum(arrivals_s)) / len(problems))
    return BatchBound(makespan_s=makespan_s, mean_ttft_s=mean_s)


def _weights(problems: Sequence[RestoreProblem]) -> list[float]:
    """Values of ``mu`` to try."""
    compute_s = sum(problem.recompute_s + problem.suffix_s for problem in problems)
    load_s = sum(problem.load_s for problem in problems)
    if compute_s <= 0 or load_s <= 0:
        return [1.0 if compute_s > 0 else 0.0]
    odds = [load_s / compute_s * STEP**step for step in range(-STEPS, STEPS + 1)]
    return [each / (1.0 + each) for each in odds]


def weighted_work_s(problem: RestoreProblem, mu: float) -> float:
    """The least weighted work of a request."""
    load_KB = (1.0 - mu) * problem.load_bytes_KB / problem.link.bytes_per_s
    return float(np.minimum(mu * marginal_compute_KB(problem), load_KB).sum()) + mu * problem.suffix_s


def shortest_first_ends_s(arrivals_s: Sequence[float], work_s: Sequence[float]) -> list[float]:
    """When jobs end on one machine, ascending: the shortest remaining first, interrupted by shorter arrivals."""
    jobs = sorted(zip(arrivals_s, work_s, strict=True))
    left_s: list[float] = []
    ends_s: list[float] = []
    now_s = jobs[0][0]
    for index, (arrival_s, seconds) in enumerate(jobs):
        now_s = max(now_s, arrival_s)
        heapq.heappush(left_s, seconds)
        until_s = jobs[index + 1][0] if index + 1 < len(jobs) else float("inf")
        while left_s and now_s + left_s[0] <= until_s:
            now_s += heapq.heappop(left_s)
            ends_s.append(now_s)
        if left_s:
            heapq.heapreplace(left_s, left_s[0] - (until_s - now_s))
            now_s = until_s
    return ends_s
