"""The least possible times of several requests of a figure on one compute resource and one link.

As ``batch_bound``, where a request may also be the engine's own prefill of the whole prompt. Shapes: ``N`` requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.bench.batch_bound import shortest_first_ends_s, weighted_work_s
from cacheflow.plan.problem import RestoreProblem, Seconds

WEIGHTS = tuple(step / 24 for step in range(25))
"""Weights of compute against the link that are tried; every one gives a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRequest:
    """One request.

    Attributes:
        prefill: What it costs an engine that restores nothing.
        slo_s: Its first token should be there so long after its arrival; None for no matter when.
        counts: Whether it stands in the results, or is only load.
    """

    arrival_s: float
    problem: RestoreProblem
    prefill: RestoreProblem
    slo_s: float | None = None
    counts: bool = True


def weighted_work_N(requests: Sequence[FigureRequest], mu: float) -> Seconds:
    """The least weighted work of each request."""
    known: dict[int, float] = {}
    for request in requests:
        if id(request.problem) not in known:
            known[id(request.problem)] = min(weighted_work_s(request.problem, mu), mu * request.prefill.suffix_s)
    return np.array([known[id(request.problem)] for request in requests])


def least_mean_s(requests: Sequence[FigureRequest]) -> float:
    """The least mean time from arrival to first token."""
    arrivals_s = [request.arrival_s for request in requests]
    totals_s = (sum(shortest_first_ends_s(arrivals_s, weighted_work_N(requests, mu).tolist())) for mu in WEIGHTS)
    return (max(totals_s) - sum(arrivals_s)) / len(requests)


def most_in_time(requests: Sequence[FigureRequest]) -> int:
    """No more requests than this can have their first token in time: all end before the last deadline."""
    last_s = max(request.arrival_s + (request.slo_s or 0.0) for request in requests)
    span_s = last_s - min(request.arrival_s for request in requests)
    return min(
        int(np.searchsorted(np.sort(weighted_work_N(requests, mu)).cumsum(), span_s, side="right")) for mu in WEIGHTS
    )
