"""What is counted, after it happened, and how it reaches vLLM's Prometheus endpoint as ``vllm:cacheflow_*``.

Plain numbers in here, so that they cross from the engine to the frontend as vLLM's ``KVConnectorStats`` do;
``prometheus.py`` turns them into metrics.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cacheflow.stores.base import PrefetchOutcome, TierStats

LABELS: Mapping[str, Mapping[str, str]] = {
    "tokens": {
        "recomputed": "computed again by the restoration",
        "loaded": "read from the store",
        "late": "read, but compute was faster or the deadline had passed",
        "failed": "the store had lost them, they did not verify, or the read failed",
        "wasted": "read and not used",
    },
    "restorations": {
        "done": "the whole prefix that was planned is there",
        "failed": "vLLM computes what is missing",
        "cancelled": "the request ended first",
    },
    "guard": {
        "hybrid": "recompute and load at once",
        "load": "load alone",
        "recompute": "nothing is restored, vLLM's own prefill computes the prompt",
    },
    "chunks_saved": {
        "stored": "written",
        "exists": "the store had it or was just writing it",
        "failed": "the store could not take it",
        "skipped": "too much was waiting to be written",
    },
    "kept": {
        "pinned": "stays in the store for as long as the request asked",
        "missing": "the store does not hold all of it",
        "refused": "what is kept holds as much of the store, or of the tenant's quota, as it may",
    },
    "prefetched": {
        "fetched": "brought there; later it counts as used or wasted too",
        "used": "there when it was read",
        "wasted": "gone from there before anybody read it",
        "dropped": "not brought: there was no room, a tier failed or was busy for too long, or too many waited",
    },
    "boundaries": {
        "captured": "chunks saved with their KV",
        "incomplete": "chunks of which a part came from the prefix cache or was not seen",
        "missed": "a request's part of a step whose rows were not where they should be or could not be copied, a bug",
        "unseen": "steps that replayed a CUDA graph",
    },
}
"""What the values of each counter's label mean."""

TIER_COUNTERS: Mapping[str, str] = {
    "tier_outages": "num_outages",
    "tier_dropped": "num_dropped",
    "tier_raced": "num_raced",
    "tier_overtaken": "num_overtaken",
}
"""Counters by tier, and where ``TierStats`` has them."""


def described(name: str, text: str) -> str:
    """A counter's HELP text: ``text``, then every value of its label with what it means."""
    return f"{text} {'; '.join(f'{value}: {meaning}' for value, meaning in LABELS[name].items())}."


@dataclass(slots=True)
class Counts:
    """Counts since the last ``take``; one thread.

    Attributes:
        tokens: Tokens (a cell counts its share of the layers) by source; the values of this and the next six are
            those of ``LABELS``.
        restorations: Restorations ended, by outcome.
        guard: Decisions of the never-slower guard, by choice.
        chunks_saved: Chunks handed to the store, by outcome.
        kept: Chunks of prefixes that requests asked to keep, by outcome.
        prefetched: Objects that were to be in the fastest tier of the store before they are read, by outcome.
        boundaries: What became of boundary states that a later stage was to keep, by outcome.
        loaded_bytes: Bytes that reads moved into the KV cache.
        restore_s: Seconds of each restoration.
        bound_ratio: Seconds over the lower bound of each restoration.
        overlap: Share of the shorter side's busy time during which both sides worked, of each restoration.
        lookup_timeouts: Prompts computed because the store did not answer in time.
        link_bytes_per_s: Live estimate of the link's bandwidth; 0 before the first.
        tier_outages: Times that a tier of the store was taken out of service, by tier.
        tier_dropped: Objects that were to be written to a tier and were not, by tier.
        tier_raced: Reads of a tier that were slow and asked of the next one too, by tier.
        tier_overtaken: ... of which the next one was faster.
    """

    tokens: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    restorations: Counter[str] = field(default_factory=Counter)
    guard: Counter[str] = field(default_factory=Counter)
    chunks_saved: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    prefetched: Counter[str] = field(default_factory=Counter)
    boundaries: Counter[str] = field(default_factory=Counter)
    loaded_bytes: int = 0
    restore_s: list[float] = field(default_factory=list)
    bound_ratio: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    lookup_timeouts: int = 0
    link_bytes_per_s: float = 0.0
    tier_outages: Counter[str] = field(default_factory=Counter)
    tier_dropped: Counter[str] = field(default_factory=Counter)
    tier_raced: Counter[str] = field(default_factory=Counter)
    tier_overtaken: Counter[str] = field(default_factory=Counter)
    _tiers_before: dict[str, TierStats] = field(default_factory=dict)
    _prefetches_before: Mapping[PrefetchOutcome, int] = field(default_factory=dict)

    def note_tiers(self, tiers: Iterable[TierStats]) -> None:
        """Count what happened to the tiers of a store since the last call."""
        for tier in tiers:
            before = self._tiers_before.get(tier.name)
            self._tiers_before[tier.name] = tier
            for counter, name in TIER_COUNTERS.items():
                more = getattr(tier, name) - (getattr(before, name) if before else 0)
                if more:
                    getattr(self, counter)[tier.name] += more

    def note_prefetches(self, prefetches: Mapping[PrefetchOutcome, int]) -> None:
        """Count what became of a store's prefetches since the last call."""
        before, self._prefetches_before = self._prefetches_before, prefetches
        for outcome, total in prefetches.items():
            if new := total - before.get(outcome, 0):
                self.prefetched[outcome.value] += new

    def take(self) -> dict[str, Any]:
        """What was counted since the last call, as plain data; empty when nothing was."""
        data: dict[str, Any] = {}
        for name in (*LABELS, *TIER_COUNTERS):
            if values := getattr(self, name):
                data[name] = dict(values)
                values.clear()
        for name in ("restore_s", "bound_ratio", "overlap"):
            if series := getattr(self, name):
                data[name] = list(series)
                series.clear()
        for name in ("loaded_bytes", "lookup_timeouts"):
            if value := getattr(self, name):
                data[name] = value
                setattr(self, name, 0)
        if data and self.link_bytes_per_s:
            data["link_bytes_per_s"] = self.link_bytes_per_s
        return data


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two ``take`` results as one: counts added, series joined, the later gauge kept."""
    result = {key: _copied(value) for key, value in one.items()}
    for key, value in other.items():
        if key not in result or key == "link_bytes_per_s":
            result[key] = _copied(value)
        elif isinstance(value, dict):
            result[key] = {name: result[key].get(name, 0) + value.get(name, 0) for name in {*result[key], *value}}
        else:
            result[key] = result[key] + value
    return result


def _copied(value: Any) -> Any:  # noqa: ANN401 -- plain data
    return value.copy() if isinstance(value, dict | list) else value
