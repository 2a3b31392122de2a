"""Ours: recompute from the head, load from the tail, share the meeting chunk by layers, let the suffix climb after.

The planned staircase is a hint. Where a split by tokens is as good, compute simply takes the columns in order and the
link takes them in reverse, so that the meeting point can move freely. Where a wider staircase is clearly better, its
cells come first in compute's order and last in the link's. The never-slower guard compares the hybrid with recompute
and load on equal terms (keys and values only in the top row, suffix after the load) and states its choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import Choice, GuardDecision, Prediction, RestorePlan, Share, SuffixStart
from cacheflow.plan.planner import Objective, plan_levels, plan_token_wise
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.staircase import Levels, compute_tiles, upper_tiles
from cacheflow.policies.base import empty_plan
from cacheflow.policies.predict import climb

MIN_GAIN = 0.01
"""Load nothing unless that is predicted to end this much sooner than recomputing, plus ``MIN_GAIN_S``."""
MIN_GAIN_S = 0.001
WIDE_GAIN = 0.02
"""A wider staircase must promise this much over a split by tokens, because it follows a wrong prediction less well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A staircase and what it promises; ``wide`` when it is not a split by tokens."""

    levels_K: Levels
    predicted: Prediction
    wide: bool = False


class CacheFlow:
    """Hybrid restoration, with the pure ways where they are better."""

    name: ClassVar[str] = "cacheflow"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        """Plan the hybrid, and fall back to a pure way where the hybrid promises nothing over it."""
        if problem.grid.num_chunks == 0:
            return empty_plan(self.name, problem)
        load = _candidate(problem, np.zeros(problem.grid.num_chunks, dtype=np.int64))
        mixed = _best_mixed(problem)
        hybrid = mixed if mixed.predicted.ttft_s < load.predicted.ttft_s else load
        guard = _guard(problem, hybrid, load)
        if guard.choice in (Choice.RECOMPUTE, Choice.PREFILL):
            return _recompute_plan(self.name, problem, guard)
        return _shared_plan(self.name, problem, hybrid, guard)


def _candidate(problem: RestoreProblem, levels_K: Levels, *, wide: bool = False) -> _Candidate:
    return _Candidate(levels_K=levels_K, predicted=climb(problem, levels_K), wide=wide)


def _best_mixed(problem: RestoreProblem) -> _Candidate:
    """The best staircase; a split by tokens when that is about as good and no fixed staircase is better."""
    if np.ptp(problem.compute_KB, axis=1).max() == 0 and _even_to_load(problem):
        # Equal blocks: a split by tokens, and the bottom row for keys and values, is the best staircase there is.
        objective = Objective.TTFT if problem.suffix_s else Objective.RESTORE
        return _candidate(problem, np.array(plan_levels(problem, objective).levels_K))
    objectives = (Objective.TTFT, Objective.RESTORE) if problem.suffix_s else (Objective.RESTORE,)
    narrow = _earliest([
        _candidate(problem, np.array(plan_token_wise(problem, objective).levels_K)) for objective in objectives
    ])  # fmt: skip
    wide = _earliest([
        _candidate(problem, np.array(plan_levels(problem, objective).levels_K), wide=True)
        for objective in objectives
    ])  # fmt: skip
    if narrow.predicted.ttft_s <= wide.predicted.ttft_s:
        return narrow
    if narrow.predicted.ttft_s > wide.predicted.ttft_s * (1 + WIDE_GAIN):
        return wide
    # The best that a staircase of full cells could do with the suffix after it (CacheFlow v2).
    fixed_s = plan_levels(problem, kv_only_top=False).predicted.ttft_s
    return narrow if narrow.predicted.ttft_s <= fixed_s else wide


def _even_to_load(problem: RestoreProblem) -> bool:
    """Whether a token is as many bytes in every chunk: not where one brings the state of recurrent blocks too."""
    tokens_K = np.diff((problem.grid.start, *problem.grid.chunk_ends))
    bytes_K = problem.load_bytes_KB.sum(axis=1)
    return bool((bytes_K * tokens_K[0] == bytes_K[0] * tokens_K).all())


def _earliest(candidates: list[_Candidate]) -> _Candidate:
    return min(candidates, key=lambda candidate: candidate.predicted.ttft_s)


def _guard(problem: RestoreProblem, hybrid: _Candidate, load: _Candidate) -> GuardDecision:
    hybrid_s, load_s = hybrid.predicted.ttft_s, load.predicted.ttft_s
    recompute_s, prefill_s = problem.recompute_s + problem.suffix_s, problem.prefill_s
    least_s = recompute_s if prefill_s is None else min(recompute_s, prefill_s)
    if hybrid_s > least_s * (1 - MIN_GAIN) - MIN_GAIN_S:
        choice = Choice.RECOMPUTE if least_s == recompute_s else Choice.PREFILL
        why = f"it takes {_ms(least_s)}, the best hybrid {_ms(hybrid_s)}: not {MIN_GAIN:.0%} and 1 ms sooner"
    elif not hybrid.levels_K.any():
        choice = Choice.LOAD
        why = f"recomputing anything would not end before the load alone ({_ms(load_s)}; recompute {_ms(recompute_s)})"
    else:
        choice = Choice.HYBRID
        share = float(hybrid.levels_K.sum()) / (problem.grid.num_chunks * problem.grid.num_blocks)
        why = (
            f"recomputing {share:.0%} of the cells and loading the rest takes {_ms(hybrid_s)}, "
            f"recompute {_ms(recompute_s)}, load {_ms(load_s)}"
        )
    return GuardDecision(
        choice=choice,
        reason=f"{choice.value}: {why}",
        hybrid_s=hybrid_s,
        recompute_s=recompute_s,
        load_s=load_s,
        prefill_s=prefill_s,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _columns(problem: RestoreProblem) -> tuple[Tile, ...]:
    return tuple(Tile(chunk, chunk + 1, 0, problem.grid.num_blocks) for chunk in range(problem.grid.num_chunks))


def _recompute_plan(policy: str, problem: RestoreProblem, guard: GuardDecision) -> RestorePlan:
    return RestorePlan(
        policy=policy,
        compute_sequence=_columns(problem),
        load_sequence=(),
        share=Share.LAYERS,
        suffix_start=SuffixStart.AFTER_RESTORE,
        levels_K=(problem.grid.num_blocks,) * problem.grid.num_chunks,
        predicted=Prediction(
            restore_s=problem.recompute_s, ttft_s=guard.recompute_s, compute_s=problem.recompute_s, load_s=0.0
        ),
        guard=guard,
    )


def _wide_sequence(problem: RestoreProblem, levels_K: Levels) -> tuple[Tile, ...]:
    """Cells in compute's sequence: the staircase, head chunk first, then what is above it.

    Where the last cell of a row brings the state of recurrent blocks too, rows that are recomputed whole come before
    the highest one: compute and link meet in that, among cells without states, and a link that is ahead takes a state
    more at most.
    """
    whole = 0 if _even_to_load(problem) else max(0, min(int(levels_K.min()), int(levels_K.max()) - 1))
    whole_K = np.full_like(levels_K, whole)
    stairs = zip(compute_tiles(levels_K), levels_K.tolist(), strict=False)
    rest = (replace(tile, block_lo=whole) for tile, level in stairs if level > whole)
    return (*compute_tiles(whole_K), *rest, *upper_tiles(levels_K, problem.grid.num_blocks))


def _shared_plan(policy: str, problem: RestoreProblem, hybrid: _Candidate, guard: GuardDecision) -> RestorePlan:
    """The hybrid, or the load with compute standing by: it may still rescue a slow link."""
    order = _columns(problem)
    load_sequence = order[::-1]
    bottom_row = not hybrid.wide and problem.grid.num_blocks > 1
    if bottom_row:
        upper = tuple(Tile(t.chunk_lo, t.chunk_hi, 1, t.block_hi) for t in load_sequence)
        load_sequence = (*upper, *(Tile(t.chunk_lo, t.chunk_hi, 0, 1) for t in load_sequence))
    if hybrid.wide:
        order = _wide_sequence(problem, hybrid.levels_K)
        load_sequence = order[::-1]
    has_suffix = bool(problem.grid.suffix_ends)
    return RestorePlan(
        policy=policy,
        compute_sequence=order,
        load_sequence=load_sequence,
        share=Share.LAYERS,
        suffix_start=SuffixStart.BLOCK_BY_BLOCK if has_suffix else SuffixStart.AFTER_RESTORE,
        levels_K=tuple(hybrid.levels_K.tolist()),
        predicted=hybrid.predicted,
        balance_suffix=has_suffix,
        bottom_row_by_compute=bottom_row,
        guard=guard,
    )
