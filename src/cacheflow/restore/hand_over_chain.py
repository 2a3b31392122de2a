"""Pipeline stages that hand activations over in order, because no boundary states are stored between them.

A chunk is recomputed whole, by the bottom stage and then by as many stages above it as still want it, all ordered in
the same step: so every send meets its receive. Where a stage leaves a chunk to its link, that stage and those above
it leave all later chunks to theirs. With more chunks in a step the stages work on different ones at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.plan.cells import Cell
from cacheflow.restore.orders import ComputeOrder
from cacheflow.restore.stepped import REST_SHARE, SteppedRestoration

CHUNKS_READ_AHEAD = 2.5
"""Reads under way, in chunk times: orders are made up to two steps before the reports they lack."""


class HandOverChain:
    """Orders whole chunks of several stages together; the stages' own orders carry them."""

    def __init__(self, stages: Sequence[SteppedRestoration]) -> None:
        """Start at the head.

        Args:
            stages: Neighbours, the bottom one first; all but it take what the one below hands over.
        """
        self._bottom, self._uppers = stages[0], list(stages[1:])
        self._next = 0

    def read_ahead_s(self, read_ahead_s: float) -> float:
        """Seconds of the link to keep under way: a step lasts at least a chunk, and reports come a step late."""
        if read_ahead_s <= 0:
            return read_ahead_s
        return max(read_ahead_s, CHUNKS_READ_AHEAD * self._chunk_s(self._bottom.state.problem.grid.num_chunks - 1))

    def order(self, now_s: float, budget_s: float) -> None:
        """Claim chunks for one step: at least one if there is one, and no more than lasts ``budget_s`` beyond that."""
        if budget_s <= 0:
            return
        state, spent_s = self._bottom.state, 0.0
        if state.loads_possible:
            budget_s = min(budget_s, REST_SHARE * state.expected_left_s(now_s))
        while True:
            seconds = self._chunk_s(min(self._next, state.problem.grid.num_chunks - 1))
            if spent_s > 0 and spent_s + seconds > budget_s:
                return
            if self._bottom_open() and not state.boundary.computed_sooner(seconds, now_s):
                return
            order = self._bottom.claim_chunk(now_s, receives=False)
            if order is None:
                if not self._bottom_open():
                    self._leave(self._uppers)
                return
            spent_s += seconds
            self._hand_on(order, now_s)

    def _hand_on(self, order: ComputeOrder, now_s: float) -> None:
        chunk, tile, below = order.tile.chunk_lo, order.tile, self._bottom
        if chunk != self._next or tile.num_cells < self._bottom.state.problem.grid.num_blocks:
            # A repair, of which nothing is handed on; or chunks before it were left to the link.
            if chunk >= self._next:
                self._leave(self._uppers)
            return
        self._next += 1
        for index, upper in enumerate(self._uppers):
            boundary = upper.state.boundary
            if not boundary.possible(chunk):
                return
            boundary.hand_over(chunk)
            if upper.claim_chunk(now_s, receives=True) is None:
                for each in self._uppers[index:]:
                    each.state.boundary.lose_from(chunk)
                return
            below.send_chunk()
            below = upper

    def _leave(self, stages: Sequence[SteppedRestoration]) -> None:
        for stage in stages:
            boundary = stage.state.boundary
            if self._next < stage.state.problem.grid.num_chunks and boundary.possible(self._next):
                boundary.lose_from(self._next)

    def _bottom_open(self) -> bool:
        """Whether the bottom stage may still recompute the next chunk whole; it only waits, for boundary states."""
        state = self._bottom.state
        grid = state.problem.grid
        if self._next >= grid.num_chunks or not state.boundary.possible(self._next):
            return False
        return all(state.cell(self._next, block) is Cell.OPEN for block in range(grid.num_blocks))

    def _chunk_s(self, chunk: int) -> float:
        """Corrected seconds that a chunk takes the slowest stage."""
        states = [stage.state for stage in (self._bottom, *self._uppers)]
        return max(float(state.problem.compute_KB[chunk].sum()) * state.rates.compute_factor for state in states)
