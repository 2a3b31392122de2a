"""What is said of a restoration: to whoever asked, and in the metrics."""

from __future__ import annotations

from typing import Any

from cacheflow.restore.pipeline import PipelineRestoration
from cacheflow.state.report import Lane, RestoreReport
from cacheflow.vllm.scheduler.request import Decision


def record_of(
    decision: Decision, stepped: PipelineRestoration, report: RestoreReport, *, outcome: str, now_s: float
) -> dict[str, Any]:
    """What a response says of a restoration; stage by stage where there are several."""
    staged = stepped.stage_reports(now_s)
    stages = {"stages": staged.as_dicts()} if len(staged.stages) > 1 else {}
    return (
        report.as_dict()
        | stages
        | {
            "start": decision.start,
            "end": decision.end,
            "outcome": outcome,
            "error": stepped.error,
            "bound_restore_s": staged.bound_restore_s,
        }
    )


def overlap(report: RestoreReport) -> float:
    """Share of the shorter side's busy time during which the other worked too; 0 when one side did nothing."""
    busy = {lane: sum(s.end_s - s.start_s for s in report.spans if s.lane is lane) for lane in Lane}
    shorter_s = min(busy.values())
    if shorter_s <= 0:
        return 0.0
    union_s, reached_s = 0.0, 0.0
    for span in sorted(report.spans, key=lambda s: s.start_s):
        union_s += max(0.0, span.end_s - max(span.start_s, reached_s))
        reached_s = max(reached_s, span.end_s)
    return min(1.0, max(0.0, (sum(busy.values()) - union_s) / shorter_s))
