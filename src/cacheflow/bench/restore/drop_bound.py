"""The bound when the link's bandwidth falls during the restoration."""

from __future__ import annotations

from dataclasses import replace

from cacheflow.bench.restore.link import LinkDrop
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.problem import LinkCost, RestoreProblem


def bound_with_drop(problem: RestoreProblem, drop: LinkDrop) -> Bound:
    """Least times over a link that delivers ``drop.after_bytes`` at full speed and the rest at a fraction of it.

    A schedule that ends at ``T`` can have loaded what the link delivers by then, at an average bandwidth that falls
    with ``T``; the bound is the ``T`` at which the bound over that average bandwidth is ``T`` itself.
    """
    top_s = float(problem.suffix_B[-1]) + problem.head_s
    return Bound(
        restore_s=_fixed_point(problem, drop, after_load_s=0.0, ttft=False),
        ttft_s=_fixed_point(problem, drop, after_load_s=top_s, ttft=True),
    )


def _fixed_point(problem: RestoreProblem, drop: LinkDrop, *, after_load_s: float, ttft: bool) -> float:
    low_s, high_s = 0.0, problem.recompute_s + problem.suffix_s
    for _ in range(40):
        middle_s = (low_s + high_s) / 2
        bytes_per_s = _average(problem.link.bytes_per_s, drop, max(middle_s - after_load_s, 1e-9))
        least = bound(replace(problem, link=LinkCost(bytes_per_s=bytes_per_s)))
        if (least.ttft_s if ttft else least.restore_s) > middle_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return high_s


def _average(bytes_per_s: float, drop: LinkDrop, until_s: float) -> float:
    """Mean bandwidth over ``[0, until_s]``."""
    full_s = drop.after_bytes / bytes_per_s
    if until_s <= full_s:
        return bytes_per_s
    return (drop.after_bytes + (until_s - full_s) * drop.factor * bytes_per_s) / until_s
