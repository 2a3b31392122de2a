"""The scheduler's side of one restoration whose workers meet it once per engine step.

Pure: time is passed in. Each step it takes the workers' reports in and turns the state machine's claims into orders of
counted units. Workers carry orders out strictly in order, so what was ordered to compute counts as resident for what
is ordered behind it; what the link brings counts once every rank has reported it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cacheflow.errors import ConfigError
from cacheflow.restore.ledgers import ComputeLedger
from cacheflow.restore.step_reads import ReadDeadline, StepReads
from cacheflow.restore.step_spans import compute_span
from cacheflow.restore.units import Unit, cut, handed_on, join
from cacheflow.restore.work import (
    ComputeReport,
    ComputeWork,
    ReadWork,
    RestoreTarget,
    StageWork,
    StepReport,
)
from cacheflow.state.board import RESIDENT
from cacheflow.state.report import RestoreReport, Span, restoration_report
from cacheflow.state.restoration import RestoreState

IDLE_COMPUTE_BUDGET_S = 0.05
"""Recommended compute per step while nobody decodes: with 1.2 ms of overhead a step, restorations end at 1.03 of the
bound; with half of it at 1.05; with more, a request that arrives in the middle waits longer for little."""
READ_AHEAD_S = 0.12
"""Recommended reads under way, in seconds of the link: two such steps and a bit, because orders may be made a step
before the reports they lack; one step less, and the link idles (1.3 of the bound)."""
REST_SHARE = 0.25
"""Compute at most this share of what is left at once, so that both sides end together. Little is lost where costs are
right; where compute takes twice as long as planned and reports come late, all at once ended at 1.6 of the bound."""


class StageRestoration:
    """Turns one restoration's state machine into orders, and reports back into its state.

    Attributes:
        target: What the workers were told of the restoration.
        error: Why compute failed on a worker; empty when it did not.
        waiting: The last step's budget found nothing for compute to do.
        may_give_up: Whether it may end when nothing more of it can be restored; otherwise it waits for other stages.
        wanted_above: Whether the pipeline stage above takes a chunk's activations, once its top block is ordered.
    """

    def __init__(
        self,
        target: RestoreTarget,
        state: RestoreState,
        *,
        num_ranks: int = 1,
        can_compute: bool = True,
        deadline: ReadDeadline | None = None,
    ) -> None:
        """Wrap a fresh state machine.

        Args:
            target: Of the same chunks as the state's grid.
            state: A fresh state machine without a suffix: the engine runs the new tokens itself.
            num_ranks: Workers that get the orders and report.
            can_compute: Whether workers can recompute; if not, the plan must leave every cell to the link.
            deadline: When a read is late.

        Raises:
            ConfigError: Target, plan and state do not fit each other.
        """
        grid, plan = state.problem.grid, state.plan
        if grid.suffix_ends or grid.num_chunks != len(target.chunk_ends):
            raise ConfigError(
                f"a stepped restoration of {len(target.chunk_ends)} chunks needs a grid of as many, without a suffix; "
                f"it has {grid.num_chunks}, and {grid.suffix_tokens} suffix tokens"
            )
        if not can_compute and plan.compute_sequence:
            raise ConfigError(f"policy {plan.policy!r} recomputes, but the workers of this model may only load")
        self.target, self.error, self.waiting = target, "", False
        self._state, self._num_ranks, self._can_compute = state, num_ranks, can_compute
        self._computes = ComputeLedger(num_ranks)
        self._reads = StepReads(state, num_ranks=num_ranks, can_compute=can_compute, deadline=deadline)
        self._units: deque[Unit] = deque()
        self._spans: list[Span] = []
        self._finished: set[int] = set()
        self.may_give_up = True
        self.wanted_above: Callable[[int], bool] = lambda chunk: False
        self._giving_up = self._told_cancel = self._closing = self._failed = self._undefined = False
        self._start_s: float | None = None
        self._end_s: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it ends, or ended, without every cell resident although nobody cancelled it."""
        return self._failed

    @property
    def restored(self) -> bool:
        """Whether nothing is left to order: every cell is resident once the orders given are carried out."""
        return self._state.restored and not self._units and not self._giving_up

    @property
    def done(self) -> bool:
        """Whether every rank has reported the restoration finished: nothing of it touches the KV cache any more."""
        return self._end_s is not None

    @property
    def closing(self) -> bool:
        """Whether the workers were told to end it, well or not."""
        return self._closing

    @property
    def giving_up(self) -> bool:
        """Whether it was cancelled or has failed: what it brought may be overwritten soon."""
        return self._giving_up

    @property
    def loads_under_way(self) -> bool:
        """Whether reads are under way that were not dropped."""
        return len(self._reads) > 0

    @property
    def loads_under_way_s(self) -> float:
        """Seconds of the link that its reads under way take."""
        return self._state.expected_load_s()

    @property
    def only_compute_left(self) -> bool:
        """Whether what is missing can only be recomputed: no read is under way, and none will be ordered."""
        return not (self._reads or self._state.loads_possible or self._state.boundary.claims_possible)

    @property
    def limit(self) -> int:
        """From this chunk on nothing is restored any more; the number of chunks while nothing is lost."""
        return self._reads.chunk_limit

    @property
    def state(self) -> RestoreState:
        """The state machine; whoever asks it anything must not change it."""
        return self._state

    @property
    def settled(self) -> bool:
        """Whether nothing is left to order: all is resident, or all before the first chunk that cannot be restored."""
        return self._closing or self._giving_up or self.restored or self._at_limit()

    def resident_tokens(self) -> int:
        """Token position up to which the prefix is completely resident on every rank, as far as reports tell."""
        pending = {
            *self._computes.cells_under_way(),
            *(cell for unit in self._units for cell in unit.order.tile.cells()),
        }
        grid, reached = self._state.problem.grid, self.target.start
        if self._undefined:
            return reached
        for chunk, end in enumerate(self.target.chunk_ends):
            cells = [(chunk, block) for block in range(grid.num_blocks)]
            if any(cell in pending or self._state.cell(*cell) not in RESIDENT for cell in cells):
                break
            reached = end
        return reached

    def cancel(self) -> None:
        """Give the restoration up; the next orders tell the workers, unless they were told to finish."""
        self._giving_up = True

    def stop_before(self, chunk: int) -> None:
        """Restore nothing from a chunk on: another stage has lost it."""
        self._state.boundary.stop_before(chunk)
        self._reads.limit(chunk)

    def fail(self) -> None:
        """Give the restoration up because another stage has failed, or because what it brings may not be used."""
        self._failed = self._failed or not self._giving_up
        self._giving_up = True

    def close_link(self) -> None:
        """Order no more reads; what is under way may still arrive, compute restores the rest."""
        self._state.close_link()

    def next_work(self, now_s: float, *, compute_budget_s: float, read_ahead_s: float) -> StageWork:
        """What the workers do in this step; what it claims counts as ordered, so it must be sent.

        Args:
            now_s: Seconds on the caller's clock.
            compute_budget_s: Seconds of compute to order, by prediction: 0 for none; otherwise at least one unit if
                there is one, and never more than the budget beyond that; ``inf`` for all there is.
            read_ahead_s: Seconds of the link to keep under way: 0 for no further reads, otherwise at least
                ``MIN_READS``.
        """
        if self._start_s is None:
            self._start_s = now_s
        restore_id = self.target.restore_id
        if self._closing:
            return StageWork(restore_id=restore_id)
        compute: tuple[ComputeWork, ...] = ()
        reads: tuple[ReadWork, ...] = ()
        if not self._giving_up:
            # Compute first: a read ordered in this step must not be dropped in it, drops are carried out before reads.
            compute = self._order_compute(now_s, compute_budget_s)
            reads = self._reads.next_reads(now_s, read_ahead_s)
            self._give_up_at_limit(read_ahead_s)
        if self._giving_up:
            self._closing = self._told_cancel = True
            return StageWork(restore_id=restore_id, cancel=True)
        self._closing = self.restored
        return StageWork(
            restore_id=restore_id,
            drops=self._reads.take_drops(),
            reads=reads,
            compute=compute,
            finish=self._closing,
        )

    def _give_up_at_limit(self, read_ahead_s: float) -> None:
        """Fail once nothing more can be restored: of a stage that may only load, or has lost boundary states."""
        if self._state.restored or self.loads_under_way or not self.may_give_up:
            return
        its_turn = read_ahead_s > 0 or not self._state.loads_possible
        if self._at_limit() if self._can_compute else its_turn:
            self._failed = self._giving_up = True

    def _at_limit(self) -> bool:
        """Whether all that can be restored is, as far as reports tell, and something else cannot."""
        if self.loads_under_way or self._state.restored:
            return False
        if not self._can_compute and not self._state.loads_possible:
            return True
        limit = self.limit
        if limit == self._state.problem.grid.num_chunks or self._units or self._computes.under_way:
            return False
        blocks = range(self._state.problem.grid.num_blocks)
        return all(self._state.cell(chunk, block) in RESIDENT for chunk in range(limit) for block in blocks)

    def _order_compute(self, now_s: float, budget_s: float) -> tuple[ComputeWork, ...]:
        self.waiting = False
        if budget_s <= 0 or not self._can_compute:
            return ()
        if len(self._reads) or self._state.loads_possible:
            budget_s = min(budget_s, REST_SHARE * self._state.expected_left_s(now_s))
        units: list[Unit] = []
        spent_s, factor = 0.0, self._state.rates.compute_factor
        while self._units or self._claim(now_s):
            unit = self._next_unit()
            seconds = unit.predicted_s * factor
            if units and spent_s + seconds > budget_s:
                break
            self._units.popleft()
            units.append(unit)
            spent_s += seconds
        self.waiting = not units and not self._state.restored
        joined = join(units)
        for unit in joined:
            self._computes.add(unit.order, unit.predicted_s)
        return tuple(unit.order for unit in joined)

    def _next_unit(self) -> Unit:
        unit, problem = self._units[0], self._state.problem
        at_top = unit.order.tile.block_hi == problem.grid.num_blocks
        return handed_on(unit, problem) if at_top and self.wanted_above(unit.order.tile.chunk_lo) else unit

    def _claim(self, now_s: float) -> bool:
        """Claim the next tile for compute and cut it into units."""
        claim = self._state.claim_compute(now_s)
        if claim.tile is None:
            return False
        self._reads.drop(claim.tile.cells())
        self._state.assume_compute(claim, now_s)
        self._units.extend(cut(claim, self._state.problem))
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
        if self._end_s is None and len(self._finished) >= self._num_ranks:
            self._end_s = now_s

    def _take_compute(self, rank: int, report: ComputeReport, now_s: float) -> None:
        for done in self._computes.take(rank, report):
            self._state.note_computed(now_s, predicted_s=done.predicted_s, actual_s=done.actual_s)
            self._spans.append(compute_span(done))
        if report.error and not self.done:
            self.error = self.error or report.error
            self._failed = self._failed or not self._giving_up
            self._giving_up = True
            # A device may report late, at the end, what failed anywhere: then no cell is known to be good.
            self._undefined = self._undefined or (self._closing and not self._told_cancel)
            self._closing = self._told_cancel

    def report(self, now_s: float, *, planning_s: float = 0.0) -> RestoreReport:
        """What was planned and what came of it so far; spans are on the clock of the slowest worker.

        Args:
            now_s: Seconds on the caller's clock, for a restoration that has not ended.
            planning_s: Seconds the plan took.
        """
        start_s = now_s if self._start_s is None else self._start_s
        restore_s = (now_s if self._end_s is None else self._end_s) - start_s
        return restoration_report(self._state, restore_s=restore_s, spans=self._spans, planning_s=planning_s)
