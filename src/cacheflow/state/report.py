"""What was decided and what came of it, as data: the record behind every metric, table and timeline picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource
from cacheflow.state.board import CellState
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome


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

    ``chunk`` is -1 for the suffix.
    """

    lane: Lane
    kind: SpanKind
    start_s: float
    end_s: float
    chunk: int
    block_lo: int
    block_hi: int


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


def cell_letters(state: RestoreState) -> tuple[str, ...]:
    """How each cell was restored, a string per chunk, a letter per block: ``c``, ``l``, or ``.`` when missing."""
    letters = {CellState.COMPUTED: "c", CellState.LOADED: "l"}
    grid = state.problem.grid
    return tuple(
        "".join(letters.get(state.cell(chunk, block), ".") for block in range(grid.num_blocks))
        for chunk in range(grid.num_chunks)
    )


def restoration_report(
    state: RestoreState,
    *,
    restore_s: float,
    spans: Iterable[Span],
    ttft_s: float | None = None,
    planning_s: float = 0.0,
    overhead_s: float = 0.0,
) -> RestoreReport:
    """The record of a restoration; what is not resident counts as neither loaded nor recomputed."""
    letters = cell_letters(state)
    loaded = [(chunk, block) for chunk, row in enumerate(letters) for block, cell in enumerate(row) if cell == "l"]
    return RestoreReport(
        plan=state.plan,
        cells_KB=letters,
        restore_s=restore_s,
        ttft_s=ttft_s,
        recomputed_cells=sum(row.count("c") for row in letters),
        loaded_cells=len(loaded),
        repaired_cells=state.num_repaired,
        failed_loads={outcome.value: n for outcome, n in state.outcomes.items() if outcome is not LoadOutcome.OK},
        loaded_bytes=sum(int(state.problem.load_bytes_KB[cell]) for cell in loaded),
        wasted_bytes=state.wasted_bytes,
        planning_s=planning_s,
        overhead_s=overhead_s,
        spans=tuple(spans),
        boundary_source=state.boundary.source,
        boundary_bytes=state.boundary.loaded_bytes,
    )
