"""The batch policies that ``bench batch`` compares: who orders requests, and who plans each restoration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cacheflow.errors import UnknownPolicyError
from cacheflow.plan.batch import BatchPolicy
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import make_policy


@dataclass(frozen=True, slots=True)
class Contender:
    """A batch policy over a restore policy, by name."""

    batch: str
    restore: str

    def make(self) -> BatchPolicy:
        """The policy."""
        return make_batch_policy(self.batch, make_policy(self.restore))


CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        "cake": Contender("fcfs", "cake"),
        "fcfs": Contender("fcfs", "cacheflow"),
        "longest_first": Contender("longest_first", "cacheflow_v1"),
        "dp": Contender("dp", "cacheflow_v2"),
        "mean_ttft": Contender("mean_ttft", "cacheflow"),
        "p99_ttft": Contender("p99_ttft", "cacheflow"),
        "makespan": Contender("makespan", "cacheflow"),
        "slo": Contender("slo", "cacheflow"),
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
