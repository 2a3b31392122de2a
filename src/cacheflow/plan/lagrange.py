"""The best mixture of staircases: a lower bound on every staircase, and the two staircases it mixes.

For a weight ``mu`` in [0, 1] no staircase ends before ``min over staircases of mu * compute + (1 - mu) * load``. That
minimum is a sum over cells, so a dynamic program over the rows of the grid finds it exactly (one prefix minimum a row;
consecutive rows of equal cost are one row). The largest such minimum over ``mu`` is concave in ``mu`` and found by
cutting planes. It equals the least time if work were infinitely divisible, any mixture of staircases being allowed.

The solver does not care which axis are the rows: ``R`` rows (the fewer after merging equal ones) by ``C`` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheflow.plan.problem import Seconds
from cacheflow.plan.staircase import Levels, levels_of
from cacheflow.plan.tradeoff import Tradeoff

MAX_CUTS = 40
"""Cutting planes at most; a few suffice, and every one of them is already a valid bound."""
RELATIVE_TOLERANCE = 1e-12
BRACKET = 0.04
"""How far, relatively, the second weight lies from the first guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The best mixture of two nested staircases.

    Attributes:
        bound_s: No staircase that loads anything ends before this.
        mu: The weight of compute that proves it.
        lower_K: Levels of the staircase that recomputes less.
        upper_K: Levels of the staircase that recomputes more; nowhere below ``lower_K``.
    """

    bound_s: float
    mu: float
    lower_K: Levels
    upper_K: Levels


@dataclass(frozen=True, slots=True)
class _Point:
    """A staircase as heights of merged rows, and the ends of both sides."""

    heights_R: Levels
    compute_end_s: float
    load_end_s: float


class _Rows:
    """Merged rows with running costs: ``compute_RC[r, h]`` is the cost of the first ``h`` cells of row group ``r``."""

    def __init__(self, problem: Tradeoff) -> None:
        self._problem = problem
        by_block = _merge_equal_rows(problem.compute_KB.T, problem.load_KB.T)
        self._by_block = len(by_block[2]) <= problem.num_chunks
        compute_RC, load_RC, self._counts_R = (
            by_block if self._by_block else _merge_equal_rows(problem.compute_KB, problem.load_KB)
        )
        self._compute_RC = _running(compute_RC, self._counts_R)
        self._load_RC = _running(load_RC, self._counts_R)
        self._rows = np.arange(len(self._counts_R))
        self._values_RC = np.empty_like(self._compute_RC)
        self._all_load_s = float(self._load_RC[:, -1].sum())

    def point(self, heights_R: Levels) -> _Point:
        compute_s = float(self._compute_RC[self._rows, heights_R].sum())
        load_s = self._all_load_s - float(self._load_RC[self._rows, heights_R].sum())
        return _Point(heights_R, compute_s + self._problem.after_compute_s, load_s + self._problem.link_end_s)

    def corner(self, *, full: bool) -> _Point:
        return self.point(np.full(len(self._rows), self._compute_RC.shape[1] - 1 if full else 0))

    def minimise(self, mu: float) -> _Point:
        """The smallest staircase that minimises ``mu * compute + (1 - mu) * load``."""
        values_RC = np.multiply(self._compute_RC, mu, out=self._values_RC)
        values_RC -= (1.0 - mu) * self._load_RC
        accumulate = np.minimum.accumulate
        below = list(values_RC)
        for row, above in zip(below[-2::-1], below[:0:-1], strict=True):
            row += accumulate(above)
        heights, limit = [], values_RC.shape[1]
        for row in below:
            height = int(row[:limit].argmin())
            heights.append(height)
            limit = height + 1
        return self.point(np.array(heights))

    def first_guess(self) -> float:
        """The weight at which splitting by columns alone would be balanced."""
        compute_C = np.diff(self._compute_RC.sum(axis=0))
        load_C = np.diff(self._load_RC.sum(axis=0))
        compute_end_C = compute_C.cumsum() + self._problem.after_compute_s
        load_end_C = self._all_load_s - load_C.cumsum() + self._problem.link_end_s
        column = min(int(np.searchsorted(compute_end_C - load_end_C, 0.0)), len(compute_C) - 1)
        total_s = compute_C[column] + load_C[column]
        return min(1.0, max(0.0, float(load_C[column] / total_s))) if total_s > 0 else 0.5

    def levels(self, heights_R: Levels) -> Levels:
        heights = np.repeat(heights_R, self._counts_R)
        return levels_of(heights, self._problem.num_chunks) if self._by_block else heights


def _merge_equal_rows(compute_RC: Seconds, load_RC: Seconds) -> tuple[Seconds, Seconds, Levels]:
    same_R = (compute_RC[1:] == compute_RC[:-1]).all(axis=1) & (load_RC[1:] == load_RC[:-1]).all(axis=1)
    starts = np.flatnonzero(np.concatenate(([True], ~same_R)))
    counts = np.diff(np.append(starts, len(compute_RC)))
    return compute_RC[starts], load_RC[starts], counts


def _running(cost_RC: Seconds, counts_R: Levels) -> Seconds:
    running = np.zeros((cost_RC.shape[0], cost_RC.shape[1] + 1))
    np.cumsum(cost_RC, axis=1, out=running[:, 1:])
    running *= counts_R[:, None]
    return running


def least_weighted_s(problem: Tradeoff, mu: float) -> float:
    """The least ``mu * compute + (1 - mu) * load`` of any staircase, ends and what goes with them included.

    Args:
        problem: At least one chunk.
        mu: Weight of compute, in [0, 1].
    """
    point = _Rows(problem).minimise(mu)
    return mu * point.compute_end_s + (1.0 - mu) * point.load_end_s


def best_mixture(problem: Tradeoff, *, max_cuts: int = MAX_CUTS) -> Mixture:
    """Find the best mixture of staircases for ``max(compute, load)`` with what follows either.

    Args:
        problem: At least one chunk.
        max_cuts: Stop after this many dynamic programs; the bound then is valid but may be a little low.
    """
    rows = _Rows(problem)
    lower, upper = rows.corner(full=False), rows.corner(full=True)
    if lower.compute_end_s >= lower.load_end_s:
        return _mixture(rows, lower.compute_end_s, 1.0, lower, lower)
    if upper.load_end_s >= upper.compute_end_s:
        return _mixture(rows, upper.load_end_s, 0.0, upper, upper)
    best_s, best_mu = max((lower.compute_end_s, 1.0), (upper.load_end_s, 0.0))
    guesses = [rows.first_guess()]
    for cut in range(max_cuts):
        saved_s = lower.load_end_s - upper.load_end_s
        mu = saved_s / (saved_s + upper.compute_end_s - lower.compute_end_s)
        line_s = mu * lower.compute_end_s + (1.0 - mu) * lower.load_end_s
        if guesses:
            mu = guesses.pop()
        point = rows.minimise(mu)
        value_s = mu * point.compute_end_s + (1.0 - mu) * point.load_end_s
        best_s, best_mu = max((best_s, best_mu), (value_s, mu))
        if best_s >= line_s * (1.0 - RELATIVE_TOLERANCE):
            break
        more_compute = point.compute_end_s >= point.load_end_s
        lower, upper = (lower, point) if more_compute else (point, upper)
        if cut == 0:
            guesses.append(min(1.0, mu * (1 + BRACKET)) if more_compute else mu * (1 - BRACKET))
    return _mixture(rows, best_s, best_mu, lower, upper)


def _mixture(rows: _Rows, bound_s: float, mu: float, lower: _Point, upper: _Point) -> Mixture:
    lower_K, upper_K = rows.levels(lower.heights_R), rows.levels(upper.heights_R)
    # Nested by theory (less weight on compute grows the minimiser); rounding at ties must not break it.
    return Mixture(bound_s=bound_s, mu=mu, lower_K=np.minimum(lower_K, upper_K), upper_K=np.maximum(lower_K, upper_K))
