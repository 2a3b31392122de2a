"""Pipeline stages, each with a GPU and a link of its own, by the state machine of every stage.

With the GPU axis a stage reads the boundary states of the chunks it recomputes from its link and starts at once.
Without it activations come up through the stages: chunk by chunk, or, as a naive recompute does, once a stage has
ended the whole prefix. The new tokens pass the stages one after the other once all are restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import msgspec
import numpy as np

from cacheflow.bench.figures.place import Place
from cacheflow.bench.figures.points import Varied
from cacheflow.bench.figures.runs import alone
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.report import Lane
from cacheflow.plan.stage_bounds import staged_bound
from cacheflow.plan.stages import RankLayout, StageProblem, stage_problems
from cacheflow.policies.recompute import Recompute
from cacheflow.policies.registry import make_policy
from cacheflow.policies.stages import plan_stages
from cacheflow.sim.stages import HandOver, run_stages

POLICY = "cacheflow"


@dataclass(frozen=True, slots=True)
class _Way:
    """How stages restore: where later ones take activations from, when they get them, and by what plans."""

    series: str
    later: BoundarySource
    hand_over: HandOver = HandOver.CHUNK

    def plans(self, stages: tuple[StageProblem, ...]) -> list[RestorePlan]:
        """A plan for each stage."""
        if self.series == "recompute":
            return [Recompute().plan(stage.problem) for stage in stages]
        problems, sources = [stage.problem for stage in stages], [stage.source for stage in stages]
        return plan_stages(make_policy(POLICY), problems, sources)


WAYS = (
    _Way("recompute", BoundarySource.HANDED_OVER),
    _Way("load", BoundarySource.NONE),
    _Way("without GPU axis, stage by stage", BoundarySource.HANDED_OVER, HandOver.PREFIX),
    _Way("without GPU axis", BoundarySource.HANDED_OVER),
    _Way("with GPU axis", BoundarySource.STORED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """One stage under every policy, then every way on more."""

    sizes: Varied[tuple[int, int]]
    num_stages: tuple[int, ...]

    def records(self, suite: str, fast: bool) -> Iterator[FigureRecord]:
        """See ``Points``."""
        place = Place()
        for num_tokens, suffix_tokens in self.sizes.of(fast):
            problem = place.problem(num_tokens=num_tokens, suffix_tokens=suffix_tokens)
            single = list(alone(suite, place, problem))
            yield from single
            for num_stages in self.num_stages:
                yield from _staged(place, problem, single[0], num_stages)


def _staged(place: Place, problem: RestoreProblem, like: FigureRecord, num_stages: int) -> Iterator[FigureRecord]:
    layout, num_suffix = RankLayout(pipeline_parallel_size=num_stages), len(problem.grid.suffix_ends)
    # The least of any way: as if boundary states were there for nothing.
    least = staged_bound(
        [_free(stage) for stage in stage_problems(problem, place.shape, layout)], num_suffix_chunks=num_suffix
    )
    for way in WAYS:
        stages = stage_problems(problem, place.shape, layout, way.later)
        if way.series == "load":
            stages = tuple(replace(stage, source=BoundarySource.NONE) for stage in stages)
        run = run_stages(stages, way.plans(stages), num_suffix_chunks=num_suffix, hand_over=way.hand_over)
        ends = [stage.restore_s / run.restore_s for stage in run.stages]
        yield msgspec.structs.replace(
            like, series=way.series, policy=way.series, num_stages=num_stages, workload="stages",
            restore_s=run.restore_s, ttft_s=run.ttft_s, bound_restore_s=least.restore_s, bound_ttft_s=least.ttft_s,
            compute_busy=fmean(s.busy(Lane.COMPUTE) * end for s, end in zip(run.stages, ends, strict=True)),
            io_busy=fmean(s.busy(Lane.IO) * end for s, end in zip(run.stages, ends, strict=True)),
        )  # fmt: skip


def _free(stage: StageProblem) -> StageProblem:
    nothing = np.zeros(stage.problem.grid.num_chunks, dtype=np.int64)
    return replace(stage, problem=replace(stage.problem, boundary_bytes_K=nothing))
