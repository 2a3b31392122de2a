"""What happens to the boundary states of one restoration, and what that means for the chunks above them."""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.plan.problem import BoundarySource
from cacheflow.state.boundary import BoundaryState
from cacheflow.state.boundary_pointer import BoundaryPointer
from cacheflow.state.link_side import LinkSide
from cacheflow.state.progress import Progress


class BoundaryEvents:
    """The part of a restoration's state that a later pipeline stage has and the first has not.

    Used under the restoration's lock, like the state it belongs to.

    Attributes:
        loaded_bytes: Bytes of boundary states that arrived.
        num_failed: Boundary reads that gave nothing usable.
    """

    def __init__(self, progress: Progress, load: LinkSide) -> None:
        """Read nothing yet; without a source everything is left to the link at once."""
        self._p, self._load = progress, load
        self._pointer = BoundaryPointer(progress)
        self._opened: set[int] = set()
        self.loaded_bytes = 0
        self.num_failed = 0

    @property
    def source(self) -> BoundarySource:
        """Where the boundary states come from."""
        return self._p.boundaries.source

    @property
    def claims_possible(self) -> bool:
        """Whether a boundary read may still be claimed, now or later."""
        return self._pointer.possible()

    def state(self, chunk: int) -> BoundaryState:
        """Where a chunk's boundary states are."""
        return self._p.boundaries.state(chunk)

    @property
    def any_ready(self) -> bool:
        """Whether a chunk with open cells is ready to be recomputed, as far as its boundary states are concerned."""
        board, boundaries = self._p.board, self._p.boundaries
        return any(board.num_open_K[chunk] > 0 and boundaries.ready(chunk) for chunk in range(board.num_chunks))

    def awaited_s(self, now_s: float) -> float | None:
        """Seconds until the first boundary read under way should be through; None when compute waits for none.

        Compute waits while no chunk with open cells is ready to be recomputed.
        """
        due_s = None if self.any_ready else self._p.boundaries.next_due_s()
        return None if due_s is None else max(0.0, due_s - now_s)

    def possible(self, chunk: int) -> bool:
        """Whether a chunk can be recomputed now or later, as far as its boundary states are concerned."""
        return self._p.computable(chunk)

    def claim(self, now_s: float) -> int | None:
        """Claim the chunk whose boundary states the link reads next; None when none is due or wanted.

        To be asked before ``claim_load``: compute waits for nothing else of the link.

        Args:
            now_s: Seconds since the restoration started.
        """
        self._p.note_time(now_s)
        return self._pointer.claim(now_s)

    def complete(self, chunk: int, now_s: float) -> None:
        """Note that a chunk's boundary states are where compute finds them."""
        num_bytes = self._p.boundaries.num_bytes(chunk)
        self._p.end_load(num_bytes)
        self.loaded_bytes += num_bytes
        if self.state(chunk) is BoundaryState.READING:
            self._p.boundaries.complete(chunk, now_s)

    def fail(self, chunk: int) -> None:
        """Note that a read gave nothing usable: from this chunk on the stage loads."""
        self.num_failed += 1
        self.drop(chunk)

    def drop(self, chunk: int) -> None:
        """Note that a read was given up on purpose; the chunk cannot be recomputed any more."""
        self._p.end_load(self._p.boundaries.num_bytes(chunk))
        if self.state(chunk) is BoundaryState.READING:
            self.lose(chunk)

    def lose(self, chunk: int) -> None:
        """Leave a chunk, and all later ones if it still has open cells, to the link."""
        # Without open cells nobody needs the states, unless a read under way fails: later chunks are as good as before.
        self._lose(chunk, and_later=self._p.board.num_open_K[chunk] > 0)

    def lose_from(self, chunk: int) -> None:
        """Leave a chunk and all later ones to the link."""
        self._lose(chunk, and_later=True)

    def _lose(self, chunk: int, *, and_later: bool) -> None:
        p = self._p
        p.boundaries.lose(chunk, and_later=and_later)
        opens = not p.plan.load_sequence and not p.link_closed  # a plan that leaves nothing to a link that is well
        for each in range(chunk, p.board.num_chunks):
            if not p.boundaries.possible(each):
                if opens and each not in self._opened:
                    self._opened.add(each)
                    p.failed_K[each] = 0
                p.demand_K[each] = p.failed_K[each]
        if opens:
            p.link_down = False
        self._load.take_over(min(chunk for chunk in range(p.board.num_chunks) if not p.boundaries.possible(chunk)))
        self.find_limit()

    def compute_left_s(self, now_s: float) -> float:
        """Corrected seconds until compute is through with what it was ordered to do."""
        return self._p.compute_left_s(now_s)

    def wants(self, chunk: int) -> bool:
        """Whether the stage below is to hand a chunk's activations over: it was not, and there are cells left."""
        p = self._p
        unread = self.source is BoundarySource.HANDED_OVER and self.state(chunk) is BoundaryState.UNREAD
        return unread and p.computable(chunk) and p.board.num_open_K[chunk] > 0

    def hand_over(self, chunk: int) -> None:
        """Note that the stage below hands a chunk's activations over before compute comes to it."""
        assert self.source is BoundarySource.HANDED_OVER, f"a stage whose boundary source is {self.source}"
        self._p.boundaries.complete(chunk)

    def expect(self, seconds: Sequence[float], now_s: float) -> None:
        """Note in how many seconds the stage below is expected to be through with each chunk it hands over."""
        for chunk, left_s in enumerate(seconds):
            if self.wants(chunk):
                self._p.boundaries.expect(chunk, now_s + left_s)

    def lose_unread(self) -> None:
        """Leave to the link what was neither stored nor handed over: it will not come any more."""
        for chunk in range(self._p.board.num_chunks):
            if self.state(chunk) is BoundaryState.UNREAD and self._p.boundaries.possible(chunk):
                self.lose(chunk)

    def find_limit(self) -> None:
        """Find the first chunk with a cell that can neither be recomputed nor loaded."""
        p = self._p
        for chunk in range(p.limit):
            if not p.boundaries.possible(chunk) and self._has_hole(chunk):
                self.stop_before(chunk)
                return

    def _has_hole(self, chunk: int) -> bool:
        p = self._p
        return p.board.top_open_block(chunk, 0, p.board.num_blocks if p.link_down else p.failed_K[chunk]) >= 0

    def stop_before(self, chunk: int) -> None:
        """Restore nothing from a chunk on: what lies behind a hole is of no use."""
        self._p.limit = min(self._p.limit, chunk)
