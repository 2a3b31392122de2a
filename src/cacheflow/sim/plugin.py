"""How the vLLM plugin serves: vLLM computes prompts in the order of arrival, the plugin orders restorations alone.

New tokens are vLLM's, those of a restored prompt too: they start when the prefix is complete, and go by arrival. In a
step that computes prompts the plugin recomputes almost nothing, so restorations get the compute that prompts leave;
among themselves they share it, and the link, by the batch policy. Source: ``vllm/scheduler``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from cacheflow.plan.batch import STARVATION_S, BatchPolicy, Ranking, WaitingRequest, bounded
from cacheflow.plan.plan import Choice, RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.step_overhead import why_prefill


class RestoreThenPrefill:
    """A restore policy as the plugin uses it: it plans the prefix alone, and vLLM computes the new tokens after it."""

    name: ClassVar[str] = "restore_then_prefill"

    def __init__(self, restore: RestorePolicy) -> None:
        """Wrap the policy that plans the prefix; plans carry its name."""
        self._restore = restore

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan the prefix; left to vLLM's prefill where the guard, or a restoration's overhead, says so."""
        if problem.grid.num_chunks == 0:
            return self._restore.plan(problem)
        plan = self._restore.plan(_prefix_alone(problem))
        guard = plan.guard
        if guard is not None and why_prefill(plan):
            guard = replace(guard, choice=Choice.PREFILL)
        predicted = replace(plan.predicted, ttft_s=plan.predicted.restore_s + problem.suffix_s)
        return replace(plan, predicted=predicted, guard=guard)


def _prefix_alone(problem: RestoreProblem) -> RestoreProblem:
    """The same restoration without new tokens; the engine's own prefill counts by what the prefix adds to it."""
    prefill_s = None if problem.prefill_s is None else max(0.0, problem.prefill_s - problem.suffix_s)
    return replace(
        problem,
        grid=replace(problem.grid, suffix_ends=()),
        suffix_B=np.zeros(problem.grid.num_blocks),
        head_s=0.0,
        prefill_s=prefill_s,
    )


class PluginRanking:
    """Prompts with nothing left to restore by arrival, then restorations by a batch policy that sees only those.

    A prompt whose restoration ends moves up when requests are ranked again, which is a step later in vLLM too.
    """

    name: ClassVar[str] = "plugin"

    def __init__(self, restorations: BatchPolicy, *, starvation_s: float = STARVATION_S) -> None:
        """Take the policy that ranks restorations.

        Args:
            restorations: The plugin's batch policy.
            starvation_s: A restoration that has waited this long goes before all that came after it.
        """
        self._restorations, self._starvation_s = restorations, starvation_s

    def rank(self, now_s: float, waiting: Sequence[WaitingRequest]) -> Ranking:
        """Rank the requests; ``waiting`` is in the order of arrival."""
        prompts = tuple(request.request_id for request in waiting if not _restoring(request))
        # The plugin does not know what vLLM will need for the new tokens.
        restoring = [
            replace(request, remaining=replace(request.remaining, suffix_s=0.0))
            for request in waiting
            if _restoring(request)
        ]
        order = self._restorations.rank(now_s, restoring)
        order = bounded(order, restoring, now_s, starvation_s=self._starvation_s)
        return Ranking(compute=(*prompts, *order.compute), link=(*order.link, *prompts))

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """As the policy of the restorations plans them."""
        return self._restorations.plans(request_id, problems)


def _restoring(request: WaitingRequest) -> bool:
    return request.remaining.compute_s > 0 or request.remaining.load_s > 0
