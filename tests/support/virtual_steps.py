"""Drives a stepped restoration by a virtual clock: fake workers that pay for every step, reports that come late."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cacheflow.plan.grid import Piece
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.restore.stage import StageRestoration
from cacheflow.restore.work import (
    ComputeReport,
    ComputeWork,
    LoadReport,
    RankReport,
    RestoreTarget,
    StageWork,
    StepReport,
)
from cacheflow.sim.device import true_bytes
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

STEP_OVERHEAD_S = 0.0012
MAX_STEPS = 50_000


def target_for(problem: RestoreProblem, *, restore_id: int = 7, start: int = 0, **kwargs) -> RestoreTarget:
    ends = problem.grid.chunk_ends
    return RestoreTarget(
        restore_id=restore_id,
        request_id="request",
        start=start,
        object_start=kwargs.pop("object_start", start),
        chunk_ends=ends,
        tokens=tuple(range(ends[-1] - start)),
        block_ids=tuple(range(-(-ends[-1] // 16))),
        namespace="namespace",
        chain_hashes=tuple(f"{index:02x}" for index in range(len(ends))),
        **kwargs,
    )


def stepped_for(problem: RestoreProblem, plan: RestorePlan, **kwargs) -> StageRestoration:
    state = RestoreState(problem, plan, LiveRates(bytes_per_s=problem.link.bytes_per_s))
    return StageRestoration(target_for(problem), state, **kwargs)


@dataclass
class VirtualWorker:
    """One rank: compute at true cost, a link of one read after another at the true rate."""

    truth: RestoreProblem
    overhead_s: float = STEP_OVERHEAD_S
    now: float = 0.0
    compute_s: float = 0.0
    finished_s: float | None = None
    _link_free: float = 0.0
    _reads: deque[tuple[float, float, Piece]] = field(default_factory=deque)
    _num_computed: int = 0

    def step(self, orders: StageWork, *, wait_s: float) -> RankReport:
        for read in orders.reads:
            start = max(self.now, self._link_free)
            self._link_free = start + true_bytes(self.truth, read.piece) / self.truth.link.bytes_per_s
            self._reads.append((self._link_free, start, read.piece))
        assert not orders.drops, "nothing fails in this world"
        seconds = tuple(self._compute(order) for order in orders.compute)
        first, self._num_computed = self._num_computed, self._num_computed + len(seconds)
        end_s = self.now
        if not seconds and self._reads and self._reads[0][0] > self.now:
            self.now = min(self.now + wait_s, self._reads[0][0])
        if orders.finish:
            self.finished_s = self.now
        self.now += self.overhead_s
        computes = (ComputeReport(restore_id=7, first=first, seconds=seconds, end_s=end_s),) if seconds else ()
        return RankReport(loads=tuple(self._ended()), computes=computes, finished=(7,) if orders.finish else ())

    def _compute(self, order: ComputeWork) -> float:
        seconds = 0.0
        for chunk, block in order.tile.cells():
            kv_only = order.kv_only_top and block == order.tile.block_hi - 1
            seconds += float((self.truth.kv_only_KB if kv_only else self.truth.compute_KB)[chunk, block])
        self.now += seconds
        self.compute_s += seconds
        return seconds

    def _ended(self):
        while self._reads and self._reads[0][0] <= self.now:
            end, start, piece = self._reads.popleft()
            yield LoadReport(
                restore_id=7,
                piece=piece,
                outcome=LoadOutcome.OK,
                num_bytes=true_bytes(self.truth, piece),
                busy_s=end - start,
                end_s=end,
            )


@dataclass
class VirtualSteps:
    """One restoration, step by step; ``delay`` is how many steps later a report is there when orders are made."""

    truth: RestoreProblem
    stepped: StageRestoration
    budget_s: float
    read_ahead_s: float
    wait_s: float = 0.002
    delay: int = 1
    overhead_s: float = STEP_OVERHEAD_S
    num_steps: int = 0

    def run(self) -> VirtualWorker:
        worker = VirtualWorker(self.truth, self.overhead_s)
        reports: deque[RankReport] = deque()
        ordered: deque[StageWork] = deque()
        for _ in range(MAX_STEPS):
            # With a delay of 2, orders are made while the step before is still to be carried out.
            ordered.append(
                self.stepped.next_work(worker.now, compute_budget_s=self.budget_s, read_ahead_s=self.read_ahead_s)
            )
            if len(ordered) == self.delay:
                reports.append(worker.step(ordered.popleft(), wait_s=self.wait_s))
                self.num_steps += 1
            if reports:
                self.stepped.apply(StepReport({0: reports.popleft()}), worker.now)
            if self.stepped.done:
                return worker
        raise AssertionError("no end in sight")


def run_steps(planned: RestoreProblem, plan: RestorePlan, *, truth: RestoreProblem | None = None, **kwargs):
    return VirtualSteps(truth or planned, stepped_for(planned, plan), **kwargs).run()
