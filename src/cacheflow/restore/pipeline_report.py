"""What came of a restoration over several stages: each stage for itself, and all of them as one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from cacheflow.plan.report import RestoreReport, Span
from cacheflow.plan.stage_bounds import stage_bound
from cacheflow.state.restoration import RestoreState


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineReport:
    """Reports of all stages, bottom stage first.

    Attributes:
        stages: What came of each; times from the restoration's start.
        bounds_s: The least time in which each could have been restored, with its boundary bytes.
    """

    stages: tuple[RestoreReport, ...]
    bounds_s: tuple[float, ...]

    @classmethod
    def of(cls, reports: Sequence[RestoreReport], states: Sequence[RestoreState]) -> PipelineReport:
        """Join the stages' reports with their bounds."""
        bounds_s = tuple(stage_bound(state.problem, state.boundaries.source).restore_s for state in states)
        return cls(stages=tuple(reports), bounds_s=bounds_s)

    @property
    def bound_restore_s(self) -> float:
        """No restoration of all stages ends before this: the slowest stage's bound."""
        return max(self.bounds_s)

    def as_dicts(self) -> list[dict[str, object]]:
        """One record a stage: how its boundaries came, what was recomputed and loaded, its time and its bound."""
        return [
            {
                "stage": index,
                "boundary_source": report.boundary_source.value,
                "boundary_bytes": report.boundary_bytes,
                "recomputed_cells": report.recomputed_cells,
                "loaded_cells": report.loaded_cells,
                "loaded_bytes": report.loaded_bytes,
                "wasted_bytes": report.wasted_bytes,
                "failed_loads": dict(report.failed_loads),
                "restore_s": report.restore_s,
                "bound_restore_s": bound_s,
                "cells": list(report.cells_KB),
            }
            for index, (report, bound_s) in enumerate(zip(self.stages, self.bounds_s, strict=True))
        ]

    def merged(self, *, planning_s: float = 0.0) -> RestoreReport:
        """All stages as one model: cells bottom stage first, the plan of the stage that was planned to end last.

        Args:
            planning_s: Seconds the plans took.
        """
        reports = self.stages
        slowest = max(reports, key=lambda report: report.plan.predicted.restore_s)
        offsets = [0, *accumulate(len(report.cells_KB[0]) for report in reports[:-1])]
        failed: Counter[str] = Counter()
        for report in reports:
            failed.update(report.failed_loads)
        return replace(
            slowest,
            cells_KB=tuple(map("".join, zip(*(report.cells_KB for report in reports), strict=True))),
            restore_s=max(report.restore_s for report in reports),
            recomputed_cells=sum(report.recomputed_cells for report in reports),
            loaded_cells=sum(report.loaded_cells for report in reports),
            repaired_cells=sum(report.repaired_cells for report in reports),
            failed_loads=dict(failed),
            loaded_bytes=sum(report.loaded_bytes for report in reports),
            wasted_bytes=sum(report.wasted_bytes for report in reports),
            planning_s=planning_s,
            spans=tuple(
                _raised(span, below) for report, below in zip(reports, offsets, strict=True) for span in report.spans
            ),
            boundary_source=reports[-1].boundary_source,
            boundary_bytes=sum(report.boundary_bytes for report in reports),
        )


def _raised(span: Span, num_below: int) -> Span:
    return replace(span, block_lo=span.block_lo + num_below, block_hi=span.block_hi + num_below)
