"""The live executor: two threads drive one restoration's state machine over two ports.

Compute runs on the thread that called ``execute``; reads are started, awaited and placed by one I/O thread. Both take
the same lock around every call into the state machine and hold it nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cacheflow.errors import RestoreCancelled
from cacheflow.plan.grid import Tile
from cacheflow.restore.io_loop import IoLoop
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import ComputePort, Ticket, TransferPort
from cacheflow.restore.shared import Restoration, Shared
from cacheflow.state.claims import ClaimKind, ComputeClaim
from cacheflow.state.report import Lane, RestoreReport, Span, SpanKind, restoration_report
from cacheflow.state.restoration import RestoreState

T = TypeVar("T", bound=Ticket)


def execute(
    state: RestoreState,
    compute: ComputePort,
    transfer: TransferPort[T],
    *,
    options: ExecutorOptions | None = None,
    planning_s: float = 0.0,
    cancel: threading.Event | None = None,
) -> RestoreReport:
    """Restore every cell of ``state``'s grid, run the suffix, and report what happened.

    On return nothing of the restoration is running: no thread, no read that touches a buffer.

    Args:
        state: A fresh state machine; its plan decides who does what.
        compute: Called on this thread only.
        transfer: Called on the I/O thread only.
        options: Depth and deadlines of the reads, and the clock.
        planning_s: Seconds the plan took, for the report.
        cancel: Set from any thread to give the restoration up.

    Raises:
        RestoreCancelled: ``cancel`` was set before the first token was there.
    """
    options = options or ExecutorOptions()
    shared = Shared(Restoration(state, transfer), options.clock)
    io_loop = IoLoop(shared, options)
    thread = threading.Thread(target=io_loop.run, name="cacheflow-io", daemon=True)
    thread.start()
    try:
        overhead_s = _drive_compute(shared, compute, options, cancel)
        compute.finish()
        end_s = shared.now_s()
    finally:
        shared.stop.set()
        with shared.changed:
            shared.changed.notify_all()
        thread.join()
    return _report(shared.restoration, planning_s=planning_s, overhead_s=overhead_s, end_s=end_s)


def _drive_compute(
    shared: Shared[T], compute: ComputePort, options: ExecutorOptions, cancel: threading.Event | None
) -> float:
    """Carry out claims until everything is restored and the suffix is through; returns the overhead in seconds."""
    overhead_s, restoration = 0.0, shared.restoration
    while True:
        if cancel is not None and cancel.is_set():
            raise RestoreCancelled(f"restoration cancelled after {shared.now_s():.3f} s")
        before_s = shared.now_s()
        with shared.changed:
            claim = restoration.state.claim_compute(shared.now_s())
            if claim.kind is ClaimKind.WAIT:
                shared.changed.notify_all()
                shared.changed.wait(options.poll_s)
                continue
        if claim.kind is ClaimKind.DONE:
            return overhead_s
        start_s = shared.now_s()
        spans = carry_out(claim, compute, shared.now_s)
        end_s = shared.now_s()
        with shared.changed:
            restoration.state.complete_compute(claim, actual_s=end_s - start_s)
            restoration.note_restored(shared.now_s())
            restoration.spans.extend(spans)
            shared.changed.notify_all()
        overhead_s += shared.now_s() - before_s - (end_s - start_s)


def carry_out(claim: ComputeClaim, compute: ComputePort, now_s: Callable[[], float]) -> list[Span]:
    """Do what a claim orders, chunk by chunk; one span each, on the clock that ``now_s`` reads."""
    start_s = now_s()
    if claim.tile is None:
        compute.run_suffix(claim.block_lo, claim.block_hi)
        suffix = Tile(0, 1, claim.block_lo, claim.block_hi)
        return [_span(SpanKind.SUFFIX, start_s, now_s(), suffix, chunk=-1)]
    tile, spans = claim.tile, []
    if claim.restart:
        compute.restart(tile.chunk_lo)
    kind = SpanKind.KV_ONLY if claim.kv_only_top and tile.block_hi - tile.block_lo == 1 else SpanKind.RECOMPUTE
    kind = SpanKind.REPAIR if claim.kind is ClaimKind.REPAIR else kind
    for chunk in range(tile.chunk_lo, tile.chunk_hi):
        compute.recompute(Tile(chunk, chunk + 1, tile.block_lo, tile.block_hi), kv_only_top=claim.kv_only_top)
        end_s = now_s()
        spans.append(_span(kind, start_s, end_s, tile, chunk=chunk))
        start_s = end_s
    return spans


def _span(kind: SpanKind, start_s: float, end_s: float, tile: Tile, *, chunk: int) -> Span:
    return Span(
        lane=Lane.COMPUTE,
        kind=kind,
        start_s=start_s,
        end_s=end_s,
        chunk=chunk,
        block_lo=tile.block_lo,
        block_hi=tile.block_hi,
    )


def _report(restoration: Restoration[T], *, planning_s: float, overhead_s: float, end_s: float) -> RestoreReport:
    grid = restoration.state.problem.grid
    has_suffix = bool(grid.suffix_ends)
    restored_s = restoration.restored_at_s if has_suffix and restoration.restored_at_s is not None else end_s
    return restoration_report(
        restoration.state,
        restore_s=restored_s if grid.num_chunks else 0.0,
        ttft_s=end_s if has_suffix else None,
        planning_s=planning_s,
        overhead_s=overhead_s,
        spans=restoration.spans,
    )
