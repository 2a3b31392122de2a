"""One plan over all requests by dynamic programming: CacheFlow v2's batch scheduler.

Source: CacheFlow v2 (26 September 2026) as summarised in NUMBERS.md: a dynamic program over requests and layer blocks
decides how much of each is recomputed, so that compute and the link end together; the state is quantised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cacheflow.plan.batch import Arrival
from cacheflow.plan.plan import RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem, Seconds
from cacheflow.plan.staircase import (
    Levels,
    compute_tiles,
    load_tiles,
    staircase_compute_s,
    staircase_load_bytes,
)
from cacheflow.policies.base import RestorePolicy, empty_plan
from cacheflow.policies.predict import after_restore

QUANTA = 256
"""Steps in which the program counts compute time; more change the makespan by less than half a percent."""
SPLITS = 32
"""Splits of one request that are tried, evenly spread over its cells."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Ways to split one request, from loading everything to recomputing everything; arrays of equal length.

    Attributes:
        num_cells: Cells recomputed, column by column from the head.
        compute_s: What they take.
        load_s: What loading the others takes.
    """

    num_cells: Levels
    compute_s: Seconds
    load_s: Seconds


class DynamicProgram(Arrival):
    """Requests in the order of arrival, each with the fixed split that brings the last end of all forward."""

    name: ClassVar[str] = "dp"

    def __init__(self, restore: RestorePolicy) -> None:
        """Take a restore policy as every batch policy does; the program decides every split itself."""

    def plans(self, request_id: int, problems: Mapping[int, RestoreProblem]) -> Mapping[int, RestorePlan]:
        """One program over all that have not started."""
        splits = {name: _splits(problem) for name, problem in problems.items() if problem.grid.num_chunks}
        suffix_s = sum(problem.suffix_s for problem in problems.values())
        chosen = dict(zip(splits, best_splits(list(splits.values()), suffix_s=suffix_s), strict=True))
        return {
            name: _plan(problem, int(splits[name].num_cells[chosen[name]]))
            if name in splits
            else empty_plan(self.name, problem)
            for name, problem in problems.items()
        }


def _plan(problem: RestoreProblem, num_cells: int) -> RestorePlan:
    """A fixed split that recomputes this many cells."""
    levels_K = _levels(problem, num_cells)
    return RestorePlan(
        policy=DynamicProgram.name,
        compute_sequence=compute_tiles(levels_K),
        load_sequence=load_tiles(levels_K, problem.grid.num_blocks),
        share=Share.NONE,
        suffix_start=SuffixStart.AFTER_RESTORE,
        levels_K=tuple(levels_K.tolist()),
        predicted=after_restore(
            problem,
            compute_s=staircase_compute_s(problem, levels_K, kv_only_top=False),
            load_s=problem.link.load_s(float(staircase_load_bytes(problem, levels_K))),
        ),
        kv_only_top=False,
    )


def best_splits(requests: Sequence[Splits], *, suffix_s: float = 0.0) -> list[int]:
    """One split for each request, so that the later of all compute and all loading is as early as can be.

    Args:
        requests: Their splits.
        suffix_s: Seconds of compute for the new tokens of all of them.
    """
    quantum_s = max(sum(float(each.compute_s[-1]) for each in requests) / QUANTA, 1e-12)
    load_s = np.zeros(1)
    choices = []
    for each in requests:
        quanta = np.rint(each.compute_s / quantum_s).astype(np.int64)
        best_s = np.full(len(load_s) + int(quanta.max()), np.inf)
        choice = np.zeros(len(best_s), dtype=np.int64)
        for index, (shift, seconds) in enumerate(zip(quanta.tolist(), each.load_s.tolist(), strict=True)):
            ends_s, view = load_s + seconds, slice(shift, shift + len(load_s))
            better = ends_s < best_s[view]
            best_s[view] = np.where(better, ends_s, best_s[view])
            choice[view] = np.where(better, index, choice[view])
        choices.append((choice, quanta))
        load_s = best_s
    state = int(np.argmin(np.maximum(np.arange(len(load_s)) * quantum_s + suffix_s, load_s)))
    chosen = []
    for choice, quanta in reversed(choices):
        index = int(choice[state])
        chosen.append(index)
        state -= int(quanta[index])
    return chosen[::-1]


def _splits(problem: RestoreProblem) -> Splits:
    """Evenly spread splits: a split in the middle of a chunk recomputes its bottom blocks, as a staircase does."""
    num_cells = np.unique(np.linspace(0, problem.compute_KB.size, SPLITS + 1).astype(np.int64))
    compute_s = np.concatenate([[0.0], problem.compute_KB.cumsum()])[num_cells]
    num_bytes = float(problem.load_bytes_KB.sum()) - np.concatenate([[0], problem.load_bytes_KB.cumsum()])[num_cells]
    return Splits(num_cells, compute_s, np.array([problem.link.load_s(each) for each in num_bytes.tolist()]))


def _levels(problem: RestoreProblem, num_cells: int) -> Levels:
    """The staircase that recomputes this many cells, column by column."""
    first_K = np.arange(problem.grid.num_chunks) * problem.grid.num_blocks
    levels_K: Levels = np.clip(num_cells - first_K, 0, problem.grid.num_blocks)
    return levels_K
