"""One restoration over pipeline stages in virtual time: a state machine, a GPU and a link for each stage.

The same state machine as live. Tensor-parallel ranks of a stage do the same at the same time, so one stands for all.
The new tokens follow once every stage is restored, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise

from cacheflow.plan.batch import Arrival
from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import Lane, Span, busy_share
from cacheflow.plan.stages import StageProblem, suffix_through_s
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.device import RecordingDevice, RequestTimes
from cacheflow.sim.link import SharedBandwidth, SimulatedLink
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.compute_side import ComputeClaim
from cacheflow.state.restoration import RestoreState


class HandOver(Enum):
    """When a stage hands activations over, of stages without stored boundaries."""

    CHUNK = "chunk"
    """Each chunk once it is recomputed, as ``restore.pipeline`` does."""
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
        loaded_bytes: Bytes of keys and values over its link, those that were not used included.
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
        num_suffix_chunks: Chunks of new tokens after the restoration.
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


class _Stage(RecordingDevice):
    """One stage under way: a virtual device with one restoration, that hands activations over to the stage above."""

    def __init__(self, loop: EventLoop, stage: StageProblem, plan: RestorePlan, link: SimulatedLink) -> None:
        rates = LiveRates(bytes_per_s=stage.problem.link.bytes_per_s)
        super().__init__(loop, BatchScheduler(Arrival(), rates), link)
        self.state = RestoreState(stage.problem, plan, rates, source=stage.source)
        self.source = stage.source
        self.above: _Stage | None = None
        self.hand_over = HandOver.CHUNK
        self._climbed: list[int] = []
        self._completion: RequestTimes | None = None
        self.adopt(0, self.state, self._end)

    def pump(self) -> None:
        """See ``VirtualDevice``; the stage above knows when this one expects to hand what over."""
        if self.above is not None and not self.state.restored and self.hand_over is HandOver.CHUNK:
            self.state.keep_whole(not self.above.state.restored)
            now_s = self._loop.now_s
            self.above.state.expect_activations(self.state.whole_chunks_s(now_s), now_s)
        super().pump()

    def result(self) -> StageRun:
        """What came of it."""
        completion = self._completion
        assert completion is not None, "a stage whose restoration has ended"
        return StageRun(
            plan=self.state.plan,
            source=self.source,
            restore_s=completion.restored_at_s,
            cells_KB=self.state.board.letters(),
            loaded_bytes=completion.moved_bytes,
            boundary_bytes=self.state.boundary_bytes,
            spans=completion.spans,
        )

    def seconds(self, truth: RestoreProblem, claim: ComputeClaim) -> float:
        """See ``VirtualDevice``; the top block takes as long as in full where it is handed over."""
        tile = claim.tile
        if tile is None or not self._hands_over(tile):
            return super().seconds(truth, claim)
        return float(truth.compute_KB[tile.chunk_lo : tile.chunk_hi, tile.block_lo : tile.block_hi].sum())

    def computed(self, request_id: int, claim: ComputeClaim) -> None:
        """See ``VirtualDevice``; hands over what is recomputed up to the top."""
        if self.above is None or claim.tile is None or not self._hands_over(claim.tile):
            return
        for chunk in range(claim.tile.chunk_lo, claim.tile.chunk_hi):
            if self.hand_over is HandOver.CHUNK:
                self.above.take(chunk)
            else:
                self._climbed.append(chunk)

    def _hands_over(self, tile: Tile) -> bool:
        return self.above is not None and tile.block_hi == self.state.problem.grid.num_blocks

    def take(self, chunk: int) -> None:
        """Take a chunk's activations from the stage below, if there is anything left to recompute from them."""
        if self.state.boundaries.wants_activations(chunk):
            self.state.take_activations(chunk)
            self.pump()

    def _end(self, completion: RequestTimes) -> None:
        self._completion = completion
        if self.above is not None:
            above, self.above = self.above, None
            for chunk in self._climbed:
                above.take(chunk)
            above.state.end_activations()
            above.pump()
