"""What the operator of concurrent requests chooses."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.engine.arguments import number, whole
from cacheflow.errors import UnknownPolicyError
from cacheflow.plan.batch import STARVATION_S
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How requests share compute, the link and memory.

    Attributes:
        objective: A batch policy by name: what is to be small (``mean_ttft``, ``p99_ttft``, ``makespan``, ``slo``), or
            ``fcfs``, ``longest_first``, ``dp``.
        starvation_s: A request that has waited this long goes before all that came after it.
        recompute_budget_ms: Restoration work between two tokens of an answer that has begun.
        itl_slo_ms: Inter-token latency to keep instead; the budget is then what decoding leaves of it.
        kv_capacity_tokens: Tokens of keys and values that requests may hold while they restore and decode; None for no
            limit. What a session keeps between its turns does not count.
    """

    objective: str = "mean_ttft"
    starvation_s: float = STARVATION_S
    recompute_budget_ms: float = 50.0
    itl_slo_ms: float | None = None
    kv_capacity_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check names and ranges.

        Raises:
            UnknownPolicyError: ``objective`` is no batch policy.
            ConfigError: A value is out of range.
        """
        if self.objective not in BATCH_POLICY_NAMES:
            raise UnknownPolicyError(f"objective {self.objective!r} is not one of {', '.join(BATCH_POLICY_NAMES)}")
        for key in ("starvation_s", "recompute_budget_ms", "itl_slo_ms", "kv_capacity_tokens"):
            value = getattr(self, key)
            if value is None and key in ("itl_slo_ms", "kv_capacity_tokens"):
                continue
            checked = whole(key, value, least=1) if key == "kv_capacity_tokens" else number(key, value, above=0)
            object.__setattr__(self, key, checked)
