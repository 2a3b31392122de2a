"""The boundary pointer: which boundary states the link fetches next, before any key or value.

From the head, for the chunks compute is about to come to, and only for those it is expected to reach before the link
does: reading a boundary takes the link as long as so many keys and values.
"""

from __future__ import annotations

from cacheflow.plan.problem import BoundarySource
from cacheflow.state.boundary import BoundaryState
from cacheflow.state.progress import Progress

CHUNKS_AHEAD = 1
"""Chunks that are kept ready behind the one compute works on, however long a chunk takes."""


class BoundaryPointer:
    """Claims boundary reads, one at a time."""

    def __init__(self, progress: Progress) -> None:
        """Read nothing yet."""
        self._p = progress
        loadable = {cell for tile in progress.plan.load_sequence for cell in tile.cells()}
        num_blocks = progress.board.num_blocks
        self._only_compute_K = [
            [block for block in range(num_blocks) if (chunk, block) not in loadable]
            for chunk in range(progress.board.num_chunks)
        ]
        self._cell_bytes = int(progress.problem.load_bytes_KB.max(initial=0))

    def claim(self, now_s: float) -> int | None:
        """Claim the chunk whose boundary states are due; None when none is, or none is wanted."""
        p = self._p
        if p.boundaries.source is not BoundarySource.STORED:
            return None
        chunk = self._next(now_s)
        if chunk is None or not self._due(chunk, now_s):
            return None
        num_bytes = p.boundaries.num_bytes(chunk)
        p.boundaries.begin(chunk, due_s=now_s + p.link_s(num_bytes) - p.others_link_s)
        p.begin_load(num_bytes)
        return chunk

    def possible(self) -> bool:
        """Whether a boundary may still be claimed, now or later."""
        p = self._p
        return p.boundaries.source is BoundarySource.STORED and any(
            self._unread(chunk) for chunk in range(p.board.num_chunks)
        )

    def _unread(self, chunk: int) -> bool:
        p = self._p
        return (
            p.boundaries.state(chunk) is BoundaryState.UNREAD and p.computable(chunk) and p.board.num_open_K[chunk] > 0
        )

    def _next(self, now_s: float) -> int | None:
        """The first chunk that compute will want to start: demanded of it, or ahead of where the link will meet it."""
        p, reaches = self._p, bool(self._p.plan.compute_sequence)
        for chunk in range(p.board.num_chunks):
            if not self._unread(chunk):
                continue
            if p.demanded_open_block(chunk) >= 0:
                return chunk
            if reaches and self._reaches(chunk, now_s):
                return chunk
            reaches = False
        return None

    def _reaches(self, chunk: int, now_s: float) -> bool:
        """Whether compute comes to the chunk so early that it saves the link more than the boundary costs it."""
        p, board = self._p, self._p.board
        if p.link_down or any(board.is_open(chunk, block) for block in self._only_compute_K[chunk]):
            return True
        open_bytes = float(board.open_bytes_K[chunk])
        if open_bytes <= p.boundaries.num_bytes(chunk):
            return False
        gap_s = p.link_s(float(board.open_bytes_K[chunk:].sum())) - self._starts_s(chunk, now_s)
        compute_s = float(board.open_compute_K[chunk]) * p.rates.compute_factor
        # Meeting in this chunk, compute takes the share x of it for which both end together; x * open_bytes must be
        # more than the boundary.
        return gap_s * open_bytes > compute_s * p.boundaries.num_bytes(chunk)

    def _starts_s(self, chunk: int, now_s: float) -> float:
        """Seconds until compute could start a chunk."""
        p = self._p
        return p.compute_left_s(now_s) + float(p.board.open_compute_K[:chunk].sum()) * p.rates.compute_factor

    def _due(self, chunk: int, now_s: float) -> bool:
        p = self._p
        ahead = sum(p.board.num_open_K[each] > 0 and p.boundaries.awaited(each) for each in range(chunk))
        if ahead <= CHUNKS_AHEAD:
            return True
        # The read that would go first otherwise; what it waits for after that is under way already.
        next_bytes = p.boundaries.num_bytes(chunk) + self._cell_bytes
        needed_s = p.link_s(next_bytes) - p.others_link_s + p.boundaries.lead_s
        return self._starts_s(chunk, now_s) <= needed_s
