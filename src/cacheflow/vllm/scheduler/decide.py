"""Whether and how a request's missing prefix is restored; pure but for the clock that times the planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.stage_sources import StageTimes, sooner, times_of
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.load import Load
from cacheflow.policies.registry import make_policy
from cacheflow.policies.stages import plan_stages
from cacheflow.policies.step_overhead import STEP_OVERHEAD_S, why_prefill
from cacheflow.types import Clock
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.options import ServingOptions
from cacheflow.vllm.scheduler.lookup import StoreQuestion
from cacheflow.vllm.scheduler.request_params import Mode, RequestParams
from cacheflow.vllm.scheduler.sharing import LeaderShare
from cacheflow.vllm.scheduler.stage_planner import PlanSpan, StagePlan, StagePlanner


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a prefix is to be restored, for one state of the local prefix cache.

    Attributes:
        start: Tokens that are in the KV cache already.
        end: Tokens that will be there after the restoration; equals ``start`` when nothing is restored.
        stages: A plan for each pipeline stage, bottom first; none when nothing is restored, and none was considered.
        planning_s: Seconds the plan took.
        copied_from: KV blocks of another restoration that hold the tokens after ``start``; they are copied, the rest
            is restored.
        can_compute: What the store loses can be recomputed; False where an image or a sound is among the tokens, and in
            a model with recurrent layers where their states at ``start`` are not to be had.
        reason: Why nothing is restored; empty when something is.
        has_start_states: The running states at ``start`` were there when it was decided.
    """

    start: int
    end: int
    stages: tuple[StagePlan, ...] = ()
    planning_s: float = 0.0
    copied_from: tuple[int, ...] = ()
    can_compute: bool = True
    reason: str = ""
    has_start_states: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens to restore."""
        return self.end - self.start

    @property
    def slowest_stage(self) -> StagePlan | None:
        """The stage that is predicted to take longest; None without stages."""
        return max(self.stages, key=lambda stage: stage.plan.predicted.restore_s, default=None)


class Decider:
    """Plans restorations with the costs of one engine.

    Attributes:
        stages: Its pipeline stages, bottom first.
        policy: Splits the work, unless a request asks for loading alone.
    """

    def __init__(
        self,
        facts_by_stage: Sequence[EngineFacts],
        options: ServingOptions,
        *,
        clock: Clock,
        tier_rates: Callable[[], tuple[float | None, ...]] = tuple,
    ) -> None:
        """Plan for stages, each with the facts of its slowest rank.

        Args:
            facts_by_stage: Bottom stage first.
            options: The connector's.
            clock: Times the planning.
            tier_rates: Says the bandwidth of each tier of the store now.

        Raises:
            UnknownPolicyError: There is no such policy.
        """
        self.stages = [StagePlanner(facts) for facts in facts_by_stage]
        self._options, self._clock, self._tier_rates = options, clock, tier_rates
        self.can_compute = all(facts.costs is not None for facts in facts_by_stage)
        self.policy: RestorePolicy = make_policy(options.policy) if self.can_compute else Load()
        self._guarded = options.policy == "cacheflow" and self.can_compute
        self._max_tokens = min(stage.measured_tokens for stage in self.stages)

    @property
    def facts(self) -> EngineFacts:
        """The first stage's; block and chunk sizes are the same everywhere."""
        return self.stages[0].facts

    @property
    def rates(self) -> LiveRates:
        """What compute and the link of the first stage were seen to do."""
        return self.stages[0].rates

    @property
    def recurrent(self) -> bool:
        """Whether the model has recurrent layers."""
        return any(stage.facts.recurrent for stage in self.stages)

    @property
    def num_blocks(self) -> int:
        """Rows of the grids of all stages together."""
        return sum(stage.facts.num_blocks for stage in self.stages)

    @property
    def layers_per_block(self) -> int:
        """Layers of one row; in a compiled engine a row is a stage, and the largest decides."""
        return max(stage.facts.layers_per_block for stage in self.stages)

    def after_copy(self, decision: Decision, shared: LeaderShare) -> Decision:
        """The decision to copy what another restoration has restored already, and to restore only the rest."""
        began_s = self._clock()
        slowest = decision.slowest_stage
        policy = Load() if slowest is not None and slowest.plan.policy == Load.name else self.policy
        sources = [stage.source for stage in decision.stages]
        return replace(
            decision,
            stages=self._plans(policy, self._span(shared.end, decision.end), sources),
            planning_s=self._clock() - began_s,
            copied_from=shared.source_blocks,
        )

    def decide(
        self,
        params: RequestParams,
        stored: StoreQuestion,
        *,
        start: int,
        num_tokens: int,
        num_text_tokens: int | None = None,
        has_start_states: bool = True,
    ) -> Decision:
        """How to restore a request whose first ``start`` tokens are in the KV cache.

        Args:
            params: What the request asked for.
            stored: What the store holds of it.
            start: Tokens vLLM's prefix cache holds, a multiple of the block size.
            num_tokens: Tokens of the request; the last is always computed, for its logits.
            num_text_tokens: Leading tokens that can be recomputed; None where all can.
            has_start_states: The running states at ``start`` are there, in a model with recurrent layers.

        Raises:
            CostRangeError: A chunk lies outside the measured range.
        """
        end = self._end(params, stored, start=start, num_tokens=num_tokens)
        if params.mode in (Mode.OFF, Mode.RECOMPUTE):
            return Decision(start=start, end=start, reason=f"the request asked for {params.mode.value!r}")
        if end <= start:
            without = (
                ""
                if stored.checkpoints is None
                else f"; running states are stored at the end of {len(stored.checkpoints)} chunks"
            )
            reason = (
                f"nothing to restore: of {num_tokens} tokens {start} are in the KV cache, the store holds "
                f"{stored.num_stored * self._options.chunk_tokens} that this engine may use (the log says at start how "
                f"many objects are its own), and {end} may be restored{without}"
            )
            return Decision(start=start, end=start, reason=reason)
        began_s = self._clock()
        can_compute = self.can_compute and (num_text_tokens is None or end <= num_text_tokens) and has_start_states
        policy = self.policy if can_compute and params.mode is not Mode.LOAD else Load()
        span = self._span(start, end, num_tokens)
        if rates := stored.tiers and self._rates_of_tiers():
            chunks = slice(start // span.chunk_tokens, end // span.chunk_tokens)
            span = replace(span, tiers=stored.tiers[chunks], tier_rates=rates)
        stages = self._plans(policy, span, self._sources(stored.num_boundaries, span))
        if self._guarded and params.mode is Mode.AUTO and (reason := self._why_prefill(stages)):
            # vLLM's own prefill recomputes at least as fast, and batches with what else there is.
            return Decision(start=start, end=start, stages=stages, reason=reason)
        planning_s = self._clock() - began_s
        return Decision(start=start, end=end, stages=stages, planning_s=planning_s, can_compute=can_compute)

    def _end(self, params: RequestParams, stored: StoreQuestion, *, start: int, num_tokens: int) -> int:
        chunk_tokens = self._options.chunk_tokens
        limits = [stored.num_stored * chunk_tokens, num_tokens - 1, self._max_tokens]
        limits += [
            start + limit for limit in (self._options.max_load_tokens, params.max_load_tokens) if limit is not None
        ]
        num_chunks = min(limits) // chunk_tokens
        if stored.checkpoints is None:
            return num_chunks * chunk_tokens
        # vLLM goes on from the running states: they must be stored where the restored prefix ends.
        return max((chunk + 1 for chunk in stored.checkpoints if chunk < num_chunks), default=0) * chunk_tokens

    def _span(self, start: int, end: int, num_tokens: int | None = None) -> PlanSpan:
        # Stages prefill one after the other: what that takes is not the sum of what each of them plans for itself.
        alone = num_tokens if len(self.stages) == 1 else None
        return PlanSpan(start=start, end=end, chunk_tokens=self._options.chunk_tokens, num_tokens=alone)

    def _rates_of_tiers(self) -> tuple[float | None, ...]:
        """As seen lately in this process, which reads nothing where workers are others; then as measured there."""
        seen = self._tier_rates()
        measured = self.facts.tier_rates or (None,) * len(seen)
        return tuple(measured[number] if each is None else each for number, each in enumerate(seen))

    def _sources(self, num_boundaries: Sequence[int], span: PlanSpan) -> list[BoundarySource]:
        """Where each stage's activations come from, bottom stage first: the way that is faster, of those there are."""
        if len(self.stages) == 1:
            return [BoundarySource.FIRST_STAGE]
        first_chunk = span.start // span.chunk_tokens
        num_stored = (0, *num_boundaries, *([0] * len(self.stages)))
        sources: list[BoundarySource] = []
        times: StageTimes | None = None
        for stage, num in zip(self.stages, num_stored, strict=False):
            left = max(0, num - first_chunk)
            problem = stage.corrected(stage.problem(span, stored=left > 0))
            ways = {
                source: times_of(problem, source, below=times, num_boundaries=left)
                for source in stage.sources(num_boundaries=left, below=sources[-1] if sources else None)
            }
            sources.append(sooner(ways))
            times = ways[sources[-1]]
        return sources

    def _plans(self, policy: RestorePolicy, span: PlanSpan, sources: Sequence[BoundarySource]) -> tuple[StagePlan, ...]:
        problems = [
            stage.problem(span, stored=source is BoundarySource.STORED)
            for stage, source in zip(self.stages, sources, strict=True)
        ]
        corrected = [stage.corrected(problem) for stage, problem in zip(self.stages, problems, strict=True)]
        return tuple(
            StagePlan(problem=problem, plan=plan, source=source)
            for problem, plan, source in zip(problems, plan_stages(policy, corrected, sources), sources, strict=True)
        )

    def _why_prefill(self, plans: Sequence[StagePlan]) -> str:
        """Why vLLM's own prefill is to compute the prompt; empty when restoring pays."""
        if len(plans) == 1 and plans[0].plan.guard is not None:
            return why_prefill(plans[0].plan)
        restore_s = max(each.plan.predicted.restore_s for each in plans) + STEP_OVERHEAD_S
        each_s = [stage.recompute_s(plan) for stage, plan in zip(self.stages, plans, strict=True)]
        # Chunks follow each other through the stages: all of them take the slowest stage's time, the last chunk the
        # other stages' too.
        fill_s = (sum(each_s) - max(each_s)) / plans[0].problem.grid.num_chunks
        recompute_s = max(each_s) + fill_s
        if restore_s <= recompute_s:
            return ""
        on_stages = f" on {len(plans)} pipeline stages" if len(plans) > 1 else ""
        return (
            f"restoring takes {restore_s * 1e3:.0f} ms by prediction{on_stages}, vLLM's own prefill "
            f"{recompute_s * 1e3:.0f} ms"
        )
