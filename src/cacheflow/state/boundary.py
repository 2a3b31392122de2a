"""Boundary hidden states: what a later pipeline stage needs of a chunk before it can recompute it.

A stage above the first starts from the activations that the stage below left at its top. They come out of the store
over the stage's own link, head chunk first and just in time (the third axis), or are handed over by the stage below.
Seen from the grid they are the row below the bottom block. What cannot be had ends the staircase: that chunk and all
later ones of the stage are left to the link.
Shapes: ``K`` chunks.
"""

from __future__ import annotations

import math
from enum import IntEnum

from cacheflow.plan.problem import BoundarySource

BOUNDARY_ROW = -1
"""The layer block of a boundary read: the row below the bottom block."""


class BoundaryState(IntEnum):
    """Where the boundary states of one chunk are."""

    UNREAD = 0
    READING = 1
    RESIDENT = 2
    LOST = 3


class Boundaries:
    """The boundary states of one restoration. Not thread-safe: used under the restoration's lock.

    Attributes:
        source: Where they come from.
        lost_from: From this chunk on nothing can be recomputed; the number of chunks while nothing is lost.
        lead_s: Seconds by which a read is ordered before its time, beside the time the link needs: as long as orders
            and reports were seen to take.
    """

    def __init__(self, source: BoundarySource, bytes_K: list[int]) -> None:
        """Nothing is read yet; a first stage needs nothing."""
        num_chunks = len(bytes_K)
        self.source = source
        self._bytes_K = bytes_K
        first = BoundaryState.RESIDENT if source is BoundarySource.FIRST_STAGE else BoundaryState.UNREAD
        self._state_K = [first] * num_chunks
        self._due_K = [math.inf] * num_chunks
        self.lost_from = 0 if source is BoundarySource.NONE else num_chunks
        self.lead_s = 0.0

    @property
    def needed(self) -> bool:
        """Whether chunks have to wait for anything."""
        return self.source is not BoundarySource.FIRST_STAGE

    @property
    def num_reading(self) -> int:
        """Boundary reads under way."""
        return self._state_K.count(BoundaryState.READING)

    def state(self, chunk: int) -> BoundaryState:
        """Where a chunk's boundary states are."""
        return self._state_K[chunk]

    def num_bytes(self, chunk: int) -> int:
        """Bytes a read of a chunk's boundary states moves."""
        return self._bytes_K[chunk]

    def ready(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed from its bottom block now."""
        return self._state_K[chunk] is BoundaryState.RESIDENT and chunk < self.lost_from

    def expect(self, chunk: int, due_s: float) -> None:
        """Note when a chunk that is handed over is expected; infinite for never."""
        self._due_K[chunk] = due_s

    def due_s(self, chunk: int) -> float:
        """When a chunk's boundary states were last expected."""
        return self._due_K[chunk]

    def awaited(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed now, or once a read under way is there."""
        return self._state_K[chunk] in (BoundaryState.READING, BoundaryState.RESIDENT) and chunk < self.lost_from

    def possible(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed now or later."""
        return self._state_K[chunk] is not BoundaryState.LOST and chunk < self.lost_from

    def begin(self, chunk: int, *, due_s: float) -> None:
        """Note a read under way, which the link alone would end at ``due_s``."""
        assert self._state_K[chunk] is BoundaryState.UNREAD, f"boundary of chunk {chunk} is read once"
        self._state_K[chunk], self._due_K[chunk] = BoundaryState.READING, due_s

    def next_due_s(self) -> float | None:
        """When the first read under way would be through by the link alone; None without one."""
        due = [self._due_K[chunk] for chunk, state in enumerate(self._state_K) if state is BoundaryState.READING]
        return min(due, default=None)

    def complete(self, chunk: int, now_s: float | None = None) -> None:
        """Note that a chunk's boundary states are there, and by how much later than the link alone would have been."""
        if self._state_K[chunk] is BoundaryState.READING and now_s is not None:
            # A decaying maximum: a lead that is too short makes compute wait, one too long only holds memory.
            self.lead_s = max(now_s - self._due_K[chunk], 0.7 * self.lead_s)
        self._state_K[chunk] = BoundaryState.RESIDENT

    def lose(self, chunk: int, *, and_later: bool) -> None:
        """Note that a chunk's boundary states will not come; ``and_later``: the staircase ends there."""
        self._state_K[chunk], self._due_K[chunk] = BoundaryState.LOST, math.inf
        if and_later:
            self.lost_from = min(self.lost_from, chunk)
