"""Choose the staircase: which cells to recompute so that compute and the link end together, as early as possible.

Equal blocks with rising chunk costs have a closed form. Otherwise the two staircases that the bound mixes are searched
between, corner cells swapped, and small grids solved exactly; the gap to the bound is stated where optimality is not
proved. Nothing is kept between calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheflow.plan.equal_blocks import equal_block_levels
from cacheflow.plan.exact import search
from cacheflow.plan.improve import best_between, best_by_columns, swap_corners
from cacheflow.plan.lagrange import Mixture, best_mixture
from cacheflow.plan.plan import Prediction
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.staircase import Levels
from cacheflow.plan.tradeoff import Objective, Split, Tradeoff, tradeoff

__all__ = ["Objective", "PlannedLevels", "plan_levels", "plan_token_wise"]

EXACT_CELLS = 64
"""Grids of up to this many cells are solved exactly by default."""
EXACT_STATES = 20_000
"""An exact search gives up when it has to keep more states than this."""
PLANNER_CUTS = 5
"""Dynamic programs spent on the mixture; the staircases hardly change after that."""
NEAR_ENOUGH = 1e-3
"""Within this of the bound a staircase is not compared with splits by tokens and by layers any more."""
PROVED_GAP = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLevels:
    """A planned staircase.

    Attributes:
        levels_K: Bottom blocks recomputed in each chunk, never increasing along the prefix.
        predicted: Its times; ``ttft_s`` is what the suffix could reach after the load for the TTFT objective, and
            the suffix after the restoration otherwise.
        optimal: No staircase has a smaller objective (to within rounding).
        gap: The objective is at most ``(1 + gap)`` times the optimum; 0 when optimal.
    """

    levels_K: tuple[int, ...]
    predicted: Prediction
    optimal: bool
    gap: float


def plan_levels(
    problem: RestoreProblem,
    objective: Objective = Objective.RESTORE,
    *,
    kv_only_top: bool = True,
    exact_cells: int = EXACT_CELLS,
) -> PlannedLevels:
    """Plan the staircase with the least restoration time or time to first token.

    Args:
        problem: What the restoration costs.
        objective: ``RESTORE`` minimises ``max(compute, load)``, ``TTFT`` the time to first token with the suffix
            after the load: ``max(compute + suffix, load + the top block's suffix and head)``.
        kv_only_top: Count the topmost recomputed cell of each chunk for its keys and values only.
        exact_cells: Search grids of up to this many cells exactly where the closed form does not hold (at most
            seconds; the default keeps to about a millisecond).
    """
    if problem.grid.num_chunks == 0:
        return _planned(problem, objective, np.zeros(0, dtype=np.int64), _NOTHING, bound_s=None)
    reduced = tradeoff(problem, objective, kv_only_top=kv_only_top)
    cover = reduced.cover()
    closed = equal_block_levels(reduced)
    if closed is not None:
        levels, split = _best(reduced, [closed, cover])
        return _planned(problem, objective, levels, split, bound_s=None)
    mixture = best_mixture(reduced, max_cuts=PLANNER_CUTS)
    levels, split = _best(reduced, [_near(reduced, mixture), cover])
    bound_s = min(mixture.bound_s, reduced.split(cover).value_s)
    proved = split.value_s <= bound_s * (1 + PROVED_GAP)
    if not proved and reduced.compute_KB.size <= exact_cells:
        found = search(reduced, known_s=split.value_s, mu=mixture.mu, max_states=EXACT_STATES)
        if found.levels_K is not None:
            levels, split = _best(reduced, [found.levels_K, levels])
        proved = found.complete
    return _planned(problem, objective, levels, split, bound_s=None if proved else bound_s)


def plan_token_wise(problem: RestoreProblem, objective: Objective = Objective.RESTORE) -> PlannedLevels:
    """The best split by tokens with the last chunk shared by layers: levels ``B, ..., B, t, 0, ..., 0``.

    Counts each chunk's topmost cell for its keys and values only. Never claims optimality: ``gap`` is infinite.
    """
    if problem.grid.num_chunks == 0:
        return plan_levels(problem, objective)
    reduced = tradeoff(problem, objective)
    nothing = np.zeros(reduced.num_chunks, dtype=np.int64)
    everything = np.full(reduced.num_chunks, reduced.num_blocks, dtype=np.int64)
    levels, split = _best(reduced, [best_by_columns(reduced, nothing, everything), everything])
    return _planned(problem, objective, levels, split, bound_s=0.0)


_NOTHING = Split(compute_s=0.0, load_s=0.0, value_s=0.0)


def _near(reduced: Tradeoff, mixture: Mixture) -> Levels:
    """A good staircase near the best mixture; where that is far from the bound, no worse than the published splits."""
    near = swap_corners(reduced, best_between(reduced, mixture.lower_K, mixture.upper_K))
    if reduced.split(near).value_s <= mixture.bound_s * (1 + NEAR_ENOUGH):
        return near
    nothing = np.zeros(reduced.num_chunks, dtype=np.int64)
    everything = np.full(reduced.num_chunks, reduced.num_blocks, dtype=np.int64)
    # Raising everything from nothing passes every split by tokens, and every split by layers.
    return _best(reduced, [near, swap_corners(reduced, best_between(reduced, nothing, everything))])[0]


def _best(reduced: Tradeoff, candidates: list[Levels]) -> tuple[Levels, Split]:
    splits = [reduced.split(levels) for levels in candidates]
    index = min(range(len(splits)), key=lambda i: splits[i].value_s)
    return candidates[index], splits[index]


def _planned(
    problem: RestoreProblem, objective: Objective, levels_K: Levels, split: Split, *, bound_s: float | None
) -> PlannedLevels:
    """Package a staircase; ``bound_s`` is None when it is proved optimal."""
    restore_s = max(split.compute_s, split.load_s)
    ttft_s = max(split.value_s, problem.suffix_s) if objective is Objective.TTFT else restore_s + problem.suffix_s
    gap = 0.0
    if bound_s is not None and split.value_s > 0:
        gap = max(0.0, split.value_s / bound_s - 1.0) if bound_s > 0 else float("inf")
    return PlannedLevels(
        levels_K=tuple(levels_K.tolist()),
        predicted=Prediction(restore_s=restore_s, ttft_s=ttft_s, compute_s=split.compute_s, load_s=split.load_s),
        optimal=bound_s is None,
        gap=gap,
    )
