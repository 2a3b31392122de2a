"""What both pointers of one restoration know: the board, the plan, live rates and the work still ahead."""

from __future__ import annotations

from collections import deque

from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import BoundarySource, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.state.board import Board
from cacheflow.state.boundary import Boundaries

NO_ACTIVATIONS = -1
"""In ``climbed_K``: compute has left the chunk, and what it would need to continue is gone."""


class Progress:
    """Shared, mutable state of one restoration. Not thread-safe: used under the restoration's lock.

    Attributes:
        demand_K: Per chunk, the number of bottom blocks that only compute may restore (a load of one of them failed,
            or compute took the chunk back from a slow link); 0 means none.
        failed_K: Per chunk, the part of ``demand_K`` that the link has failed to deliver: it is not asked again.
        climbed_K: Per chunk, the block at which compute can continue it; ``NO_ACTIVATIONS`` when it must start over.
        in_flight_bytes: Bytes of loads that are under way.
        suffix_next: Lowest block the suffix has not been ordered through.
        link_down: The load pointer claims nothing (any more).
        link_closed: ... and never will, because the link fails.
        link_climbs: The load pointer has begun to load chunks from their bottom blocks.
        compute_stopped: The compute pointer has left the open cells to the link.
        min_claim_s: Compute claims several blocks at once until they last this long; 0 claims one at a time.
        others_link_s: Seconds of the link that other restorations come first with.
        others_compute_s: Seconds of compute that other restorations come first with.
        boundaries: What recomputing a chunk has to wait for.
        limit: From this chunk on nothing is restored any more, because one cell of it cannot be.
        keeps_whole: Compute recomputes a chunk whole or not at all: the stage above is handed it.
    """

    def __init__(
        self,
        problem: RestoreProblem,
        plan: RestorePlan,
        rates: LiveRates,
        *,
        min_claim_s: float = 0.0,
        source: BoundarySource = BoundarySource.FIRST_STAGE,
    ) -> None:
        """Start with every cell open."""
        self.problem, self.plan, self.rates = problem, plan, rates
        self.min_claim_s = min_claim_s
        self.board = Board(problem)
        self.boundaries = Boundaries(source, problem.boundary_bytes_K.tolist())
        self.limit = problem.grid.num_chunks
        self.keeps_whole = False
        self.demand_K = [0] * problem.grid.num_chunks
        self.failed_K = [0] * problem.grid.num_chunks
        self.climbed_K = [0] * problem.grid.num_chunks
        self.in_flight_bytes = 0
        self._reads: deque[int] = deque()
        self._oldest_since_s: float | None = None
        self._oldest_age_s = 0.0
        self.suffix_next = 0
        self.link_down = not plan.load_sequence
        self.link_closed = False
        self.compute_stopped = not plan.compute_sequence
        self.link_climbs = False
        self.others_link_s = self.others_compute_s = 0.0
        self.has_suffix = bool(problem.grid.suffix_ends)
        self.top_suffix_s = float(problem.suffix_B[-1]) + problem.head_s
        self._suffix_from_B: list[float] = [*problem.suffix_B[::-1].cumsum()[::-1].tolist(), 0.0]
        self._claim_s = 0.0
        self._claimed_at_s = 0.0
        self._ordered_s = 0.0
        self._ordered_at_s = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth to decide by: a read that is overdue counts as slow before it ends."""
        if not self._oldest_age_s:
            return self.rates.bytes_per_s
        return self.rates.bytes_per_s_while(num_bytes=self._reads[0], age_s=self._oldest_age_s)

    def read_s(self) -> float:
        """Seconds of the link that the oldest read has had already, as far as it can be expected to be read."""
        return min(self._oldest_age_s, self._reads[0] / self.bytes_per_s) if self._reads else 0.0

    def begin_load(self, num_bytes: int) -> None:
        """Note a read under way."""
        self.in_flight_bytes += num_bytes
        self._reads.append(num_bytes)

    def end_load(self, num_bytes: int) -> None:
        """Note that a read ended, well or not; the link works on the next one from the next ``note_time`` on."""
        self.in_flight_bytes -= num_bytes
        self._reads.remove(num_bytes)
        self._oldest_since_s, self._oldest_age_s = None, 0.0

    def note_time(self, now_s: float) -> None:
        """Let the oldest read age. Only with a suffix: without one no decision about the link is final."""
        if not self._reads or not self.plan.balance_suffix:
            return
        if self._oldest_since_s is None:
            self._oldest_since_s = now_s
        self._oldest_age_s = now_s - self._oldest_since_s

    def begin_compute(self, predicted_s: float, now_s: float) -> None:
        """Note that compute works on something expected to take ``predicted_s`` (uncorrected)."""
        self._claim_s, self._claimed_at_s = predicted_s, now_s

    def end_compute(self) -> None:
        """Note that compute is free."""
        self._claim_s = 0.0

    def order_compute(self, predicted_s: float, now_s: float) -> None:
        """Note work (uncorrected seconds) that compute was ordered to do behind what it was ordered before."""
        if self._ordered_s <= 0.0:
            self._ordered_at_s = now_s
        self._ordered_s += predicted_s

    def report_compute(self, predicted_s: float, now_s: float) -> None:
        """Note that compute is through with ordered work; what is behind it counts as begun now."""
        self._ordered_s = max(0.0, self._ordered_s - predicted_s)
        self._ordered_at_s = now_s

    def compute_left_s(self, now_s: float) -> float:
        """Corrected seconds until compute is through with what it works on and what it was ordered to do."""
        factor = self.rates.compute_factor
        claim_s = max(0.0, self._claim_s * factor - (now_s - self._claimed_at_s))
        ordered_s = max(0.0, self._ordered_s * factor - (now_s - self._ordered_at_s))
        return claim_s + ordered_s + self.others_compute_s

    def link_s(self, num_bytes: float) -> float:
        """Seconds the link needs for ``num_bytes`` more, behind what is already in flight and what comes first."""
        return (self.in_flight_bytes + num_bytes) / self.bytes_per_s + self.others_link_s

    def suffix_left_s(self) -> float:
        """Corrected seconds of suffix work, head included, that has not been ordered yet."""
        return self.suffix_from_s(self.suffix_next)

    def suffix_from_s(self, block: int) -> float:
        """Corrected seconds of the suffix from a block to the first token."""
        return (self._suffix_from_B[block] + self.problem.head_s) * self.rates.compute_factor

    def loadable(self, chunk: int, block: int) -> bool:
        """Whether the link may restore a cell: it is open and not demanded of compute."""
        return self.board.is_open(chunk, block) and block >= self.demand_K[chunk] and chunk < self.limit

    def computable(self, chunk: int) -> bool:
        """Whether compute may restore cells of a chunk, now or later."""
        return chunk < self.limit and self.boundaries.possible(chunk)

    def demanded_open_block(self, chunk: int) -> int:
        """Highest open block that only compute may restore in a chunk; -1 when there is none."""
        demand = self.demand_K[chunk]
        return self.board.top_open_block(chunk, 0, demand) if demand else -1

    def bottom_row_pays(self) -> bool:
        """Whether compute restores what is open of the bottom row sooner than the link would; the suffix needs it."""
        if not self.plan.bottom_row_by_compute or self.link_down or self.boundaries.needed:
            return False
        return self.bottom_left_s() < float(self.board.bottom_bytes_K.sum()) / self.bytes_per_s

    def bottom_left_s(self) -> float:
        """Corrected seconds to recompute the keys and values of what is open of the bottom row."""
        return float(self.board.bottom_compute_K.sum()) * self.rates.compute_factor

    def repair_left_s(self) -> float:
        """Corrected seconds to recompute the chunks demanded of compute."""
        total = 0.0
        for chunk, demand in enumerate(self.demand_K):
            if demand:
                top = self.demanded_open_block(chunk)
                total += sum(self.board.compute_s(chunk, block) for block in range(self.start_block(chunk), top + 1))
        return total * self.rates.compute_factor

    def start_block(self, chunk: int) -> int:
        """Block at which compute has to start to restore what is open of a chunk."""
        block = self.climbed_K[chunk]
        return 0 if block == NO_ACTIVATIONS or self.board.top_open_block(chunk, 0, block) >= 0 else block

    def demanded_bytes(self) -> float:
        """Bytes of the open cells that only compute may restore."""
        board = self.board
        return float(
            sum(
                board.load_bytes(chunk, block)
                for chunk, demand in enumerate(self.demand_K)
                for block in range(demand)
                if board.is_open(chunk, block)
            )
        )
