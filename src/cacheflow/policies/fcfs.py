"""First come, first served: both resources turn to the oldest request first."""

from __future__ import annotations

from typing import ClassVar

from cacheflow.plan.batch import Arrival
from cacheflow.policies.base import PlansEachAlone


class FirstComeFirstServed(PlansEachAlone, Arrival):
    """Every request restored as its restore policy says, in the order of arrival."""

    name: ClassVar[str] = "fcfs"
