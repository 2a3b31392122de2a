"""The batch that just ran, once more in virtual time, under the same scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cacheflow.bench.contender import Contender
from cacheflow.bench.records.batch import BatchTimes
from cacheflow.bench.simulated import SimulatedRequest, simulate
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.state.batch import BatchScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCase:
    """A batch as the scheduler sees it; all of one length, in the order of arrival.

    Attributes:
        deadlines_s: Seconds from arrival until which first tokens should be there.
    """

    problems: Sequence[RestoreProblem]
    arrivals_s: Sequence[float]
    deadlines_s: Sequence[float]
    starvation_s: float = float("inf")


def simulate_batch(contender: Contender, case: BatchCase, truths: Sequence[RestoreProblem]) -> BatchTimes:
    """Times of a batch whose requests really cost ``truths``."""
    rates = LiveRates(bytes_per_s=case.problems[0].link.bytes_per_s)
    scheduler = BatchScheduler(contender.make(), rates, starvation_s=case.starvation_s)
    requests = [
        SimulatedRequest(arrival_s=arrival_s, problem=problem, truth=truth, first_token_due_s=arrival_s + deadline_s)
        for problem, truth, arrival_s, deadline_s in zip(
            case.problems, truths, case.arrivals_s, case.deadlines_s, strict=True
        )
    ]
    run = simulate(requests, scheduler, truths[0].link, together=True)
    ttft_s = [float(each.first_token_at_s - at_s) for each, at_s in zip(run.restored, case.arrivals_s, strict=True)]
    return BatchTimes.of(case.arrivals_s, ttft_s)
