"""Restore policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cacheflow.errors import UnknownPolicyError
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.cacheflow import CacheFlow
from cacheflow.policies.cacheflow_v1 import CacheFlowV1
from cacheflow.policies.cacheflow_v2 import CacheFlowV2
from cacheflow.policies.cake import Cake
from cacheflow.policies.layerwise_load import LayerwiseLoad
from cacheflow.policies.load import Load
from cacheflow.policies.recompute import Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """What calibration measured for policies; each takes what it needs.

    Attributes:
        crossover_tokens: For ``cacheflow_v1``: shorter prefixes go layer-wise; None predicts it.
        interference: For ``cacheflow``: how many times as long compute takes while the link is busy.
    """

    crossover_tokens: int | None = None
    interference: float = 1.0


RESTORE_POLICIES: Mapping[str, Callable[[PolicyOptions], RestorePolicy]] = MappingProxyType(
    {
        Recompute.name: lambda options: Recompute(),
        Load.name: lambda options: Load(),
        LayerwiseLoad.name: lambda options: LayerwiseLoad(),
        Cake.name: lambda options: Cake(),
        CacheFlowV1.name: lambda options: CacheFlowV1(crossover_tokens=options.crossover_tokens),
        CacheFlowV2.name: lambda options: CacheFlowV2(),
        CacheFlow.name: lambda options: CacheFlow(interference=options.interference),
    }
)
"""Constructors by name, in the order of tables and plots: rivals from simple to strong, ours last."""


def make_policy(name: str, *, crossover_tokens: int | None = None, interference: float = 1.0) -> RestorePolicy:
    """Make the policy of a name.

    Raises:
        UnknownPolicyError: There is no such policy; lists those there are.
        ConfigError: An option is out of range.
    """
    if name not in RESTORE_POLICIES:
        raise UnknownPolicyError(f"policy {name!r} is not known; known are {', '.join(RESTORE_POLICIES)}")
    return RESTORE_POLICIES[name](PolicyOptions(crossover_tokens=crossover_tokens, interference=interference))
