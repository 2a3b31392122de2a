"""Drives one restoration by the simulator's virtual clock: true costs may differ from the ones planned with.

A variation of ``sim.device`` that breaks things: other costs, a changing link, failing reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cacheflow.plan.batch import Arrival
from cacheflow.plan.grid import Piece
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import RequestTimes, VirtualDevice
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.compute_side import ComputeClaim
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome


@dataclass(kw_only=True)
class Conditions:
    """What the hardware really does; ``bandwidth_at(now)`` is the link's rate when a read begins on it."""

    truth: RestoreProblem | None = None
    bandwidth_at: Callable[[float], float] | None = None
    fails: Callable[[int, int], LoadOutcome | None] = lambda chunk, block: None
    check: Callable[[RestoreState, ComputeClaim], None] = lambda state, claim: None


@dataclass(frozen=True)
class VirtualRun:
    """What came of one restoration."""

    state: RestoreState
    restore_s: float
    ttft_s: float


class ChangingLink(SimulatedLink):
    """A link whose rate depends on when a read begins on it."""

    def __init__(self, loop: EventLoop, bandwidth_at: Callable[[float], float]) -> None:
        super().__init__(loop, LinkCost(bytes_per_s=bandwidth_at(0.0)))
        self._bandwidth_at, self._free_s = bandwidth_at, 0.0

    def read(self, num_bytes: int, done: Callable[[float], None], *, follows: bool = False) -> None:
        start_s = max(self._loop.now_s, self._free_s)
        busy_s = num_bytes / self._bandwidth_at(start_s)
        self._free_s = start_s + busy_s
        self._loop.at(self._free_s, lambda: done(busy_s))


class BreakingDevice(VirtualDevice):
    """Looks at every claim, and fails reads."""

    conditions: Conditions
    state: RestoreState

    def claimed(self, request_id: int, claim: ComputeClaim) -> None:
        self.conditions.check(self.state, claim)

    def outcome(self, request_id: int, piece: Piece) -> LoadOutcome:
        return self.conditions.fails(*piece) or LoadOutcome.OK


def run_virtual(
    planned: RestoreProblem,
    plan: RestorePlan,
    conditions: Conditions | None = None,
    *,
    depth: int = 3,
    min_claim_s: float = 0.0,
) -> VirtualRun:
    """Run a plan to its end, planned with ``planned`` and carried out under ``conditions``."""
    conditions = conditions or Conditions()
    truth = conditions.truth or planned
    loop, rates = EventLoop(), LiveRates(bytes_per_s=planned.link.bytes_per_s)
    link = ChangingLink(loop, conditions.bandwidth_at or (lambda now: truth.link.bytes_per_s))
    device = BreakingDevice(loop, BatchScheduler(Arrival(), rates), link, reads_in_flight=depth)
    device.conditions = conditions
    device.state = state = RestoreState(planned, plan, rates, min_claim_s=min_claim_s)
    ended: list[RequestTimes] = []
    device.adopt(0, state, ended.append, truth=truth)
    device.pump()
    loop.run()
    assert ended, f"stuck at {loop.now_s}: nobody works"
    return VirtualRun(state, ended[0].restored_at_s, ended[0].first_token_at_s)
