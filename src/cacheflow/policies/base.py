"""What a restore policy is: a problem in, a plan out; and the plan of a prefix with nothing in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from cacheflow.plan.plan import Prediction, RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem


class RestorePolicy(Protocol):
    """Decides the orders in which compute and the link restore a prefix; pure, so it may be called from any thread."""

    name: ClassVar[str]
    """What the policy is called in configuration, records and plots."""

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan one restoration.

        Promises that the two orders together hold every cell of the grid and that every prefix of the compute order
        is a staircase. A grid without chunks gets a plan without tiles.
        """
        ...


class PlansEachAlone:
    """A batch policy's plans that are its restore policy's: where pointers meet is decided live."""

    def __init__(self, restore: RestorePolicy) -> None:
        """Take the policy that plans each restoration."""
        self._restore = restore

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """See ``BatchPolicy.plans``; as if the request were alone."""
        return {request_id: self._restore.plan(problems[request_id])}


def empty_plan(policy: str, problem: RestoreProblem) -> RestorePlan:
    """The plan of a grid without chunks: only the suffix is left to do."""
    return RestorePlan(
        policy=policy,
        compute_sequence=(),
        load_sequence=(),
        share=Share.NONE,
        suffix_start=SuffixStart.AFTER_RESTORE,
        levels_K=(),
        predicted=Prediction(restore_s=0.0, ttft_s=problem.suffix_s, compute_s=0.0, load_s=0.0),
    )
