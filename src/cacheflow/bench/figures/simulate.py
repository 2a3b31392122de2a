"""Requests on one simulated device: the real batch scheduler, policies and state machine, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import READS_IN_FLIGHT, Completion, VirtualDevice
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """How one system serves requests.

    Attributes:
        series: What it is called in figures.
        policy: Restore policy.
        batch_policy: Order of requests.
        crossover_tokens: For ``cacheflow_v1``; None predicts the better way.
        prefills: Restores nothing: the engine prefills the whole prompt.
        reads_in_flight: Reads it asks of the link at once; one where cells are so large that several would settle where
            compute and the link meet.
    """

    series: str
    policy: str
    batch_policy: str = "fcfs"
    crossover_tokens: int | None = None
    prefills: bool = False
    reads_in_flight: int = READS_IN_FLIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        arrival_s: When it comes.
        problem: What it costs.
        prefill: What it costs an engine that restores nothing.
        slo_s: Its first token should be there so long after its arrival; None for no matter when.
        counts: Whether it stands in the results, or is only load.
    """

    arrival_s: float
    problem: RestoreProblem
    prefill: RestoreProblem
    slo_s: float | None = None
    counts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of it.

    Attributes:
        restored: One for each request, in their order.
        compute_busy: Share of the time with a request in the system in which compute worked.
        io_busy: Share of it in which the link moved bytes.
    """

    restored: tuple[Completion, ...]
    compute_busy: float
    io_busy: float


def simulate(requests: Sequence[Request], contender: Contender) -> Run:
    """Serve every request to its first token.

    Args:
        requests: All over the same link.
        contender: Who serves them.
    """
    loop = EventLoop()
    cost = requests[0].problem.link
    link = SimulatedLink(loop, cost)
    restore = make_policy(contender.policy, crossover_tokens=contender.crossover_tokens)
    batch = make_batch_policy(contender.batch_policy, restore)
    scheduler = BatchScheduler(batch, LiveRates(bytes_per_s=cost.bytes_per_s))
    device = VirtualDevice(loop, scheduler, link, reads_in_flight=contender.reads_in_flight)
    ended: dict[int, Completion] = {}
    for index, request in enumerate(requests):
        left = contender.prefills or restore.plan(request.problem).left_to_prefill
        problem = request.prefill if left else request.problem
        submit = partial(_submit, device, index, replace(request, problem=problem), ended)
        loop.at(request.arrival_s, submit)
    loop.run()
    restored = tuple(ended[index] for index in range(len(requests)))
    present_s = _present_s(restored)
    return Run(
        restored=restored,
        compute_busy=min(1.0, device.compute_busy_s / present_s),
        # A read that compute overtook may outlast the last first token.
        io_busy=min(1.0, link.busy_s / present_s),
    )


def _submit(device: VirtualDevice, index: int, request: Request, ended: dict[int, Completion]) -> None:
    def done(restored: Completion) -> None:
        ended[index] = restored

    deadline_s = None if request.slo_s is None else request.arrival_s + request.slo_s
    device.submit(index, request.problem, done, deadline_s=deadline_s)


def _present_s(restored: Sequence[Completion]) -> float:
    """Seconds in which at least one request waited for its first token."""
    total_s, until_s = 0.0, 0.0
    for each in sorted(restored, key=lambda each: each.arrival_s):
        total_s += max(0.0, each.first_token_at_s - max(until_s, each.arrival_s))
        until_s = max(until_s, each.first_token_at_s)
    return total_s
