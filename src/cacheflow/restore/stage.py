"""The scheduler's side of one stage's restoration, whose workers meet it once per engine step.

Pure: time is passed in. Each step it takes the workers' reports in and turns the state machine's claims into counted
units of work. Workers carry work out strictly in sequence, so what they were given to compute counts as resident for
what comes after it; what the link brings counts once every rank has reported it.

The words for its end, from the first to the last that comes true:

| word | what is true | who knows |
|---|---|---|
| ``restored`` | every cell is resident once the work given is done, and nothing is given up | scheduler side |
| ``giving_up`` | it ends early: it was cancelled, or ``failed`` | scheduler side |
| ``settled`` | no work is left: restored, giving up, or nothing more of it can be restored | scheduler side |
| ``end_was_sent`` | the workers were sent ``finish`` or ``cancel`` (phase ``FINISHING``, ``CANCELLING``) | workers |
| ``finished`` | a rank has reported that it touches the KV cache for it no more | that rank |
| ``done`` | every rank has (phase ``DONE``) | scheduler side |

One way leads back: compute that fails while ``FINISHING`` makes it ``giving_up``, and a ``cancel`` is sent after all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from cacheflow.errors import ConfigError
from cacheflow.plan.report import RestoreReport, Span, SpanKind
from cacheflow.restore.ledgers import ComputeLedger, DoneCompute
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.restore.stage_reads import StageReads
from cacheflow.restore.work import (
    ComputeReport,
    ComputeWork,
    ReadWork,
    RestoreTarget,
    StageWork,
    StepReport,
    Unit,
    cut,
    join,
)
from cacheflow.state.restoration import RestoreState

REST_SHARE = 0.25
"""Compute at most this share of what is left at once, so that both sides end together. Little is lost where costs are
right; where compute takes twice as long as planned and reports come late, all at once ended at 1.6 of the bound."""


class Phase(Enum):
    """How far the workers are with a restoration, by what was sent to them."""

    RESTORING = "restoring"
    FINISHING = "finishing"
    """They were sent the finish: every cell is resident once their work is done."""
    CANCELLING = "cancelling"
    """They were sent the end: everything is given up."""
    DONE = "done"
    """Every rank has reported it finished: nothing of it touches the KV cache any more."""


class GivenUp(Enum):
    """Whether a restoration is to end before every cell is resident, and why."""

    NO = "no"
    CANCELLED = "cancelled"
    FAILED = "failed"


class StageRestoration:
    """Turns one stage's state machine into work, and reports back into its state.

    Attributes:
        target: What the workers were sent about the restoration.
        state: The state machine; to be asked, not driven.
        error: Why compute failed on a worker; empty when it did not.
    """

    def __init__(
        self,
        target: RestoreTarget,
        state: RestoreState,
        *,
        num_ranks: int = 1,
        can_compute: bool = True,
        deadline: ReadDeadline | None = None,
        wanted_above: Callable[[int], bool] = lambda chunk: False,
    ) -> None:
        """Wrap a fresh state machine.

        Args:
            target: Of the same chunks as the state's grid.
            state: A fresh state machine without a suffix: the engine runs the new tokens itself.
            num_ranks: Workers that get the work and report.
            can_compute: Whether workers can recompute; if not, the plan must leave every cell to the link.
            deadline: When a read is late.
            wanted_above: Whether the stage above takes a chunk's activations, once its top block is recomputed.

        Raises:
            ConfigError: Target, plan and state do not fit each other.
        """
        grid, plan = state.problem.grid, state.plan
        if grid.suffix_ends or grid.num_chunks != len(target.chunk_ends):
            raise ConfigError(
                f"the restoration of {len(target.chunk_ends)} chunks in steps needs a grid of as many, without a "
                f"suffix; it has {grid.num_chunks}, and {grid.suffix_tokens} suffix tokens"
            )
        if not can_compute and plan.compute_sequence:
            raise ConfigError(f"policy {plan.policy!r} recomputes, but the workers of this model may only load")
        self.target, self.state, self.error = target, state, ""
        self._num_ranks, self._can_compute, self._wanted_above = num_ranks, can_compute, wanted_above
        self._computes = ComputeLedger(num_ranks)
        self._reads = StageReads(state, num_ranks=num_ranks, can_compute=can_compute, deadline=deadline)
        self._units: deque[Unit] = deque()
        self._spans: list[Span] = []
        self._finished: set[int] = set()
        self._phase, self._given_up = Phase.RESTORING, GivenUp.NO
        self._undefined = False
        self._start_s: float | None = None
        self._end_s: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it ends, or ended, without every cell resident although nobody cancelled it."""
        return self._given_up is GivenUp.FAILED

    @property
    def giving_up(self) -> bool:
        """Whether it was cancelled or has failed: what it restored may be overwritten soon."""
        return self._given_up is not GivenUp.NO

    @property
    def restored(self) -> bool:
        """Whether no work is left to give: every cell is resident once the work given is done."""
        return self.state.restored and not self._units and not self.giving_up

    @property
    def done(self) -> bool:
        """Whether every rank has reported the restoration finished: nothing of it touches the KV cache any more."""
        return self._phase is Phase.DONE

    @property
    def end_was_sent(self) -> bool:
        """Whether the workers were sent its end, well or not."""
        return self._phase is not Phase.RESTORING

    @property
    def loads_under_way(self) -> bool:
        """Whether reads are under way that were not dropped."""
        return len(self._reads) > 0

    @property
    def loads_under_way_s(self) -> float:
        """Seconds of the link that its reads under way take."""
        return self.state.link.expected_s()

    @property
    def only_compute_left(self) -> bool:
        """Whether what is missing can only be recomputed: no read is under way, and none will be asked for."""
        return not (self._reads or self.state.loads_possible or self.state.boundaries.reads_possible)

    @property
    def limit(self) -> int:
        """From this chunk on nothing is restored any more; the number of chunks while nothing is lost."""
        return self._reads.limit

    @property
    def settled(self) -> bool:
        """Whether no work is left: all is resident, or all before the first chunk that cannot be restored."""
        return self.end_was_sent or self.giving_up or self.restored or self._at_limit()

    def resident_tokens(self) -> int:
        """Token position up to which the prefix is completely resident on every rank, as far as reports tell."""
        pending = {
            *self._computes.cells_under_way(),
            *(cell for unit in self._units for cell in unit.work.tile.cells()),
        }
        reached = self.target.start
        if self._undefined:
            return reached
        for chunk, end in enumerate(self.target.chunk_ends):
            cells = [(chunk, block) for block in range(self.state.problem.grid.num_blocks)]
            if any(cell in pending or not self.state.board.is_resident(*cell) for cell in cells):
                break
            reached = end
        return reached

    def cancel(self) -> None:
        """Give the restoration up; the next work tells the workers, unless they were sent the finish."""
        self._give_up(GivenUp.CANCELLED)

    def fail(self) -> None:
        """Give the restoration up because another stage has failed, or because what it restores may not be used."""
        self._give_up(GivenUp.FAILED)

    def _give_up(self, why: GivenUp) -> None:
        if self._given_up is GivenUp.NO:
            self._given_up = why

    def stop_before(self, chunk: int) -> None:
        """Restore nothing from a chunk on: another stage has lost it."""
        self.state.stop_before(chunk)
        self._reads.stop_before(chunk)

    def close_link(self) -> None:
        """Ask for no more reads; what is under way may still arrive, compute restores the rest."""
        self.state.close_link()

    def next_work(
        self,
        now_s: float,
        *,
        compute_budget_s: float,
        read_ahead_s: float,
        must_progress: bool = False,
        others_settled: bool = True,
    ) -> StageWork:
        """What the workers do in this step; what it claims counts as given, so it must be sent.

        Args:
            now_s: Seconds on the caller's clock.
            compute_budget_s: Seconds of compute to give, by prediction: 0 for none; otherwise at least one unit if
                there is one, and never more than the budget beyond that; ``inf`` for all there is.
            read_ahead_s: Seconds of the link to keep under way: 0 for no further reads, otherwise at least
                ``MIN_READS``.
            must_progress: Give a unit of compute if there is one, whatever the budget.
            others_settled: It may end when nothing more of it can be restored; otherwise it waits for other stages.
        """
        if self._start_s is None:
            self._start_s = now_s
        restore_id = self.target.restore_id
        if self.end_was_sent:
            return StageWork(restore_id=restore_id)
        compute: tuple[ComputeWork, ...] = ()
        reads: tuple[ReadWork, ...] = ()
        if not self.giving_up:
            # Compute first: a read asked for in this step must not be dropped in it, drops are carried out before.
            compute = self._next_compute(now_s, compute_budget_s, must_progress=must_progress)
            reads = self._reads.next_reads(now_s, read_ahead_s)
            if others_settled:
                self._fail_at_limit(read_ahead_s)
        if self.giving_up:
            self._phase = Phase.CANCELLING
            return StageWork(restore_id=restore_id, cancel=True)
        if self.restored:
            self._phase = Phase.FINISHING
        return StageWork(
            restore_id=restore_id,
            drops=self._reads.take_drops(),
            reads=reads,
            compute=compute,
            finish=self._phase is Phase.FINISHING,
        )

    def _fail_at_limit(self, read_ahead_s: float) -> None:
        """Fail once nothing more can be restored: of a stage that may only load, or has lost boundary states."""
        if self.state.restored or self.loads_under_way:
            return
        its_turn = read_ahead_s > 0 or not self.state.loads_possible
        if self._at_limit() if self._can_compute else its_turn:
            self.fail()

    def _at_limit(self) -> bool:
        """Whether all that can be restored is, as far as reports tell, and something else cannot."""
        if self.loads_under_way or self.state.restored:
            return False
        if not self._can_compute and not self.state.loads_possible:
            return True
        grid, limit = self.state.problem.grid, self.limit
        if limit == grid.num_chunks or self._units or self._computes.under_way:
            return False
        is_resident, num_blocks = self.state.board.is_resident, grid.num_blocks
        return all(is_resident(chunk, block) for chunk in range(limit) for block in range(num_blocks))

    def _next_compute(self, now_s: float, budget_s: float, *, must_progress: bool) -> tuple[ComputeWork, ...]:
        if not (budget_s > 0 or must_progress) or not self._can_compute:
            return ()
        if len(self._reads) or self.state.loads_possible:
            budget_s = min(budget_s, REST_SHARE * self.state.expected_left_s(now_s))
        units: list[Unit] = []
        spent_s, factor = 0.0, self.state.rates.compute_factor
        while self._units or self._claim(now_s):
            unit = self._next_unit()
            seconds = unit.predicted_s * factor
            if units and spent_s + seconds > budget_s:
                break
            self._units.popleft()
            units.append(unit)
            spent_s += seconds
        joined = join(units)
        for unit in joined:
            self._computes.add(unit.work, unit.predicted_s)
        return tuple(replace(unit.work, expected_s=unit.predicted_s * factor) for unit in joined)

    def _next_unit(self) -> Unit:
        """The next unit; at the top of a chunk whose activations the stage above takes, in full and handed over."""
        unit, problem = self._units[0], self.state.problem
        tile = unit.work.tile
        if tile.block_hi < problem.grid.num_blocks or not self._wanted_above(tile.chunk_lo):
            return unit
        work = replace(unit.work, kv_only_top=False, sends=True)
        return Unit(work, float(problem.compute_KB[tile.chunk_lo, tile.block_lo]))

    def _claim(self, now_s: float) -> bool:
        """Claim the next tile for compute and cut it into units."""
        claim = self.state.claim_compute(now_s)
        if claim.tile is None:
            return False
        self._reads.drop(claim.tile.cells())
        self.state.assume_compute(claim, now_s)
        self._units.extend(cut(claim, self.state.problem))
        return True

    def apply(self, report: StepReport, now_s: float) -> None:
        """Take in what the ranks did; reports of what is settled, or of other restorations, change nothing.

        Args:
            report: Of all ranks, or of some; each says what it did since its last one.
            now_s: Seconds on the caller's clock.
        """
        restore_id = self.target.restore_id
        for rank, each in report.by_rank.items():
            for load in each.loads:
                if load.restore_id == restore_id and (span := self._reads.take(rank, load, now_s)) is not None:
                    self._spans.append(span)
            for compute in each.computes:
                if compute.restore_id == restore_id:
                    self._take_compute(rank, compute, now_s)
            if restore_id in each.finished:
                self._finished.add(rank)
        if not self.done and len(self._finished) >= self._num_ranks:
            self._phase, self._end_s = Phase.DONE, now_s

    def _take_compute(self, rank: int, report: ComputeReport, now_s: float) -> None:
        for done in self._computes.take(rank, report):
            self.state.note_computed(now_s, predicted_s=done.predicted_s, actual_s=done.actual_s)
            self._spans.append(_span(done))
        if report.error and not self.done:
            self.error = self.error or report.error
            self.fail()
            if self._phase is Phase.FINISHING:
                # A device may report late, at the end, what failed anywhere: then no cell is known to be good.
                self._undefined, self._phase = True, Phase.RESTORING

    def report(self, now_s: float, *, planning_s: float = 0.0) -> RestoreReport:
        """What was planned and what came of it so far; spans are on the clock of the slowest worker.

        Args:
            now_s: Seconds on the caller's clock, for a restoration that has not ended.
            planning_s: Seconds the plan took.
        """
        start_s = now_s if self._start_s is None else self._start_s
        restore_s = (now_s if self._end_s is None else self._end_s) - start_s
        return self.state.report(restore_s=restore_s, spans=self._spans, planning_s=planning_s)


def _span(done: DoneCompute) -> Span:
    tile = done.work.tile
    kind = SpanKind.KV_ONLY if done.work.kv_only_top and tile.num_cells == 1 else SpanKind.RECOMPUTE
    return Span.of_compute(kind, tile, done.end_s - done.actual_s, done.end_s)
