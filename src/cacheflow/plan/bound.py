"""The least possible times if work were infinitely divisible: what every report measures a policy against.

Restoration: no staircase, and no mixture of staircases (a chunk split by tokens at linear cost is one), ends before the
bound. It counts each chunk's topmost cell for its keys and values only. With equal layers, full top cells and rising
chunk costs it is the least over fractional token splits ``x`` of ``max(compute(x), load(rest))``.

With the suffix: the least over the same mixtures of ``max(compute + suffix, load + the top block's suffix and head)``,
because the top block of the suffix cannot start before the last byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.plan.lagrange import best_mixture
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.tradeoff import Objective, Tradeoff, tradeoff


@dataclass(frozen=True, slots=True)
class Bound:
    """Least possible seconds from the start of a restoration.

    Attributes:
        restore_s: To the last prefix cell.
        ttft_s: To the first token; never below the suffix alone.
    """

    restore_s: float
    ttft_s: float


def bound(problem: RestoreProblem) -> Bound:
    """The least restoration time and the least time to first token of a problem, whatever the policy.

    The two are bounds of their own: one schedule need not reach both.
    """
    if problem.grid.num_chunks == 0:
        return Bound(restore_s=0.0, ttft_s=problem.suffix_s)
    restore_s = lower_bound_s(tradeoff(problem, Objective.RESTORE))
    if problem.suffix_s == 0:
        return Bound(restore_s=restore_s, ttft_s=restore_s)
    return Bound(restore_s=restore_s, ttft_s=lower_bound_s(tradeoff(problem, Objective.TTFT)))


def lower_bound_s(problem: Tradeoff) -> float:
    """The least objective of any mixture of staircases.

    Only loading nothing at all saves the link's latency, so that is compared apart.
    """
    return min(best_mixture(problem).bound_s, problem.split(problem.cover()).value_s)
