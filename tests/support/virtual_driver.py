"""Drives one restoration's state machine by a virtual clock: true costs may differ from the ones planned with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.pointers import ClaimKind, ComputeClaim, RestoreState
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.types import LoadOutcome


@dataclass(frozen=True)
class VirtualRun:
    restore_s: float
    ttft_s: float
    state: RestoreState


def run_virtual(
    planned: RestoreProblem,
    plan: RestorePlan,
    *,
    truth: RestoreProblem | None = None,
    bandwidth_at: Callable[[float], float] | None = None,
    fails: Callable[[int, int], LoadOutcome | None] = lambda chunk, block: None,
    depth: int = 3,
    min_claim_s: float = 0.0,
    check: Callable[[RestoreState, ComputeClaim], None] = lambda state, claim: None,
) -> VirtualRun:
    """Run to the end; ``bandwidth_at(now)`` is the link's true rate at the time a read begins on it."""
    truth = truth or planned
    rate = bandwidth_at or (lambda now: truth.link.bytes_per_s)
    state = RestoreState(planned, plan, LiveRates(bytes_per_s=planned.link.bytes_per_s), min_claim_s=min_claim_s)
    now, link_free, restored = 0.0, 0.0, None
    busy: tuple[float, float, ComputeClaim] | None = None
    reads: deque = deque()
    for _ in range(200_000):
        while len(reads) < depth:
            tile = state.claim_load(now)
            if tile is None:
                break
            start = max(now, link_free) + (truth.link.latency_s if not link_free else 0.0)
            link_free = start + truth.load_bytes_KB[tile.chunk_lo, tile.block_lo] / rate(start)
            reads.append((link_free, start, tile))
        if busy is None:
            claim = state.claim_compute(now)
            check(state, claim)
            if claim.kind is ClaimKind.DONE:
                end = now + truth.head_s
                return VirtualRun(restore_s=restored or 0.0, ttft_s=end, state=state)
            if claim.kind is not ClaimKind.WAIT:
                busy = (now + _true_s(truth, claim), now, claim)
                continue
            while len(reads) < depth and (tile := state.claim_load(now)) is not None:
                start = max(now, link_free)
                link_free = start + truth.load_bytes_KB[tile.chunk_lo, tile.block_lo] / rate(start)
                reads.append((link_free, start, tile))
        if busy is None and not reads:
            raise AssertionError(f"stuck at {now}: nobody works, {state.claim_compute(now)}")
        if reads and (busy is None or reads[0][0] <= busy[0]):
            end, start, tile = reads.popleft()
            now = end
            outcome = fails(tile.chunk_lo, tile.block_lo)
            if outcome is None:
                state.rates.observe_load(
                    num_bytes=int(truth.load_bytes_KB[tile.chunk_lo, tile.block_lo]), busy_s=end - start
                )
                if state.begin_place(tile):
                    state.complete_load(tile)
            else:
                state.fail_load(tile, outcome)
        else:
            end, start, claim = busy
            now, busy = end, None
            state.complete_compute(claim, actual_s=end - start)
        if restored is None and state.restored:
            restored = now
    raise AssertionError("no end in sight")


def _true_s(truth: RestoreProblem, claim: ComputeClaim) -> float:
    if claim.tile is None:
        return float(truth.suffix_B[claim.block_lo : claim.block_hi].sum())
    total = 0.0
    for chunk, block in claim.tile.cells():
        kv_only = claim.kv_only_top and block == claim.tile.block_hi - 1
        total += float((truth.kv_only_KB if kv_only else truth.compute_KB)[chunk, block])
    return total
