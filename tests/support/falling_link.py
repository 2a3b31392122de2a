"""The least time to first token over a link that falls to a part of its bandwidth, told beforehand."""

from __future__ import annotations

from dataclasses import replace

from cacheflow.plan.bound import bound
from cacheflow.plan.problem import LinkCost, RestoreProblem


def bound_over_falling_link(problem: RestoreProblem, *, fall_s: float, factor: float) -> float:
    """The ``T`` at which the bound over the link's average bandwidth until its last byte is ``T`` itself."""
    full, top_s = problem.link.bytes_per_s, float(problem.suffix_B[-1]) + problem.head_s
    low_s, high_s = 0.0, problem.recompute_s + problem.suffix_s
    for _ in range(40):
        middle_s = (low_s + high_s) / 2
        until_s = max(middle_s - top_s, 1e-9)
        fast_s = min(until_s, fall_s)
        average = full * (fast_s + (until_s - fast_s) * factor) / until_s
        if bound(replace(problem, link=LinkCost(bytes_per_s=average))).ttft_s > middle_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return high_s
