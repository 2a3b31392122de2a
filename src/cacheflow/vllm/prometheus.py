"""``vllm:cacheflow_*`` on vLLM's Prometheus endpoint, and the same numbers in its periodic log line."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cacheflow.vllm.metrics import described, merged

RESTORE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
RATIO_BUCKETS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
SHARE_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)

COUNTERS = {
    "tokens": (
        "vllm:cacheflow_tokens",
        described("tokens", "Prefix tokens by how they came back, counted when the restoration has ended."),
        "source",
    ),
    "restorations": ("vllm:cacheflow_restorations", described("restorations", "Restorations ended."), "outcome"),
    "guard": ("vllm:cacheflow_guard_decisions", described("guard", "Choices of the never-slower guard."), "choice"),
    "chunks_saved": (
        "vllm:cacheflow_chunks_saved",
        described("chunks_saved", "Chunks of computed KV that were to be saved."),
        "outcome",
    ),
    "kept": (
        "vllm:cacheflow_kept_chunks",
        described("kept", "Chunks of prefixes that requests asked to keep."),
        "outcome",
    ),
    "prefetched": (
        "vllm:cacheflow_prefetched_objects",
        described("prefetched", "Objects that were to be in the fastest tier of the store before they are read."),
        "outcome",
    ),
    "boundaries": (
        "vllm:cacheflow_boundaries",
        described("boundaries", "What became of boundary states that a later pipeline stage was to keep."),
        "outcome",
    ),
    "tier_outages": (
        "vllm:cacheflow_tier_outages",
        "Times that a tier of the store was taken out of service: its reads failed, hung or were far too slow.",
        "tier",
    ),
    "tier_dropped": (
        "vllm:cacheflow_tier_dropped",
        "Objects not written to a slower tier: too much was waiting to be, or the write failed.",
        "tier",
    ),
    "tier_raced": (
        "vllm:cacheflow_tier_raced",
        "Reads of a tier that took much longer than its others and were asked of the next tier too.",
        "tier",
    ),
    "tier_overtaken": (
        "vllm:cacheflow_tier_overtaken",
        "Of the reads that were asked of the next tier too, those that it served sooner.",
        "tier",
    ),
    "loaded_bytes": ("vllm:cacheflow_loaded_bytes", "Bytes loaded into the KV cache.", ""),
    "lookup_timeouts": ("vllm:cacheflow_lookup_timeouts", "Prompts computed because the store answered too late.", ""),
}
HISTOGRAMS = {
    "restore_s": ("vllm:cacheflow_restore_seconds", "Seconds of a restoration that is done.", RESTORE_BUCKETS_S),
    "bound_ratio": (
        "vllm:cacheflow_bound_ratio",
        "Seconds of a restoration over the least it could take; 1 is the bound.",
        RATIO_BUCKETS,
    ),
    "overlap": (
        "vllm:cacheflow_overlap",
        "Share of the time of the side, compute or link, that worked less, in which both worked.",
        SHARE_BUCKETS,
    ),
}
BANDWIDTH = ("vllm:cacheflow_link_bytes_per_second", "Live estimate of the link's bandwidth.")


@dataclass
class CacheFlowStats(KVConnectorStats):
    """Counts of an interval as vLLM passes them from the engine to the frontend."""

    def reset(self) -> None:
        """Forget everything."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> CacheFlowStats:
        """Both together; in place, as vLLM does it."""
        both = merged(self.data, other.data)
        self.data.clear()
        self.data.update(both)
        return self

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data

    def reduce(self) -> dict[str, int | float]:
        """The interval in a line of the log."""
        line: dict[str, int | float] = {}
        for name, value in self.data.items():
            if isinstance(value, dict):
                line |= {f"{name} {key}": round(count, 1) for key, count in sorted(value.items())}
            elif isinstance(value, list):
                line[f"{name} mean"] = round(fmean(value), 4)
            else:
                line[name] = round(value, 1)
        return line


class CacheFlowPromMetrics(KVConnectorPromMetrics):
    """Registers the metrics once and feeds them per engine."""

    def __init__(
        self,
        vllm_config: Any,  # noqa: ANN401 -- vLLM's types
        metric_types: dict[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            key: self._counter_cls(name=name, documentation=text, labelnames=labelnames + ([label] if label else []))
            for key, (name, text, label) in COUNTERS.items()
        }
        self._histograms = {
            key: self._histogram_cls(name=name, documentation=text, buckets=buckets, labelnames=labelnames)
            for key, (name, text, buckets) in HISTOGRAMS.items()
        }
        name, text = BANDWIDTH
        self._bandwidth = self._gauge_cls(name=name, documentation=text, labelnames=labelnames)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in an interval of one engine."""
        labels = self.per_engine_labelvalues[engine_idx]
        for key, counter in self._counters.items():
            value = transfer_stats_data.get(key)
            if isinstance(value, dict):
                for kind, count in value.items():
                    counter.labels(*labels, kind).inc(count)
            elif value:
                counter.labels(*labels).inc(value)
        for key, histogram in self._histograms.items():
            for value in transfer_stats_data.get(key, ()):
                histogram.labels(*labels).observe(value)
        if bytes_per_s := transfer_stats_data.get("link_bytes_per_s"):
            self._bandwidth.labels(*labels).set(bytes_per_s)
