"""A plan carried out under a virtual clock: the same state machine as live, with costs that come true.

This is how ``cacheflow plan`` predicts: every policy meets its own rules for claiming, sharing and starting the new
tokens, on hardware that behaves exactly as its costs say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cacheflow.plan.batch import Arrival
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import Span
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import RecordingDevice, RequestTimes
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.restoration import RestoreState


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What came of a plan.

    Attributes:
        plan: What was carried out.
        restore_s: When the last prefix cell was there.
        ttft_s: When the first token was there; equals ``restore_s`` without a suffix.
        cells_KB: Per chunk a string of one letter a block: ``c`` recomputed, ``l`` loaded.
        loaded_bytes: Bytes over the link, those of reads that were not used included.
        spans: What both lanes did.
    """

    plan: RestorePlan
    restore_s: float
    ttft_s: float
    cells_KB: tuple[str, ...]
    loaded_bytes: int
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def recomputed_share(self) -> float:
        """Share of the cells that compute restored; 0 for an empty prefix."""
        num_cells = sum(map(len, self.cells_KB))
        return sum(column.count("c") for column in self.cells_KB) / num_cells if num_cells else 0.0


def rehearse(problem: RestoreProblem, plan: RestorePlan) -> Rehearsal:
    """Carry a plan out to the first token on hardware that costs exactly what the problem says."""
    loop, rates = EventLoop(), LiveRates(bytes_per_s=problem.link.bytes_per_s)
    state = RestoreState(problem, plan, rates)
    device = RecordingDevice(loop, BatchScheduler(Arrival(), rates), SimulatedLink(loop, problem.link))
    ended: list[RequestTimes] = []
    device.adopt(0, state, ended.append)
    device.pump()
    loop.run()
    [completion] = ended
    return Rehearsal(
        plan=plan,
        restore_s=completion.restored_at_s,
        ttft_s=completion.first_token_at_s,
        cells_KB=state.board.letters(),
        loaded_bytes=completion.moved_bytes,
        spans=completion.spans,
    )
