"""Rounds of a batch study: every policy once, side by side, on the same order of arrival over the same link."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cacheflow.bench.batch.policies import find_contender
from cacheflow.bench.batch.simulate import BatchCase, simulate_batch
from cacheflow.bench.batch.study import BatchStudy, RequestRun
from cacheflow.bench.batch_bound import batch_bound
from cacheflow.bench.make_record import of_model
from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.batch import BatchRecord, BatchRequestRecord, BatchTimes
from cacheflow.bench.suite import rotated
from cacheflow.plan.bound import bound
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import Lane, Span, SpanKind, busy_share

STARVATION_SLACK = 1.1
"""What a request may wait beyond the bound on starvation, relative to the work that may come before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRound:
    """One alternation of policies.

    Attributes:
        repeat: Number of the alternation; it decides the order of arrival and rotates that of the policies.
        starvation_s: See ``BatchScheduler``; None for no bound.
        slo_factor: Deadlines, in times of what a request takes alone at best.
    """

    ratio: float
    repeat: int
    policies: tuple[str, ...]
    arrival_gap_s: float = 0.0
    seed: int = 0
    starvation_s: float | None = None
    slo_factor: float = 2.0

    def order(self, num_requests: int) -> tuple[int, ...]:
        """Indices of the requests in the order of arrival; each repeat has its own, the same for all policies."""
        order = list(range(num_requests))
        random.Random(f"{self.seed}/{self.repeat}").shuffle(order)
        return tuple(order)


def run_batch_round(
    study: BatchStudy,
    round_: BatchRound,
    *,
    environment: Environment,
    on_run: Callable[[str], None] = lambda name: None,
) -> list[BatchRecord]:
    """Run every policy of a round once and put the runs on record, in the order of ``round_.policies``."""
    order = round_.order(len(study.options.lengths))
    bytes_per_s = study.bytes_per_s(round_.ratio)
    problems = study.problems(bytes_per_s=bytes_per_s)
    case = BatchCase(
        problems=[problems[index] for index in order],
        arrivals_s=[round_.arrival_gap_s * position for position in range(len(order))],
        deadlines_s=[round_.slo_factor * bound(problems[index]).ttft_s for index in order],
        starvation_s=float("inf") if round_.starvation_s is None else round_.starvation_s,
    )
    records = {}
    for name in rotated(round_.policies, round_.repeat):
        on_run(name)
        runs = study.run(find_contender(name), case, order=order)
        records[name] = _record(study, round_, name, case, runs, environment)
    return [records[name] for name in round_.policies]


def _record(
    study: BatchStudy,
    round_: BatchRound,
    name: str,
    case: BatchCase,
    runs: Sequence[RequestRun],
    environment: Environment,
) -> BatchRecord:
    order, options = round_.order(len(runs)), study.options
    arrivals_s = [run.arrival_s for run in runs]
    ttft_s = [run.outcome.report.ttft_s or 0.0 for run in runs]
    times = BatchTimes.of(arrivals_s, ttft_s)
    drift = compute_drift(case.problems, runs)
    bytes_per_s = case.problems[0].link.bytes_per_s
    believed = study.problems(bytes_per_s=bytes_per_s, drift=drift)
    truths = [believed[index] for index in order]
    least = batch_bound(truths, arrivals_s)
    compute_busy, io_busy = busy_shares(runs)
    return BatchRecord(
        policy=name,
        **of_model(study.model),
        lengths=options.lengths,
        suffix_tokens=options.suffix_tokens,
        chunk_tokens=options.chunk_tokens,
        order=order,
        arrival_gap_s=round_.arrival_gap_s,
        load_compute_ratio=round_.ratio,
        link_bytes_per_s=bytes_per_s,
        repeat=round_.repeat,
        seed=round_.seed,
        starvation_s=round_.starvation_s,
        **{name: getattr(times, name) for name in ("mean_ttft_s", "p99_ttft_s", "makespan_s")},
        compute_busy=compute_busy,
        io_busy=io_busy,
        bound_makespan_s=least.makespan_s,
        bound_mean_ttft_s=least.mean_ttft_s,
        starvation_kept=starvation_kept(truths, arrivals_s, ttft_s, starvation_s=case.starvation_s),
        compute_drift=drift,
        correct=all(run.correct for run in runs),
        requests=tuple(
            BatchRequestRecord(
                num_tokens=problem.grid.num_tokens,
                suffix_tokens=problem.grid.suffix_tokens,
                arrival_s=run.arrival_s,
                ttft_s=seconds,
                deadline_s=deadline_s,
                **{key: getattr(run.outcome.report, key) for key in ("restore_s", "recomputed_cells", "loaded_cells")},
            )
            for problem, run, seconds, deadline_s in zip(case.problems, runs, ttft_s, case.deadlines_s, strict=True)
        ),
        simulated=simulate_batch(find_contender(name), replace(case, arrivals_s=arrivals_s), truths),
        environment=environment,
        slo_factor=round_.slo_factor,
    )


def compute_drift(problems: Sequence[RestoreProblem], runs: Sequence[RequestRun]) -> float:
    """Seconds that a calibrated second of compute took, over everything that compute did in a run."""
    actual_s = predicted_s = 0.0
    for problem, run in zip(problems, runs, strict=True):
        for span in run.outcome.report.spans:
            if span.lane is Lane.COMPUTE:
                actual_s += span.end_s - span.start_s
                predicted_s += _predicted_s(problem, span)
    return actual_s / predicted_s if predicted_s > 0 else 1.0


def _predicted_s(problem: RestoreProblem, span: Span) -> float:
    if span.kind is SpanKind.SUFFIX:
        return float(problem.suffix_B[span.block_lo : span.block_hi].sum())
    costs_KB = problem.kv_only_KB if span.kind is SpanKind.KV_ONLY else problem.compute_KB
    return float(costs_KB[span.chunk, span.block_lo : span.block_hi].sum())


def busy_shares(runs: Sequence[RequestRun]) -> tuple[float, float]:
    """Shares of the time until every prefix was restored in which compute and the link worked."""
    spans = [
        replace(span, start_s=span.start_s + run.arrival_s, end_s=span.end_s + run.arrival_s)
        for run in runs
        for span in run.outcome.report.spans
    ]
    end_s = max(run.arrival_s + run.outcome.report.restore_s for run in runs)
    return min(1.0, busy_share(spans, Lane.COMPUTE, end_s)), min(1.0, busy_share(spans, Lane.IO, end_s))


def starvation_kept(
    problems: Sequence[RestoreProblem],
    arrivals_s: Sequence[float],
    ttft_s: Sequence[float],
    *,
    starvation_s: float,
) -> bool | None:
    """Whether each first token came within ``starvation_s`` and the work of it and all that came no later than it.

    That work counts as if each were served alone, with a tenth to spare. None without a bound.
    """
    if starvation_s == float("inf"):
        return None
    alone_s = [bound(problem).ttft_s for problem in problems]
    return all(
        seconds
        <= starvation_s
        + STARVATION_SLACK * sum(alone for alone, other in zip(alone_s, arrivals_s, strict=True) if other <= arrival_s)
        for seconds, arrival_s in zip(ttft_s, arrivals_s, strict=True)
    )
