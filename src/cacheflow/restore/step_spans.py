"""Spans of a stepped restoration, from what workers reported: times on the clock of the worker that took longest."""

from __future__ import annotations

from cacheflow.restore.ledgers import DoneCompute
from cacheflow.restore.work import LoadReport
from cacheflow.state.report import Lane, Span, SpanKind


def compute_span(done: DoneCompute) -> Span:
    """The span of one compute order."""
    tile = done.order.tile
    return Span(
        lane=Lane.COMPUTE,
        kind=SpanKind.KV_ONLY if done.order.kv_only_top and tile.num_cells == 1 else SpanKind.RECOMPUTE,
        start_s=done.end_s - done.actual_s,
        end_s=done.end_s,
        chunk=tile.chunk_lo,
        block_lo=tile.block_lo,
        block_hi=tile.block_hi,
    )


def load_span(kind: SpanKind, report: LoadReport) -> Span:
    """The span of one read, of the time the link worked on it."""
    return Span(
        lane=Lane.IO,
        kind=kind,
        start_s=max(0.0, report.end_s - report.busy_s),
        end_s=report.end_s,
        chunk=report.chunk,
        block_lo=report.block,
        block_hi=report.block + 1,
    )
