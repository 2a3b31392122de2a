"""What ``cacheflow plan`` shows of several pipeline stages: every way to restore them, and the faster one by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from cacheflow.bench.table import Row, over, seconds, size, text_table
from cacheflow.bench.timeline import Timeline
from cacheflow.model_shape import ModelShape
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.stage_bounds import StagedBound, staged_bound
from cacheflow.plan.stages import RankLayout, StageProblem, split_layers, stage_problems
from cacheflow.policies.recompute import Recompute
from cacheflow.policies.registry import make_policy
from cacheflow.policies.stages import plan_stages
from cacheflow.sim.stages import HandOver, PipelineRun, run_stages

RECOMPUTE, LOAD = "recompute", "load"
STAGE_BY_STAGE = "stage by stage"
HANDED_OVER = "handed over"
STORED = "stored states"
TIE = 1.01
"""Ways that differ by less take the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to restore all stages.

    Attributes:
        bound: The least possible times this way, waiting for another stage not counted.
    """

    name: str
    stages: tuple[StageProblem, ...]
    run: PipelineRun
    bound: StagedBound


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesReport:
    """One restoration over stages, predicted in every way.

    Attributes:
        layers: Layers ``[lo, hi)`` of each stage.
    """

    title: str
    ways: tuple[Way, ...]
    layers: tuple[tuple[int, int], ...]
    has_suffix: bool

    @property
    def best(self) -> Way:
        """The faster of the two ways that recompute and load at once as ``cacheflow`` does."""
        return min((self.way(STORED), self.way(HANDED_OVER)), key=lambda way: way.run.restore_s)

    @property
    def least_restore_s(self) -> float:
        """The least that restoration could take in any of the ways."""
        return min(way.bound.restore_s for way in self.ways)

    def way(self, name: str) -> Way:
        """The way of that name."""
        return next(way for way in self.ways if way.name == name)


def predict_stages(
    problem: RestoreProblem, shape: ModelShape, layout: RankLayout, *, policy: str, title: str
) -> StagesReport:
    """Restore in every way in virtual time.

    Raises:
        ConfigError: The layout does not fit the model.
    """
    kinds = (
        (RECOMPUTE, BoundarySource.HANDED_OVER),
        (LOAD, BoundarySource.NONE),
        (STAGE_BY_STAGE, BoundarySource.HANDED_OVER),
        (HANDED_OVER, BoundarySource.HANDED_OVER),
        (STORED, BoundarySource.STORED),
    )
    num_suffix = len(problem.grid.suffix_ends)
    ways = []
    for name, later in kinds:
        stages = stage_problems(problem, shape, layout, later)
        shared = not layout.link_per_rank
        hand_over = HandOver.PREFIX if name == STAGE_BY_STAGE else HandOver.CHUNK
        run = run_stages(
            stages, _plans(name, policy, stages), num_suffix_chunks=num_suffix, shared_link=shared, hand_over=hand_over
        )
        least = staged_bound(stages, num_suffix_chunks=num_suffix, shared_link=shared)
        ways.append(Way(name=name, stages=stages, run=run, bound=least))
    return StagesReport(
        title=title,
        ways=tuple(ways),
        layers=split_layers(shape.num_layers, layout.pipeline_parallel_size),
        has_suffix=num_suffix > 0,
    )


def _plans(name: str, policy: str, stages: Sequence[StageProblem]) -> list[RestorePlan]:
    if name == RECOMPUTE:
        return [Recompute().plan(stage.problem) for stage in stages]
    return plan_stages(make_policy(policy), [stage.problem for stage in stages], [stage.source for stage in stages])


def ways_table(report: StagesReport) -> Table:
    """Predicted times of every way, restoration over the least of all too; bytes are those of one rank a stage."""
    rows: list[Row] = []
    for way in report.ways:
        stages = way.run.stages
        share = sum(stage.recomputed_share * (hi - lo) for stage, (lo, hi) in zip(stages, report.layers, strict=True))
        cells = (
            way.name,
            seconds(way.run.restore_s),
            over(way.run.restore_s, report.least_restore_s),
            seconds(way.run.ttft_s),
            f"{share / report.layers[-1][1]:.0%}",
            size(sum(stage.loaded_bytes for stage in stages)),
            size(sum(stage.boundary_bytes for stage in stages)),
        )
        rows.append((cells, "bold" if way is report.best else None))
    heads = ("way", "restore", "× bound", "TTFT", "computed", "loaded", "boundary")
    caption = f"× bound: over the least that any way could take. {LOAD}: stages above the first only load."
    return text_table(report.title, heads, rows, caption=caption, padding=1)


def axis_line(report: StagesReport) -> str:
    """Whether stored boundary states pay, and against what."""
    stored, handed = report.way(STORED).run.restore_s, report.way(HANDED_OVER).run.restore_s
    waits = report.way(STAGE_BY_STAGE).run.restore_s
    against = f"stages that each wait for the whole one below take {seconds(waits)}"
    if max(stored, handed) <= TIE * min(stored, handed):
        return (
            f"GPU axis: makes no difference here: {seconds(stored)} with stored boundary states or without; {against}."
        )
    if stored < handed:
        return f"GPU axis: pays: {handed / stored:.2f} times as fast as handing chunks over in order; {against}."
    return (
        f"GPU axis: does not pay here: handing chunks over in order takes {seconds(handed)}, reading the boundary "
        f"states first {seconds(stored)}; {against}."
    )


def stages_table(report: StagesReport) -> Table:
    """The faster way, stage by stage, each over its own bound."""
    best = report.best
    stages = zip(best.run.stages, best.bound.stages, report.layers, strict=True)
    rows: list[Row] = []
    for index, (stage, least, (lo, hi)) in enumerate(stages):
        cells = (
            str(index),
            f"{lo}-{hi - 1}",
            f"{stage.recomputed_share:.0%}",
            size(stage.loaded_bytes),
            size(stage.boundary_bytes),
            seconds(stage.restore_s),
            over(stage.restore_s, least.restore_s),
        )
        rows.append((cells, None))
    heads = ("stage", "layers", "computed", "loaded", "boundary", "restore", "× bound")
    return text_table(f"Stages: {best.name}", heads, rows, caption="× bound: of each stage this way.", padding=1)


def stage_timelines(report: StagesReport) -> list[Timeline]:
    """What each stage's GPU and link do in the faster way."""
    best = report.best
    return [
        Timeline(
            label=f"stage {index}",
            spans=run.spans,
            num_chunks=stage.problem.grid.num_chunks,
            num_blocks=stage.problem.grid.num_blocks,
            restore_s=run.restore_s,
            ttft_s=best.run.ttft_s if report.has_suffix else None,
            bound_s=best.bound.ttft_s if report.has_suffix else best.bound.restore_s,
        )
        for index, (run, stage) in enumerate(zip(best.run.stages, best.stages, strict=True))
    ]
