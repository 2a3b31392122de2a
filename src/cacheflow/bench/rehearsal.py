"""A plan carried out under a virtual clock: the same state machine as live, with costs that come true.

This is how ``cacheflow plan`` predicts: every policy meets its own rules for claiming, sharing and starting the new
tokens, on hardware that behaves exactly as its costs say.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.state.claims import ClaimKind, ComputeClaim
from cacheflow.state.report import Lane, Span, SpanKind, cell_letters
from cacheflow.state.restoration import RestoreState

READS_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What came of a plan.

    Attributes:
        plan: What was carried out.
        restore_s: When the last prefix cell was there.
        ttft_s: When the first token was there; equals ``restore_s`` without a suffix.
        cells_KB: Per chunk a string of one letter a block: ``c`` recomputed, ``l`` loaded.
        loaded_bytes: Bytes over the link, those of reads in vain included.
        spans: What both lanes did.
    """

    plan: RestorePlan
    restore_s: float
    ttft_s: float
    cells_KB: tuple[str, ...]
    loaded_bytes: int
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def recomputed_share(self) -> float:
        """Share of the cells that compute restored; 0 for an empty prefix."""
        num_cells = sum(map(len, self.cells_KB))
        return sum(column.count("c") for column in self.cells_KB) / num_cells if num_cells else 0.0


def rehearse(problem: RestoreProblem, plan: RestorePlan) -> Rehearsal:
    """Carry a plan out to the first token on hardware that costs exactly what the problem says."""
    stage = _Stage(problem, plan)
    stage.run()
    return Rehearsal(
        plan=plan,
        restore_s=stage.restored_s,
        ttft_s=stage.now_s + problem.head_s,
        cells_KB=cell_letters(stage.state),
        loaded_bytes=stage.loaded_bytes,
        spans=tuple(stage.spans),
    )


@dataclass(frozen=True, slots=True)
class _Read:
    tile: Tile
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class _Order:
    claim: ComputeClaim
    start_s: float
    end_s: float


class _Stage:
    """The virtual clock, the link and the one compute resource."""

    def __init__(self, problem: RestoreProblem, plan: RestorePlan) -> None:
        self.now_s = 0.0
        self.restored_s = 0.0
        self.loaded_bytes = 0
        self.spans: list[Span] = []
        self._problem = problem
        self.state = RestoreState(problem, plan, LiveRates(bytes_per_s=problem.link.bytes_per_s))
        self._reads: deque[_Read] = deque()
        self._order: _Order | None = None
        self._link_free_s = problem.link.latency_s

    def run(self) -> None:
        """Go from event to event until compute has nothing left to do."""
        while self._give_work():
            if self._reads and (self._order is None or self._reads[0].end_s <= self._order.end_s):
                self._end_read(self._reads.popleft())
            else:
                assert self._order is not None, "a restoration that is not done has work under way"
                self._end_order(self._order)
            if self.restored_s == 0.0 and self.state.restored:
                self.restored_s = self.now_s

    def _give_work(self) -> bool:
        """Fill the link and compute; False when the restoration and the new tokens are done."""
        self._start_reads()
        if self._order is None:
            claim = self.state.claim_compute(self.now_s)
            if claim.kind is ClaimKind.DONE:
                return False
            if claim.kind is not ClaimKind.WAIT:
                self._order = _Order(claim, self.now_s, self.now_s + claim.predicted_s)
            self._start_reads()  # compute may have left cells to the link
        return True

    def _start_reads(self) -> None:
        while len(self._reads) < READS_IN_FLIGHT and (tile := self.state.claim_load(self.now_s)) is not None:
            start_s = max(self.now_s, self._link_free_s)
            self._link_free_s = start_s + self._num_bytes(tile) / self._problem.link.bytes_per_s
            self._reads.append(_Read(tile, start_s, self._link_free_s))

    def _end_read(self, read: _Read) -> None:
        self.now_s = read.end_s
        num_bytes = self._num_bytes(read.tile)
        self.loaded_bytes += num_bytes
        self.state.rates.observe_load(num_bytes=num_bytes, busy_s=read.end_s - read.start_s)
        wanted = self.state.begin_place(read.tile)
        if wanted:
            self.state.complete_load(read.tile)
        kind = SpanKind.LOAD if wanted else SpanKind.WASTED
        self._note(Lane.IO, kind, read.start_s, tile=read.tile, chunk=read.tile.chunk_lo)

    def _end_order(self, order: _Order) -> None:
        self.now_s, self._order = order.end_s, None
        claim = order.claim
        self.state.complete_compute(claim, actual_s=order.end_s - order.start_s)
        if claim.tile is None:
            suffix = Tile(0, 1, claim.block_lo, claim.block_hi)
            self._note(Lane.COMPUTE, SpanKind.SUFFIX, order.start_s, tile=suffix, chunk=-1)
            return
        kind = SpanKind.KV_ONLY if claim.kv_only_top and claim.tile.num_cells == 1 else SpanKind.RECOMPUTE
        kind = SpanKind.REPAIR if claim.kind is ClaimKind.REPAIR else kind
        self._note(Lane.COMPUTE, kind, order.start_s, tile=claim.tile, chunk=claim.tile.chunk_lo)

    def _note(self, lane: Lane, kind: SpanKind, start_s: float, *, tile: Tile, chunk: int) -> None:
        self.spans.append(
            Span(
                lane=lane,
                kind=kind,
                start_s=start_s,
                end_s=self.now_s,
                chunk=chunk,
                block_lo=tile.block_lo,
                block_hi=tile.block_hi,
            )
        )

    def _num_bytes(self, tile: Tile) -> int:
        return int(self._problem.load_bytes_KB[tile.chunk_lo, tile.block_lo])
