"""What an engine says it loaded and recomputed: differences of its Prometheus counters around one request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Samples = Mapping[str, float]

LOADED_BYTES = ("vllm:cacheflow_loaded_bytes_total", "vllm:kv_offload_load_bytes_total")
TOKENS = "vllm:cacheflow_tokens_total"
BOUND_RATIO = "vllm:cacheflow_bound_ratio_sum"
RESTORE_S = "vllm:cacheflow_restore_seconds_sum"
GUARD = "vllm:cacheflow_guard_decisions_total"
CHOICES = ("hybrid", "load", "recompute")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounts:
    """Of one request; all 0 where the engine does not count.

    Attributes:
        recomputed_tokens: Prefix tokens restored by compute; fractions where layers were shared.
        loaded_tokens: ... by I/O.
        wasted_tokens: Read, but recomputed all the same.
        guard_choice: What the guard chose; empty where it did not decide.
        bound_ratio: Those seconds over the engine's own lower bound; 0 where it has none.
    """

    loaded_bytes: float = 0.0
    recomputed_tokens: float = 0.0
    loaded_tokens: float = 0.0
    wasted_tokens: float = 0.0
    restore_s: float = 0.0
    bound_ratio: float = 0.0
    guard_choice: str = ""


def counts_between(before: Samples, after: Samples) -> EngineCounts:
    """What was counted between two readings of one server's metrics."""

    def grown(name: str, label: str = "") -> float:
        return sample_sum(after, name, label) - sample_sum(before, name, label)

    return EngineCounts(
        loaded_bytes=sum(grown(name) for name in LOADED_BYTES),
        recomputed_tokens=grown(TOKENS, 'source="recomputed"'),
        loaded_tokens=grown(TOKENS, 'source="loaded"'),
        wasted_tokens=grown(TOKENS, 'source="wasted"'),
        restore_s=grown(RESTORE_S),
        bound_ratio=grown(BOUND_RATIO),
        guard_choice=next((each for each in CHOICES if grown(GUARD, f'choice="{each}"') > 0), ""),
    )


def sample_sum(samples: Samples, name: str, label: str) -> float:
    """All samples of a metric whose labels contain ``label``."""
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name and label in key)
