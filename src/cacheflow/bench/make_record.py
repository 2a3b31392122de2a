"""From a restoration's report to the line that goes on record."""

from __future__ import annotations

import math
from typing import Any

from cacheflow.bench.records.restore import GuardRecord, RestoreRecord
from cacheflow.engine.model import LoadedModel
from cacheflow.plan.bound import Bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.report import Lane, RestoreReport, SpanKind


def of_model(model: LoadedModel) -> dict[str, Any]:
    """What a record says of a model."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "device": model.device.type,
        "dtype": model.shape.dtype,
        "num_layers": model.shape.num_layers,
    }


def make_record(
    report: RestoreReport,
    least: Bound,
    grid: Grid,
    *,
    bytes_per_s: float,
    correct: bool,
    **context: Any,  # noqa: ANN401 -- fields of any type
) -> RestoreRecord:
    """Put one checked run on record; planning counts as part of both times.

    Args:
        report: What came of it.
        least: The bound, from costs of the same round.
        grid: The prefix, with its suffix if the run had one.
        bytes_per_s: Of the link; ``inf`` for no limit.
        correct: Whether everything equalled the reference.
        context: What the runs of one round have in common, by field of the record.
    """
    guard, has_suffix = report.plan.guard, grid.suffix_tokens > 0
    return RestoreRecord(
        policy=report.plan.policy,
        num_tokens=grid.num_tokens,
        suffix_tokens=grid.suffix_tokens,
        link_bytes_per_s=bytes_per_s if math.isfinite(bytes_per_s) else None,
        restore_s=report.restore_s + report.planning_s,
        ttft_s=None if report.ttft_s is None else report.ttft_s + report.planning_s,
        bound_restore_s=least.restore_s,
        bound_ttft_s=least.ttft_s if has_suffix else None,
        compute_busy=min(1.0, report.compute_busy),
        io_busy=min(1.0, report.io_busy),
        failed_loads=sum(report.failed_loads.values()),
        guard=GuardRecord(choice=guard.choice.value, reason=guard.reason) if guard else None,
        objective="ttft" if has_suffix else "restore",
        correct=correct,
        **{name: getattr(report, name) for name in SAME},
        **context,
    )


SAME = ("recomputed_cells", "loaded_cells", "wasted_bytes", "loaded_bytes", "planning_s", "overhead_s")
"""Fields that a report and a record have in common."""


def recompute_seconds(report: RestoreReport) -> float:
    """Seconds compute spent on prefix cells."""
    kinds = (SpanKind.RECOMPUTE, SpanKind.KV_ONLY, SpanKind.REPAIR)
    return sum(s.end_s - s.start_s for s in report.spans if s.lane is Lane.COMPUTE and s.kind in kinds)
