"""Batch policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from cacheflow.errors import UnknownPolicyError
from cacheflow.plan.batch import BatchPolicy
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.dp import DynamicProgram
from cacheflow.policies.fcfs import FirstComeFirstServed
from cacheflow.policies.longest_first import LongestFirst
from cacheflow.policies.objective import BatchObjective, ObjectivePolicy

_POLICIES: Mapping[str, Callable[[RestorePolicy], BatchPolicy]] = MappingProxyType({
    "fcfs": FirstComeFirstServed,
    "longest_first": LongestFirst,
    "dp": DynamicProgram,
    "objective": ObjectivePolicy,
    **{objective.value: partial(ObjectivePolicy, objective=objective) for objective in BatchObjective},
})  # fmt: skip

BATCH_POLICY_NAMES = tuple(_POLICIES)
"""Every batch policy; ``objective`` alone stands for ``mean_ttft``."""


def make_batch_policy(name: str, restore: RestorePolicy) -> BatchPolicy:
    """A batch policy by name, over the policy that plans each restoration.

    Raises:
        UnknownPolicyError: No such policy; lists the known ones.
    """
    if name not in _POLICIES:
        raise UnknownPolicyError(f"batch policy {name!r} is not known: choose one of {', '.join(BATCH_POLICY_NAMES)}")
    return _POLICIES[name](restore)
