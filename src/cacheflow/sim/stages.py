"""One restoration over pipeline stages in virtual time: a state machine, a GPU and a link for each stage.

The same state machine as live. Tensor-parallel ranks of a stage do the same at the same time, so one stands for all.
The new tokens follow once every stage is restored, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import pairwise

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.stages import StageProblem, suffix_through_s
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import READS_IN_FLIGHT
from cacheflow.sim.link import SharedBandwidth, SimulatedLink
from cacheflow.state.claims import ClaimKind, ComputeClaim
from cacheflow.state.report import Lane, Span, SpanKind, busy_share, cell_letters
from cacheflow.state.restoration import RestoreState


class HandOver(Enum):
    """When a stage hands activations over, of stages without stored boundaries."""

    CHUNK = "chunk"
    """Each chunk once it is recomputed, as ``restore.staged`` does."""
    PREFIX = "prefix"
    """All chunks once the stage recomputes none any more: a stage waits for the whole one below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """What came of one stage.

    Attributes:
        plan: What was planned.
        source: Where its boundary states came from.
        restore_s: When its last prefix cell was there.
        cells_KB: Per chunk a string of one letter a block: ``c`` recomputed, ``l`` loaded.
        loaded_bytes: Bytes of keys and values over its link, those read in vain included.
        boundary_bytes: Bytes of boundary states over its link.
        spans: What its GPU and its link did.
    """

    plan: RestorePlan
    source: BoundarySource
    restore_s: float
    cells_KB: tuple[str, ...]
    loaded_bytes: int
    boundary_bytes: int
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def recomputed_share(self) -> float:
        """Share of the cells that compute restored."""
        return sum(column.count("c") for column in self.cells_KB) / sum(map(len, self.cells_KB))

    def busy(self, lane: Lane) -> float:
        """Share of the stage's restoration during which its GPU or its link worked."""
        return busy_share(self.spans, lane, self.restore_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRun:
    """What came of a restoration over stages.

    Attributes:
        restore_s: When the last stage was restored.
        ttft_s: When the first token was there.
        stages: Bottom stage first.
    """

    restore_s: float
    ttft_s: float
    stages: tuple[StageRun, ...]


def run_stages(
    stages: Sequence[StageProblem],
    plans: Sequence[RestorePlan],
    *,
    num_suffix_chunks: int = 0,
    shared_link: bool = False,
    hand_over: HandOver = HandOver.CHUNK,
) -> PipelineRun:
    """Restore on hardware that costs exactly what the problems say.

    Args:
        stages: Bottom stage first, at least one chunk each; on a shared link each with its even share of it.
        plans: Of each stage.
        num_suffix_chunks: Chunks of new tokens behind the restoration.
        shared_link: The links are shares of one that serves reads as they come.
        hand_over: How stages without stored boundaries get at activations.
    """
    loop = EventLoop()
    shared = SharedBandwidth(stages[0].problem.link.bytes_per_s * len(stages)) if shared_link else None
    running: list[_Stage] = []
    for stage, plan in zip(stages, plans, strict=True):
        cost = stage.problem.link
        if shared is not None:
            cost = replace(cost, bytes_per_s=cost.bytes_per_s * len(stages))
        running.append(_Stage(loop, stage, plan, SimulatedLink(loop, cost, shared=shared)))
    for below, above in pairwise(running):
        if above.source is BoundarySource.HANDED_OVER:
            below.above, below.hand_over = above, hand_over
    for each in running:
        each.pump()
    loop.run()
    results = tuple(each.result() for each in running)
    restore_s = max(each.restore_s for each in results)
    return PipelineRun(
        restore_s=restore_s,
        ttft_s=restore_s + suffix_through_s(tuple(stages), num_suffix_chunks),
        stages=results,
    )


class _Stage:
    """One stage under way; asks its state machine whenever its GPU or its link is free."""

    def __init__(self, loop: EventLoop, stage: StageProblem, plan: RestorePlan, link: SimulatedLink) -> None:
        rates = LiveRates(bytes_per_s=stage.problem.link.bytes_per_s)
        self.state = RestoreState(stage.problem, plan, rates, source=stage.source)
        self.source = stage.source
        self.above: _Stage | None = None
        self.hand_over = HandOver.CHUNK
        self._loop, self._problem, self._link = loop, stage.problem, link
        self._climbed: list[int] = []
        self._computing = False
        self._num_reads = 0
        self._restore_s: float | None = None
        self._loaded_bytes = 0
        self._spans: list[Span] = []

    def pump(self) -> None:
        """Give the link and the GPU what there is to do."""
        if self.above is not None and not self.state.restored and self.hand_over is HandOver.CHUNK:
            self.state.keep_whole(not self.above.state.restored)
            self.above.state.boundary.expect(self.state.whole_chunks_s(self._loop.now_s), self._loop.now_s)
        self._start_reads()
        if not self._computing:
            self._start_compute()
            self._start_reads()  # compute may have left cells to the link
        if self._restore_s is None and self.state.restored:
            self._restore_s = self._loop.now_s

    def result(self) -> StageRun:
        """What came of it."""
        assert self._restore_s is not None, "a stage whose restoration has ended"
        return StageRun(
            plan=self.state.plan,
            source=self.source,
            restore_s=self._restore_s,
            cells_KB=cell_letters(self.state),
            loaded_bytes=self._loaded_bytes,
            boundary_bytes=self.state.boundary.loaded_bytes,
            spans=tuple(self._spans),
        )

    def _start_compute(self) -> None:
        claim = self.state.claim_compute(self._loop.now_s)
        if claim.kind in (ClaimKind.RECOMPUTE, ClaimKind.REPAIR):
            self._computing = True
            end_s = self._loop.now_s + self._seconds(claim)
            self._loop.at(end_s, partial(self._end_compute, claim, self._loop.now_s), priority=1)
        elif self.above is not None and self.state.restored:
            above, self.above = self.above, None
            for chunk in self._climbed:
                above.take(chunk)
            above.leave()

    def _seconds(self, claim: ComputeClaim) -> float:
        """What a claim takes; the top block in full where it is handed over."""
        assert claim.tile is not None, "a stage computes prefix cells only"
        if self.above is None or claim.tile.block_hi < self._problem.grid.num_blocks:
            return claim.predicted_s
        tile = claim.tile
        return float(self._problem.compute_KB[tile.chunk_lo : tile.chunk_hi, tile.block_lo : tile.block_hi].sum())

    def _end_compute(self, claim: ComputeClaim, start_s: float) -> None:
        assert claim.tile is not None, "a stage computes prefix cells only"
        self._computing = False
        self.state.complete_compute(claim, actual_s=self._loop.now_s - start_s)
        at_top = claim.tile.block_hi == self._problem.grid.num_blocks
        hands_over = self.above is not None and at_top
        kv_only = claim.kv_only_top and claim.tile.num_cells == 1 and not hands_over
        self._note(Lane.COMPUTE, SpanKind.KV_ONLY if kv_only else SpanKind.RECOMPUTE, start_s, claim.tile)
        if self.above is not None and at_top:
            for chunk in range(claim.tile.chunk_lo, claim.tile.chunk_hi):
                if self.hand_over is HandOver.CHUNK:
                    self.above.take(chunk)
                else:
                    self._climbed.append(chunk)
        self.pump()

    def take(self, chunk: int) -> None:
        """Take a chunk's activations from the stage below, if there is anything left to recompute from them."""
        if self.state.boundary.wants(chunk):
            self.state.boundary.hand_over(chunk)
            self.pump()

    def leave(self) -> None:
        """Leave to the link what is not handed over any more."""
        self.state.boundary.lose_unread()
        self.pump()

    def _start_reads(self) -> None:
        while self._num_reads < READS_IN_FLIGHT:
            now_s = self._loop.now_s
            chunk = self.state.boundary.claim(now_s)
            if chunk is not None:
                num_bytes = int(self._problem.boundary_bytes_K[chunk])
                self._read(num_bytes, partial(self._end_boundary, chunk, num_bytes))
                continue
            tile = self.state.claim_load(now_s)
            if tile is None:
                return
            num_bytes = int(self._problem.load_bytes_KB[tile.chunk_lo, tile.block_lo])
            self._read(num_bytes, partial(self._end_load, tile, num_bytes))

    def _read(self, num_bytes: int, done: partial[None]) -> None:
        self._num_reads += 1
        self._link.read(num_bytes, done)

    def _end_boundary(self, chunk: int, num_bytes: int, busy_s: float) -> None:
        self._num_reads -= 1
        self.state.rates.observe_load(num_bytes=num_bytes, busy_s=busy_s)
        self.state.boundary.complete(chunk, self._loop.now_s)
        self._note(Lane.IO, SpanKind.BOUNDARY, self._loop.now_s - busy_s, Tile(chunk, chunk + 1, 0, 1))
        self.pump()

    def _end_load(self, tile: Tile, num_bytes: int, busy_s: float) -> None:
        self._num_reads -= 1
        self._loaded_bytes += num_bytes
        self.state.rates.observe_load(num_bytes=num_bytes, busy_s=busy_s)
        wanted = self.state.begin_place(tile)
        if wanted:
            self.state.complete_load(tile)
        self._note(Lane.IO, SpanKind.LOAD if wanted else SpanKind.WASTED, self._loop.now_s - busy_s, tile)
        self.pump()

    def _note(self, lane: Lane, kind: SpanKind, start_s: float, tile: Tile) -> None:
        self._spans.append(
            Span(
                lane=lane,
                kind=kind,
                start_s=start_s,
                end_s=self._loop.now_s,
                chunk=tile.chunk_lo,
                block_lo=tile.block_lo,
                block_hi=tile.block_hi,
            )
        )
