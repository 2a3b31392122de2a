"""Whether and how a request's missing prefix is restored; pure but for the clock that times the planning."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from cacheflow.errors import CostRangeError
from cacheflow.plan.costs import CostTable, prefill_s
from cacheflow.plan.grid import Grid
from cacheflow.plan.plan import Choice, RestorePlan
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.load import Load
from cacheflow.policies.registry import make_policy
from cacheflow.types import Clock
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.sharing import Shared
from cacheflow.vllm.tracked import Decision, TrackedRequest
from cacheflow.vllm.wishes import Mode

logger = logging.getLogger(__name__)

STEP_OVERHEAD_S = 0.004
"""What a restoration costs beside its work: three engine steps without a forward, each with the engine's own sleep."""


class Decider:
    """Plans restorations with the costs of one engine.

    Attributes:
        facts: What the workers found out at start; the slowest rank's.
        rates: What compute and the link were seen to do; every restoration corrects them.
    """

    def __init__(self, facts: EngineFacts, options: ConnectorOptions, *, clock: Clock) -> None:
        """Make the policy.

        Raises:
            UnknownPolicyError: There is no such policy.
        """
        self.facts = facts
        self.rates = LiveRates(bytes_per_s=facts.link.bytes_per_s)
        self._options, self._clock = options, clock
        self._policy: RestorePolicy = make_policy(options.policy) if facts.costs is not None else Load()
        self._guarded = options.policy == "cacheflow" and facts.costs is not None
        self._max_tokens = _measured_tokens(facts)

    def behind_copy(self, decision: Decision, shared: Shared) -> Decision:
        """The decision to copy what another restoration has brought and to restore only what lies behind it."""
        began_s = self._clock()
        problem = self._problem(shared.end, decision.end)
        policy = Load() if decision.plan is not None and decision.plan.policy == Load.name else self._policy
        return Decision(
            start=decision.start,
            end=decision.end,
            problem=problem,
            plan=policy.plan(self._corrected(problem)),
            planning_s=self._clock() - began_s,
            copied_from=shared.source_blocks,
        )

    def decide(self, request: TrackedRequest, *, start: int, num_tokens: int, num_stored: int) -> Decision:
        """How to restore a request whose first ``start`` tokens are in the KV cache.

        Args:
            request: The request.
            start: Tokens vLLM's prefix cache holds, a multiple of the block size.
            num_tokens: Tokens of the request; the last is always computed, for its logits.
            num_stored: Leading chunks the store holds.
        """
        end = self._end(request, start=start, num_tokens=num_tokens, num_stored=num_stored)
        if request.wishes.mode in (Mode.OFF, Mode.RECOMPUTE):
            return Decision(start=start, end=start, reason=f"the request asked for {request.wishes.mode.value!r}")
        if end <= start:
            reason = (
                f"nothing to restore: of {num_tokens} tokens {start} are in the KV cache, the store holds "
                f"{num_stored * self._options.chunk_tokens}, and {end} may be restored"
            )
            return Decision(start=start, end=start, reason=reason)
        began_s = self._clock()
        try:
            problem = self._problem(start, end, num_tokens=num_tokens)
        except CostRangeError as error:
            logger.warning("request %s is computed, not restored: %s", request.request_id, error)
            return Decision(start=start, end=start, reason=str(error))
        policy = Load() if request.wishes.mode is Mode.LOAD else self._policy
        plan = policy.plan(self._corrected(problem))
        if self._guarded and request.wishes.mode is Mode.AUTO and (reason := _why_not(plan)):
            # vLLM's own prefill recomputes at least as fast, and batches with what else there is.
            return Decision(start=start, end=start, problem=problem, plan=plan, reason=reason)
        return Decision(start=start, end=end, problem=problem, plan=plan, planning_s=self._clock() - began_s)

    def _end(self, request: TrackedRequest, *, start: int, num_tokens: int, num_stored: int) -> int:
        chunk_tokens = self._options.chunk_tokens
        limits = [num_stored * chunk_tokens, num_tokens - 1, self._max_tokens]
        limits += [
            start + limit
            for limit in (self._options.max_load_tokens, request.wishes.max_load_tokens)
            if limit is not None
        ]
        return min(limits) // chunk_tokens * chunk_tokens

    def _problem(self, start: int, end: int, *, num_tokens: int | None = None) -> RestoreProblem:
        chunk_tokens, facts = self._options.chunk_tokens, self.facts
        first = start // chunk_tokens * chunk_tokens
        ends = tuple(range(first + chunk_tokens, end + 1, chunk_tokens))
        grid = Grid(ends, facts.num_blocks, start=start)
        link = LinkCost(bytes_per_s=self.rates.bytes_per_s, latency_s=facts.link.latency_s)
        if facts.costs is None:
            return _load_only(grid, facts, link, object_tokens=chunk_tokens)
        problem = facts.problem(grid, link)
        if num_tokens is not None:  # vLLM may still prefill all of it
            own_s = _own_prefill_s(facts.costs, start=start, end=end, num_tokens=num_tokens)
            problem = dataclasses.replace(problem, prefill_s=own_s)
        if first == start:
            return problem
        # Objects are read whole: a first chunk of which a part is resident moves all its bytes.
        load_bytes_KB = problem.load_bytes_KB.copy()
        load_bytes_KB[0] = load_bytes_KB[0] * chunk_tokens // (ends[0] - start)
        return dataclasses.replace(problem, load_bytes_KB=load_bytes_KB)

    def _corrected(self, problem: RestoreProblem) -> RestoreProblem:
        factor = self.rates.compute_factor
        return dataclasses.replace(
            problem,
            compute_KB=problem.compute_KB * factor,
            kv_only_KB=problem.kv_only_KB * factor,
            prefill_s=None if problem.prefill_s is None else problem.prefill_s * factor,
        )


def _why_not(plan: RestorePlan) -> str:
    """Why vLLM's own prefill is to compute the prompt; empty when restoring pays."""
    guard = plan.guard
    if guard is None:
        return ""
    if guard.choice in (Choice.RECOMPUTE, Choice.PREFILL):
        return guard.reason
    if plan.predicted.restore_s + STEP_OVERHEAD_S <= guard.without_loading_s:
        return ""
    return f"{guard.reason}; the steps of a restoration add {STEP_OVERHEAD_S * 1e3:g} ms, so vLLM computes it"


def _own_prefill_s(costs: CostTable, *, start: int, end: int, num_tokens: int) -> float | None:
    """Seconds by which vLLM's prefill of the whole rest of a prompt is longer than that of what lies behind ``end``."""
    try:
        whole_s = prefill_s(costs, start=start, end=num_tokens)
        behind_s = prefill_s(costs, start=end, end=num_tokens)
    except CostRangeError:
        return None  # a prompt longer than the costs reach; the chunks to be restored lie within
    return None if whole_s is None or behind_s is None else max(0.0, whole_s - behind_s)


def _load_only(grid: Grid, facts: EngineFacts, link: LinkCost, *, object_tokens: int) -> RestoreProblem:
    layers_B = np.full(facts.num_blocks, facts.layers_per_block)
    layers_B[-1] = facts.shape.num_layers - facts.layers_per_block * (facts.num_blocks - 1)
    free_KB = np.zeros((grid.num_chunks, facts.num_blocks))
    bytes_B = layers_B * object_tokens * facts.shape.kv_bytes_per_token_layer
    return RestoreProblem(
        grid=grid,
        compute_KB=free_KB,
        kv_only_KB=free_KB,
        load_bytes_KB=np.tile(bytes_B.astype(np.int64), (grid.num_chunks, 1)),
        link=link,
    )


def _measured_tokens(facts: EngineFacts) -> int:
    """Longest prefix the costs cover; a longer one is restored as far as they do."""
    if facts.costs is None:
        return 1 << 62
    grids = [facts.costs.kinds[kind] for kind in set(facts.costs.layer_kinds)]
    return min(max(grid.offsets) + max(grid.chunk_tokens) for grid in grids)
