"""Requests on one simulated device: the real batch scheduler, policies and state machine, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import READS_IN_FLIGHT, RequestTimes, VirtualDevice
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """One request.

    Attributes:
        truth: What it really costs; None: as believed.
        first_token_due_s: When its first token should be there; None for no matter when.
    """

    arrival_s: float
    problem: RestoreProblem
    truth: RestoreProblem | None = None
    first_token_due_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What came of requests."""

    restored: tuple[RequestTimes, ...]
    compute_busy_s: float
    io_busy_s: float


class _Device(VirtualDevice):
    """Turns to requests that come at the same moment only when it has all of them, as the live executor does."""

    held = False

    def pump(self) -> None:
        """See ``VirtualDevice.pump``."""
        if not self.held:
            super().pump()


def simulate(
    requests: Sequence[SimulatedRequest],
    scheduler: BatchScheduler,
    link: LinkCost,
    *,
    together: bool = False,
    reads_in_flight: int = READS_IN_FLIGHT,
) -> SimulatedRun:
    """Serve every request to its first token.

    Args:
        requests: All over the same link.
        scheduler: Decides; no other device may use it.
        link: What the link really delivers.
        together: Requests that come at the same moment are seen together; else one after the other.
        reads_in_flight: Reads asked of the link at once.
    """
    loop = EventLoop()
    simulated_link = SimulatedLink(loop, link)
    device = _Device(loop, scheduler, simulated_link, reads_in_flight=reads_in_flight)
    ended: dict[int, RequestTimes] = {}

    def arrive(members: Sequence[int]) -> None:
        device.held = together
        for index in members:
            request = requests[index]
            device.submit(
                index, request.problem, partial(ended.__setitem__, index), truth=request.truth,
                first_token_due_s=request.first_token_due_s,
            )  # fmt: skip
        device.held = False
        if together:
            device.pump()

    in_order = sorted(range(len(requests)), key=lambda index: requests[index].arrival_s)
    arrivals = groupby(in_order, key=lambda index: requests[index].arrival_s if together else index)
    for members in (list(group) for _, group in arrivals):
        loop.at(requests[members[0]].arrival_s, partial(arrive, members), priority=-1 if together else 0)
    loop.run()
    return SimulatedRun(
        restored=tuple(ended[index] for index in range(len(requests))),
        compute_busy_s=device.compute_busy_s,
        io_busy_s=simulated_link.busy_s,
    )
