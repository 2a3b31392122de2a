"""What was decided and what came of it, as data; metrics, tables and timeline pictures are made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from cacheflow.plan.grid import Boundary, Piece, Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource


class Lane(Enum):
    """Which resource a span kept busy."""

    COMPUTE = "compute"
    IO = "io"


class SpanKind(Enum):
    """What a resource did during a span."""

    RECOMPUTE = "recompute"
    KV_ONLY = "kv_only"
    REPAIR = "repair"
    SUFFIX = "suffix"
    LOAD = "load"
    BOUNDARY = "boundary"
    WASTED = "wasted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of work; times in seconds from the start of the restoration.

    ``chunk`` is -1 for the suffix; boundary states have no block: ``block_lo`` and ``block_hi`` are 0.
    """

    lane: Lane
    kind: SpanKind
    start_s: float
    end_s: float
    chunk: int
    block_lo: int
    block_hi: int

    def shifted(self, seconds: float) -> Span:
        """The same on a clock that began ``-seconds`` later."""
        return replace(self, start_s=self.start_s + seconds, end_s=self.end_s + seconds)

    @classmethod
    def of_compute(cls, kind: SpanKind, tile: Tile, start_s: float, end_s: float) -> Span:
        """A tile's, or the suffix's through a tile's blocks."""
        return cls(
            lane=Lane.COMPUTE,
            kind=kind,
            start_s=start_s,
            end_s=end_s,
            chunk=-1 if kind is SpanKind.SUFFIX else tile.chunk_lo,
            block_lo=tile.block_lo,
            block_hi=tile.block_hi,
        )

    @classmethod
    def of_read(cls, kind: SpanKind, piece: Piece, start_s: float, end_s: float) -> Span:
        """A read's, of the time the link worked on it; one of boundary states that was of use is ``BOUNDARY``."""
        if isinstance(piece, Boundary):
            block_lo = block_hi = 0
            kind = SpanKind.BOUNDARY if kind is SpanKind.LOAD else kind
        else:
            block_lo, block_hi = piece.block, piece.block + 1
        return cls(
            lane=Lane.IO,
            kind=kind,
            start_s=max(0.0, start_s),
            end_s=end_s,
            chunk=piece.chunk,
            block_lo=block_lo,
            block_hi=block_hi,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """Planned and actual split of one restoration.

    Attributes:
        plan: What was planned, with the guard's choice and reason.
        cells_KB: Per chunk a string of one letter a block: ``c`` recomputed, ``l`` loaded.
        restore_s: When the last prefix cell was resident.
        ttft_s: When the first token was there; None without a suffix.
        recomputed_cells: Cells that compute restored, repairs included.
        loaded_cells: Cells that the link restored.
        repaired_cells: Cells recomputed because the link failed or was too slow.
        failed_loads: Reads by outcome, other than OK.
        loaded_bytes: Bytes the link delivered into the KV buffer.
        wasted_bytes: Bytes that were read and not used.
        planning_s: Seconds from the costs to the plan.
        overhead_s: Seconds the compute thread spent in the executor instead of in the model, waiting excluded.
        boundary_source: Where the activations below the bottom block came from.
        boundary_bytes: Bytes of boundary states that arrived.
        spans: Every stretch of work of both lanes.
    """

    plan: RestorePlan
    cells_KB: tuple[str, ...]
    restore_s: float
    ttft_s: float | None
    recomputed_cells: int
    loaded_cells: int
    repaired_cells: int
    failed_loads: Mapping[str, int]
    loaded_bytes: int
    wasted_bytes: int
    planning_s: float
    overhead_s: float
    spans: tuple[Span, ...] = field(repr=False)
    boundary_source: BoundarySource = BoundarySource.FIRST_STAGE
    boundary_bytes: int = 0

    @property
    def end_s(self) -> float:
        """When the request was served: first token, or the last prefix cell without a suffix."""
        return self.restore_s if self.ttft_s is None else self.ttft_s

    @property
    def compute_busy(self) -> float:
        """Share of the restoration during which compute worked."""
        return busy_share(self.spans, Lane.COMPUTE, self.restore_s)

    @property
    def io_busy(self) -> float:
        """Share of the restoration during which the link worked."""
        return busy_share(self.spans, Lane.IO, self.restore_s)

    def as_dict(self) -> dict[str, object]:
        """The record as plain data, without the spans."""
        guard = self.plan.guard
        return {
            "policy": self.plan.policy,
            "choice": guard.choice.value if guard else None,
            "reason": guard.reason if guard else None,
            "planned_levels": list(self.plan.levels_K),
            "planned_restore_s": self.plan.predicted.restore_s,
            "planned_ttft_s": self.plan.predicted.ttft_s,
            "cells": list(self.cells_KB),
            "restore_s": self.restore_s,
            "ttft_s": self.ttft_s,
            "recomputed_cells": self.recomputed_cells,
            "loaded_cells": self.loaded_cells,
            "repaired_cells": self.repaired_cells,
            "failed_loads": dict(self.failed_loads),
            "loaded_bytes": self.loaded_bytes,
            "wasted_bytes": self.wasted_bytes,
            "boundary_source": self.boundary_source.value,
            "boundary_bytes": self.boundary_bytes,
            "compute_busy": self.compute_busy,
            "io_busy": self.io_busy,
            "planning_s": self.planning_s,
            "overhead_s": self.overhead_s,
        }


def busy_share(spans: Iterable[Span], lane: Lane, end_s: float) -> float:
    """Share of ``[0, end_s]`` that the union of a lane's spans covers; 0 for an empty interval."""
    covered, reached = 0.0, 0.0
    for span in sorted((s for s in spans if s.lane is lane), key=lambda s: s.start_s):
        start, end = max(span.start_s, reached), min(span.end_s, end_s)
        if end > start:
            covered += end - start
            reached = end
    return covered / end_s if end_s > 0 else 0.0
