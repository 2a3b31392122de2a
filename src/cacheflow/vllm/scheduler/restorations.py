"""The restorations under way in one engine: shares each step's budget among them, closes links in time, counts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cacheflow.plan.report import RestoreReport, SpanKind
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.restore.pipeline import PipelineRestoration, PipelineWork
from cacheflow.restore.work import RestoreTarget, StageWork, StepReport
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.restoration import RestoreState
from cacheflow.types import Clock, LoadOutcome
from cacheflow.vllm.adapters import AdapterVersion
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.options import ServingOptions
from cacheflow.vllm.scheduler.decide import Decider, Decision
from cacheflow.vllm.scheduler.explain import overlap, record_of
from cacheflow.vllm.scheduler.pace import StepBudget, StepPace
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.scheduler.sharing import NO_LEADER, LeaderShare, Wanted, find_leader
from cacheflow.vllm.scheduler.view import TargetStates
from cacheflow.vllm.step import SaveWork, StepWork

logger = logging.getLogger(__name__)


class RestorationOutcome(Enum):
    """How a restoration ended."""

    DONE = "done"
    """All that was planned is there."""
    FAILED = "failed"
    """vLLM computes what is missing."""
    CANCELLED = "cancelled"
    """The request ended first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRestoration:
    """A restoration that has ended before its request.

    Attributes:
        request_id: The request it served.
        outcome: How it ended.
        record: What a response says of it.
        lost_chunk: The request's first chunk of which something could not be read; None when all could.
    """

    request_id: str
    outcome: RestorationOutcome
    record: dict[str, Any]
    lost_chunk: int | None


@dataclass(slots=True, kw_only=True)
class _Active:
    """One restoration under way.

    Attributes:
        restoration: The restoration.
        request_id: The request it serves.
        adapter: The request's; None without one.
        decision: What was decided.
        began_s: When.
        abandoned: The request has ended; nobody waits for it any more.
        timed_out: Its link was closed because it has taken too long.
        stalled: Neither compute nor the link had anything to do for it in the last step.
        discarded: Why nothing that it restored may be used; empty while that is not so.
    """

    restoration: PipelineRestoration
    request_id: str
    adapter: AdapterVersion | None
    decision: Decision
    began_s: float
    abandoned: bool = False
    timed_out: bool = False
    stalled: bool = False
    discarded: str = ""


class Restorations:
    """The restoration that the batch policy ranks first takes what it can of a step's budget, the next the rest."""

    def __init__(
        self, options: ServingOptions, decider: Decider, *, ranks_per_stage: int, clock: Clock, counts: Counts
    ) -> None:
        self._options, self._decider, self._counts, self._clock = options, decider, counts, clock
        self._ranks_per_stage = ranks_per_stage
        self._pace = StepPace(recompute_budget_ms=options.recompute_budget_ms, itl_slo_ms=options.itl_slo_ms)
        self._ranker = BatchScheduler(
            make_batch_policy(options.objective, make_policy(options.policy)),
            decider.rates,
            starvation_s=options.starvation_s,
        )
        self._active: dict[int, _Active] = {}
        self._new: list[_Active] = []
        self._ids = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._active

    def restoring(self, request_id: str) -> bool:
        """Whether a request's restoration is under way."""
        return self._of(request_id) is not None

    def _of(self, request_id: str) -> _Active | None:
        of_request = (each for each in self._active.values() if each.request_id == request_id and not each.abandoned)
        return next(of_request, None)

    def shared(self, request: TrackedRequest, decision: Decision) -> LeaderShare:
        """What to do about chunks that other restorations are restoring."""
        if not self._active:
            return NO_LEADER
        chunk_tokens = self._options.chunk_tokens
        wanted = Wanted(
            start=decision.start,
            namespace=request.name.namespace,
            chain_hashes=request.prefix.chain_hashes(decision.start // chunk_tokens, decision.end // chunk_tokens),
        )
        others = (
            (active.restoration.target, active.restoration.resident_tokens)
            for active in self._active.values()
            if not (active.restoration.done or active.restoration.giving_up)
        )
        return find_leader(wanted, others, chunk_tokens=chunk_tokens, block_size=self._decider.facts.block_size,
            copies=not self._decider.recurrent,
        )  # fmt: skip

    def start(
        self, request: TrackedRequest, decision: Decision, block_ids: Sequence[int], target_states: TargetStates
    ) -> None:
        """Begin a restoration into blocks that vLLM has set aside."""
        slowest = decision.slowest_stage
        assert slowest is not None, "a decision to restore has a plan for every stage"
        chunk_tokens = self._options.chunk_tokens
        grid, facts = slowest.problem.grid, self._decider.facts
        first = grid.start // chunk_tokens
        target = RestoreTarget(
            restore_id=next(self._ids),
            request_id=request.view.request_id,
            start=grid.start,
            object_start=first * chunk_tokens,
            chunk_ends=grid.chunk_ends,
            tokens=tuple(request.view.tokens[grid.start : decision.end]),
            next_token=request.view.tokens[decision.end],
            block_ids=tuple(block_ids[: decision.end // facts.block_size]),
            namespace=request.name.namespace,
            chain_hashes=request.prefix.chain_hashes(first, decision.end // chunk_tokens),
            layers_per_block=self._decider.layers_per_block,
            copied_from=decision.copied_from,
            state_blocks=target_states.blocks,
            start_states=target_states.start if decision.can_compute else (),
        )
        states = [
            RestoreState(stage.problem, stage.plan, planner.rates, source=stage.source)
            for stage, planner in zip(decision.stages, self._decider.stages, strict=True)
        ]
        restoration = PipelineRestoration(
            target, states, ranks_per_stage=self._ranks_per_stage, can_compute=decision.can_compute
        )
        now_s, slo_ms = self._clock(), self._options.ttft_slo_ms
        active = _Active(
            restoration=restoration,
            request_id=request.view.request_id,
            adapter=request.name.adapter,
            decision=decision,
            began_s=now_s,
        )
        self._active[target.restore_id] = active
        self._ranker.adopt(
            target.restore_id,
            states[decision.stages.index(slowest)],
            arrival_s=now_s,
            first_token_due_s=None if slo_ms is None else now_s + slo_ms * 1e-3,
        )
        self._new.append(active)
        if slowest.plan.guard is not None:
            self._counts.guard[slowest.plan.guard.choice.value] += 1

    def cancel(self, request_id: str) -> dict[str, Any] | None:
        """Give the restoration of a request that has ended up; the workers learn it with the next step.

        Returns:
            Its record, which ends here; None where nothing is under way.
        """
        if (active := self._of(request_id)) is None:
            return None
        active.restoration.cancel()
        active.abandoned = True
        now_s = self._clock()
        report = active.restoration.report(now_s, planning_s=active.decision.planning_s)
        return self._record(active, report, RestorationOutcome.CANCELLED, now_s)

    def _record(
        self, active: _Active, report: RestoreReport, outcome: RestorationOutcome, now_s: float
    ) -> dict[str, Any]:
        error = active.discarded or active.restoration.error
        return record_of(active.decision, active.restoration, report, outcome=outcome.value, error=error, now_s=now_s)

    def discard(self, reason: str, restore_id: int | None = None) -> None:
        """Give up a restoration that a worker refused, or all that can still be given up.

        vLLM then computes everything that was to be restored, whatever came of it. One that the workers already finish
        is left alone; a worker that refuses one has reported its blocks as failed itself.
        """
        if restore_id is None:
            chosen = [active for active in self._active.values() if not active.restoration.end_was_sent]
        else:
            chosen = [self._active[each] for each in {restore_id} & self._active.keys()]
        for active in chosen:
            active.discarded = active.discarded or reason
            active.restoration.fail()

    def step(self, saves: tuple[SaveWork, ...], *, busy: bool) -> StepWork:
        """One step's work."""
        if not self._active:
            return StepWork(saves=saves)
        now_s = self._clock()
        budget = self._budget(now_s, busy=busy)
        compute_s, read_ahead_s, spent_s = budget.compute_s, budget.read_ahead_s, 0.0
        by_stage: list[list[StageWork]] = [[] for _ in self._decider.stages]
        failed_blocks = {}
        ranking = self._ranker.ranking(now_s)
        # Of the link's ranking only the head is used: the first that may still read. Who comes after it by compute's
        # ranking reads what of the step's read-ahead it leaves.
        reader = next((each for each in ranking.link if not self._active[each].restoration.only_compute_left), None)
        reads = False
        for restore_id in ranking.compute:
            active = self._active[restore_id]
            # Nobody waits for ever, whatever the budget: what only compute can restore goes on by a unit a step.
            # So does what the link leaves to compute, when both have stood still for a step.
            timed_out = self._close_link_if_timed_out(active, now_s)
            must_progress = timed_out or active.restoration.only_compute_left or active.stalled
            reads = reads or restore_id == reader
            work = active.restoration.next_work(
                now_s,
                compute_budget_s=compute_s,
                read_ahead_s=read_ahead_s if reads else 0.0,
                must_progress=must_progress,
            )
            works = any(each.compute or each.reads for each in work.by_stage)
            active.stalled = restore_id == reader and not (works or active.restoration.loads_under_way)
            spent_s += self._predicted_s(active, work)
            compute_s = budget.left_s(spent_s)
            read_ahead_s = max(0.0, read_ahead_s - active.restoration.loads_under_way_s)
            if work.cancel and active.restoration.failed:
                failed_blocks[restore_id] = self._undefined_blocks(active)
            for stage, each in zip(by_stage, work.by_stage, strict=True):
                if not each.idle:
                    stage.append(each)
        new, self._new = self._new, []
        return StepWork(
            targets=tuple(each.restoration.target for each in new),
            by_stage=tuple(map(tuple, by_stage)),
            failed_blocks=failed_blocks,
            saves=saves,
            wait_s=budget.wait_s,
            adapters={each.restoration.target.restore_id: each.adapter for each in new if each.adapter is not None},
        )

    def _budget(self, now_s: float, *, busy: bool) -> StepBudget:
        """The step's budget, by the costs of the first restoration."""
        first = next(iter(self._active.values()))
        assert first.decision.slowest_stage is not None, "a restoration has a problem"
        compute_KB, factor = first.decision.slowest_stage.problem.compute_KB, self._decider.rates.compute_factor
        return self._pace.budget(
            now_s,
            busy=busy,
            chunk_s=float(compute_KB.sum(axis=1).mean()) * factor,
            unit_s=float(compute_KB.mean()) * factor,
        )

    def _close_link_if_timed_out(self, active: _Active, now_s: float) -> bool:
        """Close the link of a restoration that has taken ``restore_timeout_s``; whether it has."""
        elapsed_s = now_s - active.began_s
        if elapsed_s <= self._options.restore_timeout_s:
            return False
        if not active.timed_out:
            active.timed_out = True
            active.restoration.close_link()
            logger.warning(
                "request %s: restoring %d tokens has taken %.1f s (restore_timeout_s is %g): loading stops, the "
                "rest is recomputed",
                active.request_id, active.decision.num_tokens, elapsed_s,
                self._options.restore_timeout_s,
            )  # fmt: skip
        return True

    def _predicted_s(self, active: _Active, work: PipelineWork) -> float:
        """Of the stage that has most to compute: stages work side by side."""
        return max(
            planner.rates.compute_factor
            * sum(
                float(stage.problem.compute_KB[each.tile.chunk_lo, each.tile.block_lo : each.tile.block_hi].sum())
                for each in given.compute
            )
            for planner, stage, given in zip(self._decider.stages, active.decision.stages, work.by_stage, strict=True)
        )

    def _undefined_blocks(self, active: _Active) -> tuple[int, ...]:
        if active.discarded:
            return active.restoration.target.block_ids[active.decision.start // self._decider.facts.block_size :]
        first = active.restoration.resident_tokens() // self._decider.facts.block_size
        return active.restoration.target.block_ids[first:]

    def apply(self, report: StepReport) -> list[EndedRestoration]:
        """Take in what the workers did; those that every rank has finished and whose request still waits for them."""
        now_s, ended = self._clock(), []
        # Ranks compute side by side: the step lasted as long as the slowest of them.
        self._pace.note_computed(
            max((sum(sum(each.seconds) for each in rank.computes) for rank in report.by_rank.values()), default=0.0)
        )
        for restore_id, active in list(self._active.items()):
            active.restoration.apply(report, now_s)
            if active.restoration.done:
                del self._active[restore_id]
                self._ranker.remove(restore_id)
                end = self._end(active, now_s)
                if not active.abandoned:
                    ended.append(end)
        if not self._active:
            self._pace.rest()
        return ended

    def _end(self, active: _Active, now_s: float) -> EndedRestoration:
        restoration = active.restoration
        report = restoration.report(now_s, planning_s=active.decision.planning_s)
        outcome = RestorationOutcome.CANCELLED
        if restoration.failed or restoration.restored:
            outcome = RestorationOutcome.FAILED if restoration.failed else RestorationOutcome.DONE
        record = self._record(active, report, outcome, now_s)
        self._counts.restorations[outcome.value] += 1
        self._counts.link_bytes_per_s = min(stage.rates.bytes_per_s for stage in self._decider.stages)
        self._count_cells(active, report, cancelled=outcome is RestorationOutcome.CANCELLED)
        if outcome is RestorationOutcome.FAILED:
            logger.warning(
                "request %s: restored up to token %d of %d, vLLM computes the rest%s",
                active.request_id,
                active.decision.start if active.discarded else restoration.resident_tokens(),
                active.decision.end, f" ({record['error']})" if record["error"] else "",
            )  # fmt: skip
        elif outcome is RestorationOutcome.DONE:
            self._counts.restore_s.append(report.restore_s)
            if record["bound_restore_s"] > 0:
                self._counts.bound_ratio.append(report.restore_s / record["bound_restore_s"])
            self._counts.overlap.append(overlap(report))
        failed_chunks = [span.chunk for span in report.spans if span.kind is SpanKind.FAILED]
        first = restoration.target.object_start // self._options.chunk_tokens
        lost = first + min(failed_chunks) if failed_chunks else None
        return EndedRestoration(request_id=active.request_id, outcome=outcome, record=record, lost_chunk=lost)

    def _count_cells(self, active: _Active, report: RestoreReport, *, cancelled: bool) -> None:
        """Cells as tokens: a cell is its chunk's tokens times its share of the layers."""
        tokens, num_blocks = self._counts.tokens, self._decider.num_blocks
        for chunk, letters in enumerate(report.cells_KB):
            start, end = active.restoration.target.chunk_range(chunk)
            for name, letter in (("recomputed", "c"), ("loaded", "l")):
                if count := letters.count(letter):
                    tokens[name] += (end - start) * count / num_blocks
        per_cell = self._options.chunk_tokens / num_blocks
        for load_outcome, count in report.failed_loads.items():
            # Dropped reads are compute's gain, unless nobody waits for the restoration any more.
            if load_outcome != LoadOutcome.CANCELLED.value:
                tokens["late" if load_outcome == LoadOutcome.LATE.value else "failed"] += count * per_cell
            elif not cancelled:
                tokens["late"] += count * per_cell
        if report.wasted_bytes:
            bytes_per_token = sum(stage.facts.shape.kv_bytes_per_token for stage in self._decider.stages)
            tokens["wasted"] += report.wasted_bytes / bytes_per_token
        self._counts.loaded_bytes += report.loaded_bytes
