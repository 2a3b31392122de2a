"""From settings and contenders to records: one restoration alone, or many requests on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from cacheflow.bench.figures.crowd_bound import least_mean_s, most_in_time
from cacheflow.bench.figures.record import PROBABILITIES, FigureRecord
from cacheflow.bench.figures.setting import COST_SOURCE, Setting
from cacheflow.bench.figures.simulate import Contender, Request, Run, simulate
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.problem import RestoreProblem

OURS = "cacheflow"
PURE = (
    Contender(series="recompute", policy="recompute", prefills=True),
    Contender(series="load", policy="load"),
    Contender(series="layerwise_load", policy="layerwise_load"),
)
"""vLLM, LMCache, SGLang HiCache: in the order of arrival."""
CAKE = Contender(series="cake", policy="cake")
ALONE = (
    *PURE,
    CAKE,
    Contender(series="cacheflow_v1", policy="cacheflow_v1"),
    Contender(series="cacheflow_v2", policy="cacheflow_v2"),
    Contender(series=OURS, policy=OURS),
)
"""Where there is one request, its order does not matter; ``cacheflow_v2`` then searches exactly."""
CROWD = (
    *PURE,
    CAKE,
    Contender(series="cacheflow_v1", policy="cacheflow_v1", batch_policy="longest_first"),
    Contender(series="cacheflow_v2", policy="cacheflow_v2", batch_policy="dp"),
    Contender(series=OURS, policy=OURS, batch_policy="mean_ttft"),
)
"""Each with the order of requests that its authors give it."""
IN_ORDER = Contender(series="cacheflow, fcfs", policy=OURS)
"""Ours in the order of arrival: what restoring alone brings."""
EXISTING = ("recompute", "load", "layerwise_load", "cake")
"""What the paper compares with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Requests of one run, and what to call it.

    Attributes:
        requests: In the order of arrival, at least one that counts.
        workload: Name of what was asked for.
        rate_per_s: Arrivals a second; 0 where all come at once.
        slo_s: The common limit for the time to first token; 0 for none.
    """

    requests: tuple[Request, ...]
    workload: str
    rate_per_s: float = 0.0
    slo_s: float = 0.0


def alone(
    suite: str,
    setting: Setting,
    problem: RestoreProblem,
    *,
    contenders: Sequence[Contender] = ALONE,
    least: Bound | None = None,
    workload: str = "alone",
) -> Iterator[FigureRecord]:
    """One restoration under every contender.

    Args:
        suite: Name of the figure.
        setting: Where.
        problem: What it costs.
        contenders: Who.
        least: The bound, where it is not that of the problem.
        workload: What to call it.
    """
    prefill = setting.prefill(problem)
    problem = replace(problem, prefill_s=prefill.suffix_s)
    request = Request(arrival_s=0.0, problem=problem, prefill=prefill)
    crowd = Crowd(requests=(request,), workload=workload)
    least = least or least_alone(request)
    for contender in contenders:
        yield _record(suite, setting, crowd, contender, _Bounds((least,), least.ttft_s, 0.0))


def crowded(
    suite: str, setting: Setting, crowd: Crowd, *, contenders: Sequence[Contender] = CROWD
) -> Iterator[FigureRecord]:
    """Many requests under every contender."""
    bounds = _crowd_bounds(crowd)
    for contender in contenders:
        yield _record(suite, setting, crowd, contender, bounds)


def least_alone(request: Request) -> Bound:
    """The least times with compute and the link to itself: the bound of its grid, or the engine's own prefill."""
    least, own_s = bound(request.problem), request.prefill.suffix_s
    return Bound(
        # Prefix and new tokens share passes, so that the prefix is there with the last of them, before the head.
        restore_s=min(least.restore_s, own_s - request.prefill.head_s),
        ttft_s=min(least.ttft_s, own_s),
    )


@dataclass(frozen=True, slots=True)
class _Bounds:
    """The least each counted request could need alone, the least mean, and the greatest goodput."""

    alone: tuple[Bound, ...]
    mean_s: float
    goodput_per_s: float


def _crowd_bounds(crowd: Crowd) -> _Bounds:
    requests = crowd.requests
    known: dict[int, Bound] = {}
    for request in requests:
        if id(request.problem) not in known:
            known[id(request.problem)] = least_alone(request)
    every = [known[id(request.problem)] for request in requests]
    counted = tuple(least for least, request in zip(every, requests, strict=True) if request.counts)
    mean_s = fmean(least.ttft_s for least in counted)
    if len(counted) == len(requests):
        # The machine of the bound may serve those that do not count last, so it holds for all of them only.
        mean_s = max(mean_s, least_mean_s(requests))
    return _Bounds(counted, mean_s, _greatest_goodput(crowd, every))


def _greatest_goodput(crowd: Crowd, alone: Sequence[Bound]) -> float:
    limits_s = [request.slo_s for request in crowd.requests if request.slo_s is not None]
    if len(limits_s) < len(crowd.requests):
        return 0.0
    possible = sum(least.ttft_s <= limit_s for least, limit_s in zip(alone, limits_s, strict=True))
    return min(possible, most_in_time(crowd.requests)) / _span_s(crowd)


def _span_s(crowd: Crowd) -> float:
    """Seconds over which requests come; a gap after the last as long as the mean one."""
    num = len(crowd.requests)
    span_s = crowd.requests[-1].arrival_s - crowd.requests[0].arrival_s
    return span_s * num / (num - 1) if span_s > 0 else 1.0


def _record(suite: str, setting: Setting, crowd: Crowd, contender: Contender, bounds: _Bounds) -> FigureRecord:
    run = simulate(crowd.requests, contender)
    counted = [each for each, request in zip(run.restored, crowd.requests, strict=True) if request.counts]
    ttfts_s = np.array([each.first_token_at_s - each.arrival_s for each in counted])
    alone_s = np.array([least.ttft_s for least in bounds.alone])
    many = len(counted) > 1
    problems = [request.problem for request in crowd.requests if request.counts]
    in_time, goodput_per_s = _in_time(crowd, run)
    return FigureRecord(
        suite=suite,
        series=contender.series,
        policy=contender.policy,
        batch_policy=contender.batch_policy,
        model=setting.model,
        gpu=setting.gpu,
        cost_source=COST_SOURCE,
        link_bytes_per_s=problems[0].link.bytes_per_s,
        chunk_tokens=setting.chunk_tokens or problems[0].grid.num_tokens,
        num_layers=setting.shape.num_layers,
        num_tokens=fmean(problem.grid.num_tokens for problem in problems),
        suffix_tokens=fmean(problem.grid.suffix_tokens for problem in problems),
        load_compute_ratio=sum(each.load_s for each in problems) / sum(each.recompute_s for each in problems),
        workload=crowd.workload,
        num_requests=len(counted),
        rate_per_s=crowd.rate_per_s,
        ttft_s=float(ttfts_s.mean()),
        restore_s=fmean(each.restored_at_s - each.arrival_s for each in counted),
        p99_ttft_s=float(np.quantile(ttfts_s, 0.99)) if many else None,
        bound_ttft_s=bounds.mean_s,
        bound_restore_s=fmean(least.restore_s for least in bounds.alone),
        bound_p99_ttft_s=float(np.quantile(alone_s, 0.99)) if many else None,
        compute_busy=run.compute_busy,
        io_busy=run.io_busy,
        slo_s=crowd.slo_s,
        in_time=in_time,
        goodput_per_s=goodput_per_s,
        bound_goodput_per_s=None if in_time is None else bounds.goodput_per_s,
        ttft_quantiles_s=tuple(np.quantile(ttfts_s, PROBABILITIES).tolist()) if many else (),
        bound_quantiles_s=tuple(np.quantile(alone_s, PROBABILITIES).tolist()) if many else (),
    )


def _in_time(crowd: Crowd, run: Run) -> tuple[float | None, float | None]:
    """Share of requests in time, and those a second; None where not every request has a deadline."""
    if any(request.slo_s is None for request in crowd.requests):
        return None, None
    num = sum(
        each.first_token_at_s - each.arrival_s <= (request.slo_s or 0.0)
        for each, request in zip(run.restored, crowd.requests, strict=True)
    )
    return num / len(crowd.requests), num / _span_s(crowd)
