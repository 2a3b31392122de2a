"""The batch that just ran, once more in virtual time, under the same scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from cacheflow.bench.batch.policies import Contender
from cacheflow.bench.batch.record import BatchTimes
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import Restored, SimulatedDevice
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCase:
    """A batch as the scheduler is told of it; all of one length, in the order of arrival.

    Attributes:
        problems: What requests are believed to cost.
        arrivals_s: When they come, from the first arrival.
        deadlines_s: Seconds from arrival until which first tokens should be there.
        starvation_s: See ``BatchScheduler``.
    """

    problems: Sequence[RestoreProblem]
    arrivals_s: Sequence[float]
    deadlines_s: Sequence[float]
    starvation_s: float = float("inf")


class _Device(SimulatedDevice):
    """Turns to requests that come at the same moment only when it has all of them, as the live executor does."""

    held = False

    def pump(self) -> None:
        """See ``SimulatedDevice.pump``."""
        if not self.held:
            super().pump()


def simulate_batch(contender: Contender, case: BatchCase, truths: Sequence[RestoreProblem]) -> BatchTimes:
    """Times of a batch whose requests really cost ``truths``."""
    loop = EventLoop()
    link = LinkCost(bytes_per_s=truths[0].link.bytes_per_s)
    rates = LiveRates(bytes_per_s=case.problems[0].link.bytes_per_s)
    scheduler = BatchScheduler(contender.make(), rates, starvation_s=case.starvation_s)
    device = _Device(loop, scheduler, SimulatedLink(loop, link))
    ends: dict[int, Restored] = {}

    def done(restored: Restored) -> None:
        ends[restored.request_id] = restored

    def arrive(arrival_s: float) -> None:
        device.held = True
        for index, problem in enumerate(case.problems):
            if case.arrivals_s[index] == arrival_s:
                deadline_s = arrival_s + case.deadlines_s[index]
                device.submit(index, problem, done, truth=truths[index], deadline_s=deadline_s)
        device.held = False
        device.pump()

    for arrival_s in sorted(set(case.arrivals_s)):
        loop.at(arrival_s, partial(arrive, arrival_s), priority=-1)
    loop.run()
    ttft_s = [float(ends[index].first_token_at_s - arrival_s) for index, arrival_s in enumerate(case.arrivals_s)]
    return BatchTimes.of(case.arrivals_s, ttft_s)
