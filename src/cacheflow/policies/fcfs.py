"""First come, first served: both resources turn to the oldest request first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from cacheflow.plan.batch import Arrival
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.policies.base import RestorePolicy


class FirstComeFirstServed(Arrival):
    """Every request restored as its restore policy says, in the order of arrival."""

    name: ClassVar[str] = "fcfs"

    def __init__(self, restore: RestorePolicy) -> None:
        """Take the policy that plans each restoration."""
        self._restore = restore

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """As if it were alone."""
        return {request_id: self._restore.plan(problems[request_id])}
