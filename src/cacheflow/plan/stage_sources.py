"""Whether a later pipeline stage is restored sooner from stored boundary states or from what is handed over.

Stored states take the link from the keys and values. What is handed over costs the link nothing, but a stage gets each
chunk only once the one below has ended it, and none that it does not recompute whole. Which is dearer depends on
the model (with grouped-query attention the states are as large as several layers' keys and values), on the number of
chunks, and on the link. One pass over the chunks per stage: cheap enough to be asked for every request.
Shapes: ``K`` chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.plan.problem import BoundarySource, RestoreProblem, Seconds

WAIT_MARGIN = 1.05
"""Hand-overs must promise this much: stages that wait for each other feel every delay, those that read do not."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """When a stage is expected to be where, in seconds from the start.

    Attributes:
        restore_s: All of it is resident.
        whole_s: For each chunk it recomputes whole, from the first on: when it is through.
    """

    restore_s: float
    whole_s: tuple[float, ...] = ()


def times_of(
    problem: RestoreProblem,
    source: BoundarySource,
    *,
    below: StageTimes | None = None,
    num_boundaries: int | None = None,
) -> StageTimes:
    """Times of one stage, compute from the first chunk and the link from the last ending together.

    Args:
        problem: The stage's; with boundary bytes where they are stored.
        source: Of its activations.
        below: Of the stage below, for one that is handed them over.
        num_boundaries: Leading chunks whose boundary states are stored; None for all.
    """
    num_chunks = problem.grid.num_chunks
    nothing = np.zeros(num_chunks)
    if source is BoundarySource.NONE:
        return StageTimes(problem.load_s)
    if source is BoundarySource.STORED:
        read_K = problem.boundary_bytes_K / problem.link.bytes_per_s
        limit = num_chunks if num_boundaries is None else min(num_boundaries, num_chunks)
        return _times(problem, ready_K=nothing + read_K[:1].sum(), read_K=read_K, limit=limit)
    if source is BoundarySource.HANDED_OVER:
        assert below is not None, "somebody hands it over"
        ready_K = np.array([*below.whole_s, *nothing[len(below.whole_s) :]])
        return _times(problem, ready_K=ready_K, read_K=nothing, limit=len(below.whole_s))
    return _times(problem, ready_K=nothing, read_K=nothing, limit=num_chunks)


def sooner(ways: Mapping[BoundarySource, StageTimes]) -> BoundarySource:
    """The way that is expected to end first."""
    margin = {BoundarySource.HANDED_OVER: WAIT_MARGIN}
    return min(ways, key=lambda source: ways[source].restore_s * margin.get(source, 1.0))


def stage_times(problems: Sequence[RestoreProblem], sources: Sequence[BoundarySource]) -> list[StageTimes]:
    """Times of all stages, bottom stage first."""
    times: list[StageTimes] = []
    for problem, source in zip(problems, sources, strict=True):
        times.append(times_of(problem, source, below=times[-1] if times else None))
    return times


def _times(problem: RestoreProblem, *, ready_K: Seconds, read_K: Seconds, limit: int) -> StageTimes:
    """The best number of chunks to recompute, the last of them shared by layers.

    Args:
        problem: The stage's.
        ready_K: When each chunk's activations are there at the earliest.
        read_K: Seconds of the link that a chunk's boundary states take.
        limit: Chunks that can be recomputed.
    """
    compute_K = problem.compute_KB.sum(axis=1)
    load_K = problem.load_bytes_KB.sum(axis=1) / problem.link.bytes_per_s
    through_s, link_s = 0.0, problem.link.latency_s + float(load_K.sum())
    best = StageTimes(link_s)
    whole_s: list[float] = []
    for chunk in range(limit):
        ready_s, compute_s, load_s = float(ready_K[chunk]), float(compute_K[chunk]), float(load_K[chunk])
        began_s, link_s = max(through_s, ready_s), link_s + float(read_K[chunk])
        share = min(1.0, max(0.0, (link_s - began_s) / max(compute_s + load_s, 1e-12)))
        end_s = max(began_s + share * compute_s, link_s - share * load_s)
        if end_s >= best.restore_s:
            break
        if share < 1.0:
            return StageTimes(end_s, tuple(whole_s))
        through_s, link_s = began_s + compute_s, link_s - load_s
        whole_s.append(through_s)
        best = StageTimes(end_s, tuple(whole_s))
    return best
