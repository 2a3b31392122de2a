"""The least possible times of several requests on one compute resource and one link.

Weigh compute with ``mu`` and the link with ``1 - mu``: however they are scheduled, both together do at most one second
of weighted work a second, and a request needs at least the sum over its cells of the cheaper way, its new tokens on
compute, or the engine's own prefill of the whole prompt. So a machine of speed 1 that serves jobs of that size, with
preemption, ends no later. Its least mean is known: shortest remaining first. The greatest over ``mu`` is the bound.
Shapes: ``N`` requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from cacheflow.bench.figures.simulate import Request
from cacheflow.plan.problem import RestoreProblem, Seconds
from cacheflow.plan.staircase import marginal_compute_KB

WEIGHTS = tuple(step / 24 for step in range(25))
"""Values of ``mu`` that are tried; every one gives a bound."""


def weighted_work_N(requests: Sequence[Request], mu: float) -> Seconds:
    """The least weighted work of each request."""
    known: dict[int, float] = {}
    for request in requests:
        if id(request.problem) not in known:
            own_s = mu * request.prefill.suffix_s
            known[id(request.problem)] = min(_weighted_work_s(request.problem, mu), own_s)
    return np.array([known[id(request.problem)] for request in requests])


def _weighted_work_s(problem: RestoreProblem, mu: float) -> float:
    compute_KB = mu * marginal_compute_KB(problem)
    load_KB = (1.0 - mu) * problem.load_bytes_KB / problem.link.bytes_per_s
    return float(np.minimum(compute_KB, load_KB).sum()) + mu * problem.suffix_s


def least_mean_s(requests: Sequence[Request]) -> float:
    """The least mean time from arrival to first token."""
    arrivals_s = [request.arrival_s for request in requests]
    return max(_least_mean_s(arrivals_s, weighted_work_N(requests, mu).tolist()) for mu in WEIGHTS)


def _least_mean_s(arrivals_s: Sequence[float], work_s: Sequence[float]) -> float:
    """Mean flow time of shortest remaining first, with preemption."""
    left: list[float] = []
    now_s = total_s = 0.0
    jobs = sorted(zip(arrivals_s, work_s, strict=True))
    for index, (arrival_s, job_s) in enumerate(jobs):
        next_s = jobs[index + 1][0] if index + 1 < len(jobs) else float("inf")
        now_s = max(now_s, arrival_s)
        heapq.heappush(left, job_s)
        while left and now_s + left[0] <= next_s:
            now_s += heapq.heappop(left)
            total_s += now_s
        if left:
            heapq.heapreplace(left, left[0] - (next_s - now_s))
            now_s = next_s
    return (total_s - sum(arrivals_s)) / len(jobs)


def most_in_time(requests: Sequence[Request]) -> int:
    """No more requests than this can have their first token in time: all end before the last deadline."""
    last_s = max(request.arrival_s + (request.slo_s or 0.0) for request in requests)
    span_s = last_s - min(request.arrival_s for request in requests)
    return min(
        int(np.searchsorted(np.sort(weighted_work_N(requests, mu)).cumsum(), span_s, side="right")) for mu in WEIGHTS
    )
