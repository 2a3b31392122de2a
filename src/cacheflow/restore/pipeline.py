"""The scheduler's side of one restoration over all pipeline stages: one ``StageRestoration`` a stage.

Stages are independent: each has its own grid (its layers), link, plan and progress, and finishes when it is through.
They share the end: what one stage has lost, no other goes on to restore, and a failure of one ends them all. Ranks of
a stage get the same work, because its tensor-parallel ranks all-reduce; a decision rests only on what every one of
them has reported. Pure: time is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from cacheflow.errors import ConfigError
from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.report import RestoreReport
from cacheflow.restore.pipeline_report import PipelineReport
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.restore.stage import StageRestoration
from cacheflow.restore.work import RestoreTarget, StageWork, StepReport
from cacheflow.state.restoration import RestoreState

HANDED_READ_AHEAD = 2.5
"""A stage that is handed activations waits for them inside its steps, and is given no reads meanwhile: that many times
as much of its link is kept under way."""
AWAITED_MARGIN = 1.1
"""A step that ends just before boundary states come hears of them a step later: rather end just after."""


@dataclass(frozen=True, slots=True)
class PipelineWork:
    """One step's work on one restoration, for the ranks of each pipeline stage, bottom stage first."""

    by_stage: tuple[StageWork, ...]

    @property
    def cancel(self) -> bool:
        """Whether a stage's workers were sent the end of it."""
        return any(each.cancel for each in self.by_stage)


class PipelineRestoration:
    """One restoration of all stages; with one stage it does what a ``StageRestoration`` does.

    Attributes:
        target: What the workers of every stage were sent about the restoration.
        stages: The restoration of each stage, bottom stage first; to be asked, not driven.
    """

    def __init__(
        self,
        target: RestoreTarget,
        states: Sequence[RestoreState],
        *,
        ranks_per_stage: int = 1,
        can_compute: bool = True,
        deadline: ReadDeadline | None = None,
    ) -> None:
        """Wrap fresh state machines.

        Args:
            target: Of the same chunks as every state's grid.
            states: One a stage, bottom stage first, made with the stage's boundary source and without a suffix. The
                state of a stage whose source is ``NONE`` has a plan that computes nothing.
            ranks_per_stage: Tensor-parallel ranks of a stage.
            can_compute: Whether the workers can recompute at all.
            deadline: When a read is late.

        Raises:
            ConfigError: There is no stage, or the bottom stage or one above a stage that only loads takes its
                activations from another.
        """
        sources = [state.boundaries.source for state in states]
        if not states or sources[0] in (BoundarySource.HANDED_OVER, BoundarySource.STORED):
            raise ConfigError(f"a staged restoration needs a first stage, and no boundary below it: {sources}")
        for below, source in pairwise(sources):
            if source is BoundarySource.HANDED_OVER and below is BoundarySource.NONE:
                raise ConfigError(f"a stage that only loads hands nothing over: {[each.value for each in sources]}")
        self.target, self._tp = target, ranks_per_stage
        stages: list[StageRestoration] = []
        for state in reversed(states):
            handed = bool(stages) and stages[0].state.boundaries.source is BoundarySource.HANDED_OVER
            stage = StageRestoration(
                target,
                state,
                num_ranks=ranks_per_stage,
                can_compute=can_compute and state.boundaries.source is not BoundarySource.NONE,
                deadline=deadline,
                wanted_above=partial(_wants, stages[0]) if handed else lambda chunk: False,
            )
            stages.insert(0, stage)
        self.stages = tuple(stages)
        self._waits_until_s = [0.0] * len(states)
        self._sent: list[tuple[int, ...]] = [()] * len(states)

    @property
    def failed(self) -> bool:
        """Whether it ends, or ended, without every cell resident although nobody cancelled it."""
        return any(stage.failed for stage in self.stages)

    @property
    def restored(self) -> bool:
        """Whether no stage has work left to give."""
        return all(stage.restored for stage in self.stages)

    @property
    def done(self) -> bool:
        """Whether every rank of every stage has reported the restoration finished."""
        return all(stage.done for stage in self.stages)

    @property
    def giving_up(self) -> bool:
        """Whether it was cancelled or has failed: what it restored may be overwritten soon."""
        return any(stage.giving_up for stage in self.stages)

    @property
    def end_was_sent(self) -> bool:
        """Whether the workers of every stage were sent its end, well or not."""
        return all(stage.end_was_sent for stage in self.stages)

    @property
    def error(self) -> str:
        """Why compute failed on a worker; empty when it did not."""
        return next((stage.error for stage in self.stages if stage.error), "")

    @property
    def loads_under_way(self) -> bool:
        """Whether reads are under way on any stage that were not dropped."""
        return any(stage.loads_under_way for stage in self.stages)

    @property
    def loads_under_way_s(self) -> float:
        """Seconds that the busiest stage's reads under way take its link."""
        return max(stage.loads_under_way_s for stage in self.stages)

    @property
    def only_compute_left(self) -> bool:
        """Whether no stage has a read under way or will ask for one."""
        return all(stage.only_compute_left for stage in self.stages)

    def resident_tokens(self) -> int:
        """Token position up to which the prefix is completely resident on every rank, as far as reports tell."""
        return min(stage.resident_tokens() for stage in self.stages)

    def cancel(self) -> None:
        """Give the restoration up; the next work tells the workers, unless they were sent the finish."""
        for stage in self.stages:
            stage.cancel()

    def fail(self) -> None:
        """Give the restoration up as one that has failed: what it restores may not be used."""
        for stage in self.stages:
            stage.fail()

    def close_link(self) -> None:
        """Ask for no more reads of keys and values; a stage above the first still reads what it recomputes from."""
        for stage in self.stages:
            stage.close_link()

    def next_work(
        self, now_s: float, *, compute_budget_s: float, read_ahead_s: float, must_progress: bool = False
    ) -> PipelineWork:
        """What the workers do in this step; what it claims counts as given, so it must be sent.

        Args:
            now_s: Seconds on the caller's clock.
            compute_budget_s: Seconds of compute to give to each stage; see ``StageRestoration.next_work``.
            read_ahead_s: Seconds of each stage's link to keep under way.
            must_progress: Every stage gets a unit of compute if there is one, whatever the budget.
        """
        self._share_the_end()
        self._hand_over(now_s)
        settled = [stage.settled for stage in self.stages]
        by_stage: dict[int, StageWork] = {}
        until_s: float | None = None
        # Who waits for boundary states comes first: the others compute no longer than until those are there, because
        # a step ends with its slowest stage, and hears of them only then.
        for index in sorted(range(len(self.stages)), key=lambda index: not self._needs_boundary(index)):
            stage = self.stages[index]
            work = stage.next_work(
                now_s,
                compute_budget_s=_until(stage, now_s, compute_budget_s, until_s),
                read_ahead_s=read_ahead_s * _read_ahead_factor(stage),
                must_progress=must_progress or compute_budget_s > 0,
                others_settled=all(each for other, each in enumerate(settled) if other != index),
            )
            awaited_s = None if stage.settled else stage.state.boundaries.awaited_s(now_s)
            if awaited_s is not None:
                until_s = awaited_s if until_s is None else min(until_s, awaited_s)
                work = replace(work, wait_s=self._wait_s(index, now_s, min(awaited_s, compute_budget_s)))
            by_stage[index] = work
        return PipelineWork(self._with_receives([by_stage[index] for index in range(len(self.stages))]))

    def _wait_s(self, index: int, now_s: float, awaited_s: float) -> float:
        """How long a stage's ranks may wait for boundary states: once, in whatever steps are worked out meanwhile."""
        began_s = max(now_s, self._waits_until_s[index])
        self._waits_until_s[index] = max(began_s, now_s + AWAITED_MARGIN * awaited_s)
        return self._waits_until_s[index] - began_s

    def _hand_over(self, now_s: float) -> None:
        """What was to be sent in the last step is received in this one, before anything is computed."""
        for stage, sent in zip(self.stages, self._sent, strict=True):
            for chunk in sent:
                stage.state.take_activations(chunk)
        for below, above in pairwise(self.stages):
            if above.state.boundaries.source is not BoundarySource.HANDED_OVER:
                continue
            below.state.keep_whole(not above.settled)
            if below.settled:
                above.state.end_activations()
            else:
                above.state.expect_activations(below.state.whole_chunks_s(now_s), now_s)

    def _with_receives(self, given: list[StageWork]) -> tuple[StageWork, ...]:
        """Every send meets its receive: in the step after it, or in the same one where that is the receiver's last."""
        before = self._sent
        self._sent = [(), *(tuple(each.tile.chunk_lo for each in below.compute if each.sends) for below in given[:-1])]
        received = []
        for index, each in enumerate(given):
            chunks = before[index]
            if each.finish or each.cancel:
                chunks, self._sent[index] = (*chunks, *self._sent[index]), ()
            received.append(replace(each, receives=chunks) if chunks else each)
        return tuple(received)

    def _needs_boundary(self, index: int) -> bool:
        state = self.stages[index].state
        return state.boundaries.source is BoundarySource.STORED and not state.boundaries.any_ready

    def _share_the_end(self) -> None:
        if len(self.stages) == 1:
            return
        limit = min(stage.limit for stage in self.stages)
        for stage in self.stages:
            if limit < stage.limit:
                stage.stop_before(limit)
        if self.failed:
            for stage in self.stages:
                if not stage.end_was_sent:
                    stage.fail()

    def apply(self, report: StepReport, now_s: float) -> None:
        """Take in what the ranks did.

        Args:
            report: Of all ranks, or of some, by rank: ``stage * ranks_per_stage + tensor-parallel rank``.
            now_s: Seconds on the caller's clock.
        """
        for index, stage in enumerate(self.stages):
            own = {
                rank - index * self._tp: each
                for rank, each in report.by_rank.items()
                if index * self._tp <= rank < (index + 1) * self._tp
            }
            if own:
                stage.apply(StepReport(own), now_s)

    def stage_reports(self, now_s: float) -> PipelineReport:
        """What came of each stage so far, and how near its bound it ended."""
        return PipelineReport.of([stage.report(now_s) for stage in self.stages], [stage.state for stage in self.stages])

    def report(self, now_s: float, *, planning_s: float = 0.0) -> RestoreReport:
        """What was planned and what came of it so far, of all stages as one model.

        Args:
            now_s: Seconds on the caller's clock, for a restoration that has not ended.
            planning_s: Seconds the plans took.
        """
        if len(self.stages) == 1:
            return self.stages[0].report(now_s, planning_s=planning_s)
        return self.stage_reports(now_s).merged(planning_s=planning_s)


def _read_ahead_factor(stage: StageRestoration) -> float:
    return HANDED_READ_AHEAD if stage.state.boundaries.source is BoundarySource.HANDED_OVER else 1.0


def _until(stage: StageRestoration, now_s: float, budget_s: float, until_s: float | None) -> float:
    """A stage's budget for a step that should end in ``until_s``, what the stage was given before included."""
    if until_s is None or budget_s <= 0:
        return budget_s
    left_s = AWAITED_MARGIN * until_s - stage.state.compute.left_s(now_s)
    return min(budget_s, max(0.0, left_s))


def _wants(above: StageRestoration, chunk: int) -> bool:
    return not (above.end_was_sent or above.giving_up) and above.state.boundaries.wants_activations(chunk)
