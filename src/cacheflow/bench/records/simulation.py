"""Records of systems on a simulated cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import force_setattr

from cacheflow.bench.records.base import BenchRecord, Name
from cacheflow.sim.policies import EMBEDDED, PLUGIN, SYSTEMS


class SimulationRecord(BenchRecord, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One system over one workload on a simulated cluster.

    Only what is drawn is in every record that was ever written; None stands for what an old one does not say. Results
    are the fields of ``sim.results.RunResult``, the options those of ``cacheflow simulate``.

    Attributes:
        order: Whom the system serves first. Records that do not say are of the time when ``cacheflow`` was the embedded
            engine's: they are named so.
        inputs_fingerprint: Tells apart models, GPUs and costs of the same names.
        requests_fingerprint: Tells apart traces of the same name, and whatever else makes other requests of them.
        reusable_tokens: Prompt tokens that an earlier prompt began with too.
        cluster: The cluster's configuration; None stands for infinity.
        ttft_percentiles_s: Time to first token by percentile, for the picture.
    """

    suite: Name = "simulate"
    policy: Name
    order: str = ""
    workload: str
    model: str
    gpu: str = ""
    costs: str
    objective: str | None = None
    seed: int | None = None
    max_cells: int | None = None
    rate_scale: float | None = None
    format: str | None = None
    limit: int | None = None
    duration_s: float | None = None
    repeat: int | None = None
    max_tokens: int | None = None
    num_sessions: int | None = None
    session_rate_per_s: float | None = None
    inputs_fingerprint: str | None = None
    requests_fingerprint: str | None = None
    reusable_tokens: int | None = None
    cluster: Mapping[str, Any] | None = None
    num_requests: int | None = None
    simulated_s: float | None = None
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p90_s: float | None = None
    ttft_p99_s: float | None = None
    ttft_max_s: float | None = None
    ttlt_mean_s: float | None = None
    ttlt_p50_s: float | None = None
    ttlt_p99_s: float | None = None
    goodput_per_s: float | None = None
    in_time_share: float | None = None
    compute_busy: float | None = None
    restore_prefill_busy: float | None = None
    link_busy: float | None = None
    store_bytes: float | None = None
    host_bytes: float | None = None
    wasted_bytes: float | None = None
    hit_tokens: float | None = None
    loaded_tokens: float | None = None
    recomputed_tokens: float | None = None
    new_tokens: float | None = None
    output_tokens: float | None = None
    ttft_percentiles_s: dict[str, float]
    wall_s: float | None = None

    def __post_init__(self) -> None:
        """Name the embedded engine's old records as its new ones are named."""
        super().__post_init__()
        if self.policy == PLUGIN and not self.order:
            force_setattr(self, "policy", EMBEDDED)
            force_setattr(self, "order", SYSTEMS[EMBEDDED].order)
