"""The link's side of one restoration: what is being read, how fast, and what the link has failed to bring."""

from __future__ import annotations

from collections import Counter, deque
from enum import Enum

from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.rates import LiveRates


class LinkPhase(Enum):
    """What the link does in a restoration."""

    UNUSED = "unused"
    """The plan leaves nothing to it."""
    IN_SEQUENCE = "in_sequence"
    """It reads in the plan's sequence."""
    CLIMBING = "climbing"
    """It reads bottom-up, so that the suffix climbs after the load; the meeting point is settled."""
    CLOSED = "closed"
    """It has failed or is given up: it reads nothing any more."""


class LinkSide:
    """Reads under way in one restoration, and estimates that follow from them.

    Attributes:
        phase: What the link does.
        failed_K: Per chunk, the number of bottom blocks that the link is not asked for again, because it has failed to
            bring one of them.
        in_flight_bytes: Bytes of reads under way.
        num_placing: Verified reads that are being copied to where compute finds them.
        others_s: Seconds of the link that other restorations come first with.
        reads_by_tier: Reads of cells under way, by the store that they come from.
        bytes_by_tier: What they take of the link.
    """

    def __init__(self, plan: RestorePlan, rates: LiveRates, num_chunks: int) -> None:
        """Start with nothing under way."""
        self._plan, self._rates = plan, rates
        self.phase = LinkPhase.IN_SEQUENCE if plan.load_sequence else LinkPhase.UNUSED
        self.failed_K = [0] * num_chunks
        self.in_flight_bytes = 0
        self.num_placing = 0
        self.others_s = 0.0
        self.reads_by_tier: Counter[int] = Counter()
        self.bytes_by_tier: Counter[int] = Counter()
        self._reads: deque[int] = deque()
        self._oldest_since_s: float | None = None
        self._oldest_age_s = 0.0

    @property
    def down(self) -> bool:
        """Whether the link claims nothing, any more or at all."""
        return self.phase in (LinkPhase.UNUSED, LinkPhase.CLOSED)

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth to decide by: a read that is overdue counts as slow before it ends."""
        if not self._oldest_age_s:
            return self._rates.bytes_per_s
        return self._rates.bytes_per_s_while(num_bytes=self._reads[0], age_s=self._oldest_age_s)

    def load_s(self, num_bytes: float) -> float:
        """Seconds for ``num_bytes`` more, after what is already in flight and what comes first."""
        return (self.in_flight_bytes + num_bytes) / self.bytes_per_s + self.others_s

    def expected_s(self, tier: int | None = None) -> float:
        """Seconds until everything in flight, or all that comes from one store, should have arrived."""
        if tier is not None:
            return self.bytes_by_tier[tier] / self.bytes_per_s
        return self.load_s(0) - self.others_s

    def oldest_read_s(self) -> float:
        """Seconds of the link that the oldest read has had already, as far as it can be expected to be read."""
        return min(self._oldest_age_s, self._reads[0] / self.bytes_per_s) if self._reads else 0.0

    def note_time(self, now_s: float) -> None:
        """Let the oldest read age. Only with a suffix: without one no decision about the link is final."""
        if not self._reads or not self._plan.balance_suffix:
            return
        if self._oldest_since_s is None:
            self._oldest_since_s = now_s
        self._oldest_age_s = now_s - self._oldest_since_s

    def begin_read(self, num_bytes: int, *, tier: int | None = None) -> None:
        """Note a read under way; boundary states come from no tier."""
        if tier is not None:
            self.reads_by_tier[tier] += 1
            self.bytes_by_tier[tier] += num_bytes
        self.in_flight_bytes += num_bytes
        self._reads.append(num_bytes)

    def end_read(self, num_bytes: int, *, tier: int | None = None) -> None:
        """Note that a read ended, well or not; the link works on the next one from the next ``note_time`` on."""
        if tier is not None:
            self.reads_by_tier[tier] -= 1
            self.bytes_by_tier[tier] -= num_bytes
        self.in_flight_bytes -= num_bytes
        self._reads.remove(num_bytes)
        self._oldest_since_s, self._oldest_age_s = None, 0.0

    def begin_place(self) -> None:
        """Note that a verified read is being placed."""
        self.num_placing += 1

    def end_place(self) -> None:
        """Note that a placement ended, well or not."""
        self.num_placing -= 1

    def yield_to(self, others_s: float) -> None:
        """Note how many seconds of the link other restorations come first with."""
        self.others_s = others_s

    def open(self) -> None:
        """Use a link that the plan left unused."""
        if self.phase is LinkPhase.UNUSED:
            self.phase = LinkPhase.IN_SEQUENCE

    def climb(self) -> None:
        """Read bottom-up from now on."""
        self.phase = LinkPhase.CLIMBING

    def close(self) -> None:
        """Read nothing any more."""
        self.phase = LinkPhase.CLOSED

    def note_failed(self, chunk: int, num_blocks: int) -> None:
        """Ask the link for none of a chunk's first blocks again."""
        self.failed_K[chunk] = max(self.failed_K[chunk], num_blocks)

    def forgive(self, chunk: int) -> None:
        """Ask the link for all of a chunk, whatever it has failed to bring."""
        self.failed_K[chunk] = 0
