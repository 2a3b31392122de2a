"""From a restoration's report to the line that goes on record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cacheflow.bench.record import Environment, GuardRecord, RestoreRecord
from cacheflow.engine.model import LoadedModel
from cacheflow.plan.bound import Bound
from cacheflow.plan.report import Lane, RestoreReport, SpanKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What the runs of one round have in common; see ``RestoreRecord``."""

    suite: str
    model: LoadedModel
    chunk_tokens: int
    num_tokens: int
    suffix_tokens: int
    ratio: float
    bytes_per_s: float
    repeat: int
    environment: Environment
    perturbation: Mapping[str, float] = field(default_factory=dict)
    layers_per_block: int = 1
    store: str = "memory"


def make_record(context: RunContext, report: RestoreReport, least: Bound, *, correct: bool) -> RestoreRecord:
    """Put one checked run on record; planning counts as part of both times."""
    shape, guard = context.model.shape, report.plan.guard
    has_suffix = context.suffix_tokens > 0
    return RestoreRecord(
        suite=context.suite,
        policy=report.plan.policy,
        model=context.model.name,
        device=context.model.device.type,
        dtype=shape.dtype,
        num_tokens=context.num_tokens,
        suffix_tokens=context.suffix_tokens,
        chunk_tokens=context.chunk_tokens,
        num_layers=shape.num_layers,
        link_bytes_per_s=context.bytes_per_s if math.isfinite(context.bytes_per_s) else None,
        load_compute_ratio=context.ratio,
        repeat=context.repeat,
        restore_s=report.restore_s + report.planning_s,
        ttft_s=None if report.ttft_s is None else report.ttft_s + report.planning_s,
        bound_restore_s=least.restore_s,
        bound_ttft_s=least.ttft_s if has_suffix else None,
        compute_busy=min(1.0, report.compute_busy),
        io_busy=min(1.0, report.io_busy),
        recomputed_cells=report.recomputed_cells,
        loaded_cells=report.loaded_cells,
        wasted_bytes=report.wasted_bytes,
        correct=correct,
        environment=context.environment,
        loaded_bytes=report.loaded_bytes,
        failed_loads=sum(report.failed_loads.values()),
        planning_s=report.planning_s,
        overhead_s=report.overhead_s,
        perturbation=dict(context.perturbation),
        guard=GuardRecord(choice=guard.choice.value, reason=guard.reason) if guard else None,
        objective="ttft" if has_suffix else "restore",
        fingerprint=context.model.fingerprint,
        layers_per_block=context.layers_per_block,
        store=context.store,
    )


def recompute_seconds(report: RestoreReport) -> float:
    """Seconds compute spent on prefix cells."""
    kinds = (SpanKind.RECOMPUTE, SpanKind.KV_ONLY, SpanKind.REPAIR)
    return sum(s.end_s - s.start_s for s in report.spans if s.lane is Lane.COMPUTE and s.kind in kinds)
