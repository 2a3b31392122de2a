"""From places and contenders to records: one restoration alone, or many requests on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from cacheflow.bench.contender import Contender
from cacheflow.bench.figures.crowd_bound import FigureRequest, least_mean_s, most_in_time
from cacheflow.bench.figures.place import COST_SOURCE, Place
from cacheflow.bench.records.figure import PROBABILITIES, FigureRecord
from cacheflow.bench.simulated import SimulatedRequest, SimulatedRun, simulate
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.registry import make_policy
from cacheflow.sim.device import RequestTimes
from cacheflow.state.batch import BatchScheduler

OURS = "cacheflow"
PURE = (
    Contender(name="recompute", restore="recompute", prefills=True),
    Contender(name="load", restore="load"),
    Contender(name="layerwise_load", restore="layerwise_load"),
)
"""vLLM, LMCache, SGLang HiCache: in the order of arrival."""
CAKE = Contender(name="cake", restore="cake")
ALONE = (
    *PURE,
    CAKE,
    *(Contender(name=name, restore=name) for name in ("cacheflow_v1", "cacheflow_v2", OURS)),
)
"""Where there is one request, its order does not matter; ``cacheflow_v2`` then searches exactly."""
CROWD = (
    *PURE,
    CAKE,
    Contender(name="cacheflow_v1", restore="cacheflow_v1", batch="longest_first"),
    Contender(name="cacheflow_v2", restore="cacheflow_v2", batch="dp"),
    Contender(name=OURS, restore=OURS, batch="mean_ttft"),
)
"""Each with the order of requests that its authors give it."""
IN_ORDER = Contender(name="cacheflow, fcfs", restore=OURS)
"""Ours in the order of arrival: what restoring alone brings."""
EXISTING = ("recompute", "load", "layerwise_load", "cake")
"""What the paper compares with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Requests of one run, and what to call it.

    Attributes:
        requests: In the order of arrival, at least one that counts.
        rate_per_s: Arrivals a second; 0 where all come at once.
        slo_s: The common limit for the time to first token; 0 for none.
    """

    requests: tuple[FigureRequest, ...]
    workload: str
    rate_per_s: float = 0.0
    slo_s: float = 0.0


def alone(
    suite: str,
    place: Place,
    problem: RestoreProblem,
    *,
    contenders: Sequence[Contender] = ALONE,
    least: Bound | None = None,
    workload: str = "alone",
) -> Iterator[FigureRecord]:
    """One restoration under every contender."""
    prefill = place.prefill(problem)
    problem = replace(problem, prefill_s=prefill.suffix_s)
    request = FigureRequest(arrival_s=0.0, problem=problem, prefill=prefill)
    crowd = Crowd(requests=(request,), workload=workload)
    least = least or least_alone(request)
    for contender in contenders:
        yield _record(suite, place, crowd, contender, _Bounds((least,), least.ttft_s, 0.0))


def crowded(
    suite: str, place: Place, crowd: Crowd, *, contenders: Sequence[Contender] = CROWD
) -> Iterator[FigureRecord]:
    """Many requests under every contender."""
    bounds = _crowd_bounds(crowd)
    for contender in contenders:
        yield _record(suite, place, crowd, contender, bounds)


def least_alone(request: FigureRequest) -> Bound:
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


def serve(requests: Sequence[FigureRequest], contender: Contender) -> SimulatedRun:
    """Serve every request to its first token in virtual time."""
    link = requests[0].problem.link
    restore = make_policy(contender.restore, crossover_tokens=contender.crossover_tokens)
    scheduler = BatchScheduler(contender.make(), LiveRates(bytes_per_s=link.bytes_per_s))
    simulated = [
        SimulatedRequest(
            arrival_s=each.arrival_s,
            problem=each.prefill if contender.prefills or restore.plan(each.problem).left_to_prefill else each.problem,
            first_token_due_s=None if each.slo_s is None else each.arrival_s + each.slo_s,
        )
        for each in requests
    ]
    return simulate(simulated, scheduler, link, reads_in_flight=contender.reads_in_flight)


def _record(suite: str, place: Place, crowd: Crowd, contender: Contender, bounds: _Bounds) -> FigureRecord:
    run = serve(crowd.requests, contender)
    counted = [each for each, request in zip(run.restored, crowd.requests, strict=True) if request.counts]
    ttfts_s = np.array([each.first_token_at_s - each.arrival_s for each in counted])
    alone_s = np.array([least.ttft_s for least in bounds.alone])
    many = len(counted) > 1
    problems = [request.problem for request in crowd.requests if request.counts]
    in_time, goodput_per_s = _in_time(crowd, run)
    present_s = _present_s(run.restored)
    return FigureRecord(
        suite=suite,
        series=contender.name,
        policy=contender.restore,
        batch_policy=contender.batch,
        model=place.model,
        gpu=place.gpu,
        cost_source=COST_SOURCE,
        link_bytes_per_s=problems[0].link.bytes_per_s,
        chunk_tokens=place.chunk_tokens or problems[0].grid.num_tokens,
        num_layers=place.shape.num_layers,
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
        compute_busy=min(1.0, run.compute_busy_s / present_s),
        io_busy=min(1.0, run.io_busy_s / present_s),  # a read that compute overtook may outlast the last first token
        slo_s=crowd.slo_s,
        in_time=in_time,
        goodput_per_s=goodput_per_s,
        bound_goodput_per_s=None if in_time is None else bounds.goodput_per_s,
        ttft_quantiles_s=tuple(np.quantile(ttfts_s, PROBABILITIES).tolist()) if many else (),
        bound_quantiles_s=tuple(np.quantile(alone_s, PROBABILITIES).tolist()) if many else (),
    )


def _in_time(crowd: Crowd, run: SimulatedRun) -> tuple[float | None, float | None]:
    """Share of requests in time, and those a second; None where not every request has a deadline."""
    if any(request.slo_s is None for request in crowd.requests):
        return None, None
    num = sum(
        each.first_token_at_s - each.arrival_s <= (request.slo_s or 0.0)
        for each, request in zip(run.restored, crowd.requests, strict=True)
    )
    return num / len(crowd.requests), num / _span_s(crowd)


def _present_s(restored: Sequence[RequestTimes]) -> float:
    """Seconds in which at least one request waited for its first token."""
    total_s, until_s = 0.0, 0.0
    for each in sorted(restored, key=lambda each: each.arrival_s):
        total_s += max(0.0, each.first_token_at_s - max(until_s, each.arrival_s))
        until_s = max(until_s, each.first_token_at_s)
    return total_s
