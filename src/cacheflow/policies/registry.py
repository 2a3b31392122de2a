"""Restore policies by name."""

from __future__ import annotations

from collections.abc import Mapping
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

RESTORE_POLICIES: Mapping[str, type[RestorePolicy]] = MappingProxyType(
    {policy.name: policy for policy in (Recompute, Load, LayerwiseLoad, Cake, CacheFlowV1, CacheFlowV2, CacheFlow)}
)
"""By name, in the order of tables and plots: rivals from simple to strong, ours last."""


def make_policy(name: str, *, crossover_tokens: int | None = None) -> RestorePolicy:
    """Make the policy of a name.

    Args:
        name: One of ``RESTORE_POLICIES``.
        crossover_tokens: For ``cacheflow_v1``: shorter prefixes go layer-wise; None predicts it.

    Raises:
        UnknownPolicyError: There is no such policy; lists those there are.
        ConfigError: ``crossover_tokens`` is below 0.
    """
    if name not in RESTORE_POLICIES:
        raise UnknownPolicyError(f"policy {name!r} is not known; known are {', '.join(RESTORE_POLICIES)}")
    if name == CacheFlowV1.name:
        return CacheFlowV1(crossover_tokens=crossover_tokens)
    return RESTORE_POLICIES[name]()
