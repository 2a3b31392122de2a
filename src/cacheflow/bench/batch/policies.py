"""The batch policies that ``bench batch`` compares: who orders requests, and who plans each restoration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cacheflow.bench.contender import Contender
from cacheflow.errors import UnknownPolicyError

CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        name: Contender(name=name, batch=batch, restore=restore)
        for name, batch, restore in (
            ("cake", "fcfs", "cake"),
            ("fcfs", "fcfs", "cacheflow"),
            ("longest_first", "longest_first", "cacheflow_v1"),
            ("dp", "dp", "cacheflow_v2"),
            ("mean_ttft", "mean_ttft", "cacheflow"),
            ("p99_ttft", "p99_ttft", "cacheflow"),
            ("makespan", "makespan", "cacheflow"),
            ("slo", "slo", "cacheflow"),
        )
    }
)
"""By the name on record, rivals first. ``dp`` decides every split itself."""
OURS = ("mean_ttft", "p99_ttft", "makespan", "slo")
"""Each minimises one objective; it is flagged where a rival does better by that objective."""


def find_contender(name: str) -> Contender:
    """The contender of a name.

    Raises:
        UnknownPolicyError: There is none; lists the known ones.
    """
    if name not in CONTENDERS:
        raise UnknownPolicyError(f"policy {name!r} is not known; known are {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
