"""The restorations under way in one engine: shares each step's budget among them, watches their deadlines, counts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.restore.pipeline import PipelineRestoration, PipelineWork
from cacheflow.restore.work import RestoreTarget, StageWork, StepReport
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.report import RestoreReport, SpanKind
from cacheflow.state.restoration import RestoreState
from cacheflow.types import Clock, LoadOutcome
from cacheflow.vllm.adapters import AdapterClaim
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.decide import Decider
from cacheflow.vllm.scheduler.pace import Pace, StepBudget
from cacheflow.vllm.scheduler.request import Decision, TrackedRequest
from cacheflow.vllm.scheduler.restoration_record import overlap, record_of
from cacheflow.vllm.scheduler.sharing import NOTHING_SHARED, Shared, Wanted, find_shared
from cacheflow.vllm.step import SaveWork, StepWork

logger = logging.getLogger(__name__)

LEAST_BUDGET_S = 1e-9
"""Orders one unit of compute."""


class _Active:
    """One restoration under way, with the request it serves."""

    __slots__ = ("decision", "discarded", "request", "stalled", "stepped", "timed_out")

    def __init__(self, stepped: PipelineRestoration, request: TrackedRequest, decision: Decision) -> None:
        self.stepped, self.request, self.decision = stepped, request, decision
        self.timed_out = False
        self.stalled = False
        self.discarded = ""
        """Why nothing that it brings may be used; empty while that is not so."""


class Restorations:
    """Who is first by the batch policy takes what it can of a step's budget, the next the rest."""

    def __init__(
        self, options: ConnectorOptions, decider: Decider, *, ranks_per_stage: int, clock: Clock, counts: Counts
    ) -> None:
        """Start with none."""
        self._options, self._decider, self._counts, self._clock = options, decider, counts, clock
        self._ranks_per_stage = ranks_per_stage
        self._pace = Pace(recompute_budget_ms=options.recompute_budget_ms, itl_slo_ms=options.itl_slo_ms)
        self._scheduler = BatchScheduler(
            make_batch_policy(options.objective, make_policy(options.policy)),
            decider.rates,
            starvation_s=options.starvation_s,
        )
        self._active: dict[int, _Active] = {}
        self._began_s: dict[int, float] = {}
        self._new: list[RestoreTarget] = []
        self._adapters: dict[int, AdapterClaim] = {}
        self._ids = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._active

    def shared(self, request: TrackedRequest, decision: Decision) -> Shared:
        """What to do about chunks that other restorations are bringing."""
        if not self._active:
            return NOTHING_SHARED
        chunk_tokens = self._options.chunk_tokens
        hashes = request.prefix.hashes[decision.start // chunk_tokens : decision.end // chunk_tokens]
        wanted = Wanted(
            start=decision.start,
            namespace=request.prefix.namespace,
            chain_hashes=tuple(value.hex() for value in hashes),
        )
        others = (
            (active.stepped.target, active.stepped.resident_tokens)
            for active in self._active.values()
            if not (active.stepped.done or active.stepped.giving_up)
        )
        return find_shared(wanted, others, chunk_tokens=chunk_tokens, block_size=self._decider.facts.block_size)

    def start(self, request: TrackedRequest, decision: Decision, block_ids: Sequence[int]) -> None:
        """Begin a restoration into blocks that vLLM has set aside."""
        slowest = decision.slowest
        assert slowest is not None, "a decision to restore has a plan for every stage"
        chunk_tokens = self._options.chunk_tokens
        grid, facts = slowest.problem.grid, self._decider.facts
        first = grid.start // chunk_tokens
        target = RestoreTarget(
            restore_id=next(self._ids),
            request_id=request.request_id,
            start=grid.start,
            object_start=first * chunk_tokens,
            chunk_ends=grid.chunk_ends,
            tokens=tuple(request.tokens[grid.start : decision.end]),
            block_ids=tuple(block_ids[: decision.end // facts.block_size]),
            namespace=request.prefix.namespace,
            chain_hashes=tuple(value.hex() for value in request.prefix.hashes[first : decision.end // chunk_tokens]),
            layers_per_block=self._decider.layers_per_block,
            copied_from=decision.copied_from,
        )
        states = [
            RestoreState(stage.problem, stage.plan, planner.rates, source=stage.source)
            for stage, planner in zip(decision.stages, self._decider.stages, strict=True)
        ]
        stepped = PipelineRestoration(
            target, states, ranks_per_stage=self._ranks_per_stage, can_compute=self._decider.can_compute
        )
        request.restoration = stepped
        now_s, slo_ms = self._clock(), self._options.ttft_slo_ms
        self._active[target.restore_id] = _Active(stepped, request, decision)
        self._began_s[target.restore_id] = now_s
        self._scheduler.adopt(
            target.restore_id,
            states[decision.stages.index(slowest)],
            arrival_s=now_s,
            deadline_s=None if slo_ms is None else now_s + slo_ms * 1e-3,
        )
        self._new.append(target)
        if request.claim is not None:
            self._adapters[target.restore_id] = request.claim
        if slowest.plan.guard is not None:
            self._counts.guard[slowest.plan.guard.choice.value] += 1

    def cancel(self, request: TrackedRequest) -> None:
        """Give a request's restoration up; the workers are told with the next step, its record ends here."""
        if (stepped := request.restoration) is not None:
            stepped.cancel()
            request.restoration = None
            active = self._active[stepped.target.restore_id]
            now_s = self._clock()
            report = stepped.report(now_s, planning_s=active.decision.planning_s)
            request.records.append(record_of(active.decision, stepped, report, outcome="cancelled", now_s=now_s))

    def discard(self, reason: str, restore_id: int | None = None) -> None:
        """Give up a restoration that a worker refused, or all that can still be given up.

        vLLM then computes everything that was to be restored, whatever came of it. Workers that were told to finish one
        are not told otherwise; a worker that refuses one has reported its blocks as failed itself.
        """
        if restore_id is None:
            chosen = [active for active in self._active.values() if not active.stepped.closing]
        else:
            chosen = [self._active[each] for each in {restore_id} & self._active.keys()]
        for active in chosen:
            active.discarded = active.discarded or reason
            active.stepped.fail()

    def step(self, saves: tuple[SaveWork, ...], *, busy: bool) -> StepWork:
        """Order one step's work."""
        if not self._active:
            return StepWork(saves=saves)
        now_s = self._clock()
        budget = self._budget(now_s, busy=busy)
        compute_s, read_ahead_s, spent_s = budget.compute_s, budget.read_ahead_s, 0.0
        by_stage: list[list[StageWork]] = [[] for _ in self._decider.stages]
        failed_blocks = {}
        ranking = self._scheduler.ranking(now_s)
        reader = next((each for each in ranking.link if not self._active[each].stepped.only_compute_left), None)
        reads = False
        for restore_id in ranking.compute:
            active = self._active[restore_id]
            # Nobody waits for ever, whatever the budget: what only compute can bring goes on by a unit a step.
            # So does what the link leaves to compute, when both have stood still for a step.
            unit = self._watch(active, now_s) or active.stepped.only_compute_left or active.stalled
            least_s = LEAST_BUDGET_S if unit else 0.0
            reads = reads or restore_id == reader
            orders = active.stepped.next_work(
                now_s, compute_budget_s=max(compute_s, least_s), read_ahead_s=read_ahead_s if reads else 0.0
            )
            works = any(each.compute or each.reads for each in orders.by_stage)
            active.stalled = restore_id == reader and not (works or active.stepped.loads_under_way)
            spent_s += self._predicted_s(active, orders)
            compute_s = budget.left_s(spent_s)
            read_ahead_s = max(0.0, read_ahead_s - active.stepped.loads_under_way_s)
            if orders.cancel and active.stepped.failed:
                failed_blocks[restore_id] = self._undefined_blocks(active)
            for stage, each in zip(by_stage, orders.by_stage, strict=True):
                if not each.idle:
                    stage.append(each)
        targets, self._new = tuple(self._new), []
        adapters, self._adapters = self._adapters, {}
        return StepWork(
            targets=targets,
            by_stage=tuple(map(tuple, by_stage)),
            failed_blocks=failed_blocks,
            saves=saves,
            wait_s=budget.wait_s,
            adapters=adapters,
        )

    def _budget(self, now_s: float, *, busy: bool) -> StepBudget:
        """The step's budget, by the costs of the first restoration."""
        first = next(iter(self._active.values()))
        assert first.decision.problem is not None, "a restoration has a problem"
        compute_KB, factor = first.decision.problem.compute_KB, self._decider.rates.compute_factor
        return self._pace.budget(
            now_s,
            busy=busy,
            chunk_s=float(compute_KB.sum(axis=1).mean()) * factor,
            unit_s=float(compute_KB.mean()) * factor,
        )

    def _watch(self, active: _Active, now_s: float) -> bool:
        """Close the link of a restoration past its deadline; whether it is."""
        elapsed_s = now_s - self._began_s[active.stepped.target.restore_id]
        if elapsed_s <= self._options.restore_timeout_s:
            return False
        if not active.timed_out:
            active.timed_out = True
            active.stepped.close_link()
            logger.warning(
                "request %s: restoring %d tokens has taken %.1f s (restore_timeout_s is %g): loading stops, the "
                "rest is recomputed",
                active.request.request_id, active.decision.end - active.decision.start, elapsed_s,
                self._options.restore_timeout_s,
            )  # fmt: skip
        return True

    def _predicted_s(self, active: _Active, orders: PipelineWork) -> float:
        """Of the stage that has most to compute: stages work side by side."""
        return max(
            planner.rates.compute_factor
            * sum(
                float(stage.problem.compute_KB[each.tile.chunk_lo, each.tile.block_lo : each.tile.block_hi].sum())
                for each in given.compute
            )
            for planner, stage, given in zip(self._decider.stages, active.decision.stages, orders.by_stage, strict=True)
        )

    def _undefined_blocks(self, active: _Active) -> tuple[int, ...]:
        if active.discarded:
            return active.stepped.target.block_ids[active.decision.start // self._decider.facts.block_size :]
        first = active.stepped.resident_tokens() // self._decider.facts.block_size
        return active.stepped.target.block_ids[first:]

    def apply(self, report: StepReport) -> None:
        """Take in what the workers did; ends what every rank has finished."""
        now_s = self._clock()
        # Ranks compute side by side: the step lasted as long as the slowest of them.
        self._pace.note_computed(
            max((sum(sum(each.seconds) for each in rank.computes) for rank in report.by_rank.values()), default=0.0)
        )
        for restore_id, active in list(self._active.items()):
            active.stepped.apply(report, now_s)
            if active.stepped.done:
                del self._active[restore_id]
                del self._began_s[restore_id]
                self._scheduler.remove(restore_id)
                self._end(active, now_s)
        if not self._active:
            self._pace.rest()

    def _end(self, active: _Active, now_s: float) -> None:
        stepped, request = active.stepped, active.request
        report = stepped.report(now_s, planning_s=active.decision.planning_s)
        outcome = "failed" if stepped.failed else "done" if stepped.restored else "cancelled"
        error = active.discarded or stepped.error
        record = record_of(active.decision, stepped, report, outcome=outcome, now_s=now_s) | {"error": error}
        if request.restoration is stepped:  # otherwise it was recorded when it was cancelled
            request.restoration = None
            request.records.append(record)
        self._counts.restorations[outcome] += 1
        self._counts.link_bytes_per_s = min(stage.rates.bytes_per_s for stage in self._decider.stages)
        self._count_cells(active, report, cancelled=outcome == "cancelled")
        request.given_up = request.given_up or stepped.failed
        failed_chunks = [span.chunk for span in report.spans if span.kind is SpanKind.FAILED]
        if failed_chunks:
            request.save_again(stepped.target.object_start // self._options.chunk_tokens + min(failed_chunks))
        if outcome != "done":
            request.reason = f"the restoration was {outcome}" + (f": {error}" if error else "")
            if stepped.failed:
                logger.warning(
                    "request %s: restored up to token %d of %d, vLLM computes the rest%s",
                    request.request_id,
                    active.decision.start if active.discarded else stepped.resident_tokens(),
                    active.decision.end, f" ({error})" if error else "",
                )  # fmt: skip
            return
        self._counts.restore_s.append(report.restore_s)
        if record["bound_restore_s"] > 0:
            self._counts.bound_ratio.append(report.restore_s / record["bound_restore_s"])
        self._counts.overlap.append(overlap(report))

    def _count_cells(self, active: _Active, report: RestoreReport, *, cancelled: bool) -> None:
        """Cells as tokens: a cell is its chunk's tokens times its share of the layers."""
        tokens, num_blocks = self._counts.tokens, self._decider.num_blocks
        for chunk, letters in enumerate(report.cells_KB):
            start, end = active.stepped.target.chunk_range(chunk)
            for name, letter in (("recomputed", "c"), ("loaded", "l")):
                if count := letters.count(letter):
                    tokens[name] += (end - start) * count / num_blocks
        per_cell = self._options.chunk_tokens / num_blocks
        for load_outcome, count in report.failed_loads.items():
            # Dropped reads are compute's gain, unless nobody wants the restoration any more.
            if load_outcome != LoadOutcome.CANCELLED.value:
                tokens["late" if load_outcome == LoadOutcome.LATE.value else "failed"] += count * per_cell
            elif not cancelled:
                tokens["late"] += count * per_cell
        if report.wasted_bytes:
            bytes_per_token = sum(stage.facts.shape.kv_bytes_per_token for stage in self._decider.stages)
            tokens["wasted"] += report.wasted_bytes / bytes_per_token
        self._counts.loaded_bytes += report.loaded_bytes
