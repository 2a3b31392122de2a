"""The optimal staircase by dynamic programming over chunks, pruned by dominance and by a Lagrangian bound.

A state is what the chunks so far cost on both sides and the level of the last one. It is dropped when another state
of its level is no worse on both sides, or when even the best completion, by the weighted cost that proves the problem's
bound, cannot beat the best staircase known. With that bound few states survive unless the costs of cells are many and
unrelated.

Shapes: ``K`` chunks, ``B`` layer blocks, ``S`` states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cacheflow.plan.problem import Seconds
from cacheflow.plan.staircase import Levels
from cacheflow.plan.tradeoff import Tradeoff

SLACK = 1e-12
"""A staircase must be relatively this much better to count as better: what rounding of sums can hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Outcome of an exact search.

    Attributes:
        levels_K: A staircase that ends before the known one, the best if ``complete``; None when none was found.
        complete: Whether every staircase that loads something was ruled out or visited.
    """

    levels_K: Levels | None
    complete: bool


@dataclass(frozen=True, slots=True)
class _States:
    level_S: Levels
    compute_S: Seconds
    load_S: Seconds
    parent_S: Levels


def search(problem: Tradeoff, *, known_s: float, mu: float, max_states: int) -> Search:
    """Find the staircase with the least objective, if it ends before ``known_s``.

    Args:
        problem: At least one chunk.
        known_s: Objective of the best staircase known.
        mu: Weight of compute for the completion bound (``Mixture.mu``); any value in [0, 1] is correct.
        max_states: Give up (``complete=False``) when a chunk leaves more states, or would expand to 32 times as many.
    """
    column_compute, column_load = _column_costs(problem)
    rest = _completion_bounds(mu * column_compute + (1 - mu) * column_load)
    limit_s = known_s * (1 - SLACK)
    zero = np.zeros(1)
    top = np.full(1, problem.num_blocks, dtype=np.int64)
    states = _States(top, zero + problem.after_compute_s, zero + problem.link_end_s, top)
    history: list[_States] = []
    for chunk in range(problem.num_chunks):
        if int((states.level_S + 1).sum()) > 32 * max_states:
            return Search(levels_K=None, complete=False)
        states = _expand(states, column_compute[chunk], column_load[chunk])
        weighted = mu * states.compute_S + (1 - mu) * states.load_S + rest[chunk + 1][states.level_S]
        alive = (weighted < limit_s) & (states.compute_S < limit_s) & (states.load_S < limit_s)
        states = _undominated(_take(states, np.flatnonzero(alive)))
        if len(states.level_S) > max_states:
            return Search(levels_K=None, complete=False)
        if len(states.level_S) == 0:
            return Search(levels_K=None, complete=True)
        history.append(states)
    best = int(np.maximum(states.compute_S, states.load_S).argmin())
    return Search(levels_K=_trace(history, best), complete=True)


def _column_costs(problem: Tradeoff) -> tuple[Seconds, Seconds]:
    """Both sides' seconds of each chunk at each level; shape ``(K, B + 1)``."""
    shape = (problem.num_chunks, problem.num_blocks + 1)
    compute, load = np.zeros(shape), np.zeros(shape)
    np.cumsum(problem.compute_KB, axis=1, out=compute[:, 1:])
    load[:, :-1] = problem.load_KB[:, ::-1].cumsum(axis=1)[:, ::-1]
    return compute, load


def _completion_bounds(weighted: Seconds) -> Seconds:
    """Least weighted cost of the chunks from ``k`` on, none above level ``t``; shape ``(K + 1, B + 1)``."""
    rest = np.zeros((weighted.shape[0] + 1, weighted.shape[1]))
    for chunk in range(weighted.shape[0] - 1, -1, -1):
        np.minimum.accumulate(weighted[chunk] + rest[chunk + 1], out=rest[chunk])
    return rest


def _expand(states: _States, compute: Seconds, load: Seconds) -> _States:
    """Every level up to the last chunk's for the next chunk."""
    choices = states.level_S + 1
    parent = np.repeat(np.arange(len(choices)), choices)
    level = np.arange(len(parent)) - np.repeat(choices.cumsum() - choices, choices)
    return _States(level, states.compute_S[parent] + compute[level], states.load_S[parent] + load[level], parent)


def _take(states: _States, index: Levels) -> _States:
    return _States(states.level_S[index], states.compute_S[index], states.load_S[index], states.parent_S[index])


def _undominated(states: _States) -> _States:
    """Drop states that another of the same level equals or beats on both sides."""
    if len(states.level_S) < 2:
        return states
    states = _take(states, np.lexsort((states.load_S, states.compute_S, states.level_S)))
    # Shifting each level below the one before makes one running minimum serve all levels.
    shifted = states.load_S - states.level_S * (2.0 * float(states.load_S.max()) + 1.0)
    return _take(states, np.flatnonzero(np.append(True, shifted[1:] < np.minimum.accumulate(shifted)[:-1])))


def _trace(history: list[_States], index: int) -> Levels:
    levels = []
    for states in reversed(history):
        levels.append(int(states.level_S[index]))
        index = int(states.parent_S[index])
    return np.array(levels[::-1], dtype=np.int64)
