"""Drives one restoration's state machine by a virtual clock: true costs may differ from the ones planned with.

Unlike ``bench.rehearsal``, which predicts, this one breaks things: other costs, a changing link, failing reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.state.claims import ClaimKind, ComputeClaim
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

MAX_EVENTS = 200_000


@dataclass(kw_only=True)
class Conditions:
    """What the hardware really does; ``bandwidth_at(now)`` is the link's rate when a read begins on it."""

    truth: RestoreProblem | None = None
    bandwidth_at: Callable[[float], float] | None = None
    fails: Callable[[int, int], LoadOutcome | None] = lambda chunk, block: None
    check: Callable[[RestoreState, ComputeClaim], None] = lambda state, claim: None


@dataclass
class VirtualRun:
    """One restoration from the first event to the last."""

    truth: RestoreProblem
    state: RestoreState
    conditions: Conditions
    depth: int
    now: float = 0.0
    restore_s: float = 0.0
    ttft_s: float = 0.0
    _link_free: float = 0.0
    _reads: deque[tuple[float, float, Tile]] = field(default_factory=deque)
    _work: tuple[float, float, ComputeClaim] | None = None

    def run(self) -> VirtualRun:
        for _ in range(MAX_EVENTS):
            if not self._give_work():
                self.ttft_s = self.now + self.truth.head_s
                return self
            assert self._reads or self._work, f"stuck at {self.now}: nobody works"
            if self._reads and (self._work is None or self._reads[0][0] <= self._work[0]):
                self._end_read(*self._reads.popleft())
            else:
                end, start, claim = self._work
                self.now, self._work = end, None
                self.state.complete_compute(claim, actual_s=end - start)
            if self.state.restored and not self.restore_s:
                self.restore_s = self.now
        raise AssertionError("no end in sight")

    def _give_work(self) -> bool:
        self._start_reads()
        if self._work is None:
            claim = self.state.claim_compute(self.now)
            self.conditions.check(self.state, claim)
            if claim.kind is ClaimKind.DONE:
                return False
            if claim.kind is not ClaimKind.WAIT:
                self._work = (self.now + true_s(self.truth, claim), self.now, claim)
            self._start_reads()
        return True

    def _start_reads(self) -> None:
        while len(self._reads) < self.depth and (tile := self.state.claim_load(self.now)) is not None:
            start = max(self.now, self._link_free)
            rate = self.conditions.bandwidth_at(start) if self.conditions.bandwidth_at else self.truth.link.bytes_per_s
            self._link_free = start + self.truth.load_bytes_KB[tile.chunk_lo, tile.block_lo] / rate
            self._reads.append((self._link_free, start, tile))

    def _end_read(self, end: float, start: float, tile: Tile) -> None:
        self.now = end
        outcome = self.conditions.fails(tile.chunk_lo, tile.block_lo)
        if outcome is not None:
            self.state.fail_load(tile, outcome)
            return
        num_bytes = int(self.truth.load_bytes_KB[tile.chunk_lo, tile.block_lo])
        self.state.rates.observe_load(num_bytes=num_bytes, busy_s=end - start)
        if self.state.begin_place(tile):
            self.state.complete_load(tile)


def run_virtual(
    planned: RestoreProblem,
    plan: RestorePlan,
    conditions: Conditions | None = None,
    *,
    depth: int = 3,
    min_claim_s: float = 0.0,
) -> VirtualRun:
    """Run a plan to its end, planned with ``planned`` and carried out under ``conditions``."""
    conditions = conditions or Conditions()
    state = RestoreState(planned, plan, LiveRates(bytes_per_s=planned.link.bytes_per_s), min_claim_s=min_claim_s)
    return VirtualRun(conditions.truth or planned, state, conditions, depth).run()


def true_s(truth: RestoreProblem, claim: ComputeClaim) -> float:
    if claim.tile is None:
        return float(truth.suffix_B[claim.block_lo : claim.block_hi].sum())
    total = 0.0
    for chunk, block in claim.tile.cells():
        kv_only = claim.kv_only_top and block == claim.tile.block_hi - 1
        total += float((truth.kv_only_KB if kv_only else truth.compute_KB)[chunk, block])
    return total
