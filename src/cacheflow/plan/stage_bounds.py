"""The least possible times over pipeline stages: of one stage, of all of them, with and without the GPU axis.

Stages restore side by side, so the slowest decides. Links of their own: its bound as if it were alone. One shared
link: besides, all stages' bytes go over it and no stage computes faster, for which mixtures of staircases of all
stages are weighed as in ``lagrange``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cacheflow.plan.bound import Bound, bound, lower_bound_s
from cacheflow.plan.lagrange import least_weighted_s
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.stages import StageProblem, suffix_through_s
from cacheflow.plan.tradeoff import tradeoff

SEARCH_STEPS = 40
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class StagedBound:
    """Least possible seconds of a restoration over stages.

    Attributes:
        restore_s: To the last prefix cell of the slowest stage.
        ttft_s: To the first token, the new tokens passing the stages one after the other.
        stages: Of each stage for itself.
    """

    restore_s: float
    ttft_s: float
    stages: tuple[Bound, ...]


def stage_bound(problem: RestoreProblem, source: BoundarySource, *, fill_s: float = 0.0) -> Bound:
    """The least times of one stage for itself.

    Args:
        problem: The stage's, with its boundary bytes where they are stored.
        source: ``NONE``: the stage only loads.
        fill_s: Seconds before the stage below can hand it the first chunk over.
    """
    if source is BoundarySource.NONE:
        return Bound(restore_s=problem.load_s, ttft_s=problem.load_s + problem.suffix_s)
    if fill_s <= 0 or problem.grid.num_chunks == 0:
        return bound(problem)
    reduced = tradeoff(problem)
    late_s = lower_bound_s(replace(reduced, after_compute_s=reduced.after_compute_s + fill_s))
    restore_s = min(problem.load_s, late_s)
    return Bound(restore_s=restore_s, ttft_s=restore_s + problem.suffix_s)


def staged_bound(
    stages: Sequence[StageProblem], *, num_suffix_chunks: int = 0, shared_link: bool = False
) -> StagedBound:
    """The least times of all stages.

    A stage that is handed its activations waits at least for the first chunk to come up through the stages below that
    hand on: without stored boundaries ``S - 1`` chunk times in the last of ``S`` stages.

    Args:
        stages: Bottom stage first; on a shared link each with its even share of the bandwidth.
        num_suffix_chunks: Chunks of new tokens.
        shared_link: The stages' links are shares of one, which may be shared otherwise.
    """
    # An even share is one way to share a link; no way gives a stage more than all of it.
    whole = [_with_share(stage, len(stages)) for stage in stages] if shared_link else list(stages)
    bounds, fill_s = [], 0.0
    for stage in whole:
        fill_s = fill_s if stage.source is BoundarySource.HANDED_OVER else 0.0
        bounds.append(stage_bound(stage.problem, stage.source, fill_s=fill_s))
        fill_s += float(stage.problem.compute_KB[:1].sum())
    restore_s = max(each.restore_s for each in bounds)
    if shared_link and len(stages) > 1:
        restore_s = max(restore_s, _shared_s([stage.problem for stage in whole]))
    suffix_s = suffix_through_s(tuple(stages), num_suffix_chunks)
    return StagedBound(
        restore_s=restore_s,
        ttft_s=max(suffix_s, _ttft_s(whole, bounds, max(1, num_suffix_chunks))),
        stages=tuple(bounds),
    )


def _with_share(stage: StageProblem, num_stages: int) -> StageProblem:
    link = replace(stage.problem.link, bytes_per_s=stage.problem.link.bytes_per_s * num_stages)
    return replace(stage, problem=replace(stage.problem, link=link))


def _ttft_s(stages: Sequence[StageProblem], bounds: Sequence[Bound], num_chunks: int) -> float:
    """No stage's part of the first token comes sooner than this.

    The last byte of a stage belongs to its top block at best, and what the new tokens still have to pass then is one
    block of it and, with their last chunk, all stages above. Compute of a stage does its new tokens besides.
    """
    ttft_s = 0.0
    for index, (stage, least) in enumerate(zip(stages, bounds, strict=True)):
        above_s = sum(each.suffix_s for each in stages[index + 1 :]) / num_chunks
        top_s = stage.suffix_s / stage.problem.grid.num_blocks / num_chunks
        ttft_s = max(ttft_s, least.restore_s + above_s)
        if stage.source is BoundarySource.NONE:
            ttft_s = max(ttft_s, stage.problem.load_s + above_s)
            continue
        reduced = replace(
            tradeoff(stage.problem),
            after_compute_s=tradeoff(stage.problem).after_compute_s + stage.suffix_s + above_s,
            after_load_s=min(top_s, stage.suffix_s) + above_s,
        )
        if stage.suffix_s > 0:
            ttft_s = max(ttft_s, lower_bound_s(reduced))
    return ttft_s


def _shared_s(problems: Sequence[RestoreProblem]) -> float:
    """The least time in which one link brings what no stage recomputes, while every stage computes.

    For any weights ``mu / S`` of each stage's compute and ``1 - mu`` of the link, no restoration ends before the
    least weighted sum; that is concave in ``mu``, and every value of it is a valid bound.
    """
    # Latency counts once, and none is counted where nothing is loaded.
    reduced = [tradeoff(replace(problem, link=replace(problem.link, latency_s=0.0))) for problem in problems]
    num_stages = len(reduced)

    def least_s(mu: float) -> float:
        weight = mu / num_stages + 1.0 - mu
        return weight * sum(least_weighted_s(each, mu / num_stages / weight) for each in reduced)

    lo, hi, best_s = 0.0, 1.0, 0.0
    for _ in range(SEARCH_STEPS):
        left, right = hi - GOLDEN * (hi - lo), lo + GOLDEN * (hi - lo)
        left_s, right_s = least_s(left), least_s(right)
        best_s = max(best_s, left_s, right_s)
        lo, hi = (lo, right) if left_s > right_s else (left, hi)
    return best_s
