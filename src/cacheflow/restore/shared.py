"""What compute and the I/O loop share: the lock, the clock, and one ``Restoration`` for each request under way."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cacheflow.plan.grid import Tile
from cacheflow.restore.ports import Ticket, TransferPort
from cacheflow.state.report import Span
from cacheflow.state.restoration import RestoreState
from cacheflow.types import Clock

T = TypeVar("T", bound=Ticket)


class Restoration(Generic[T]):
    """One restoration as both threads see it; everything in it is guarded by the lock of its source.

    Attributes:
        state: Its state machine.
        transfer: Reads its cells; called on the I/O thread only.
        spans: What was done, both lanes.
        restored_at_s: When the last cell became resident; None before.
        over: It needs no read any more, and none may touch its buffer.
        placing: The I/O thread is copying a verified read into the buffer.
    """

    __slots__ = ("over", "placing", "restored_at_s", "spans", "state", "transfer")

    def __init__(self, state: RestoreState, transfer: TransferPort[T]) -> None:
        """Start with nothing done."""
        self.state, self.transfer = state, transfer
        self.spans: list[Span] = []
        self.restored_at_s: float | None = None
        self.over = self.placing = False

    def note_restored(self, now_s: float) -> None:
        """Remember when the last cell became resident; called after every completion."""
        if self.restored_at_s is None and self.state.restored:
            self.restored_at_s = now_s


@dataclass(frozen=True, slots=True)
class LoadOrder(Generic[T]):
    """One cell to read.

    Attributes:
        restoration: Whose.
        tile: The cell.
        now_s: When it was claimed.
        expected_s: Seconds in which it should arrive, behind everything in flight.
    """

    restoration: Restoration[T]
    tile: Tile
    now_s: float
    expected_s: float


class LoadSource(Protocol[T]):
    """Where the I/O loop gets its reads from: one restoration, or all of a batch.

    ``claim_load``, ``loads_possible`` and ``close_link`` are called with ``changed`` held.
    """

    @property
    def changed(self) -> threading.Condition:
        """Guards every restoration of the source; notified whenever either thread changed one."""
        ...

    @property
    def stop(self) -> threading.Event:
        """Set when the loop should end at once."""
        ...

    def now_s(self) -> float:
        """Seconds since the source started."""
        ...

    def claim_load(self, behind_bytes: int) -> LoadOrder[T] | None:
        """Claim the next read, behind so many bytes in flight; None when the link should wait."""
        ...

    def loads_possible(self) -> bool:
        """Whether there may be something to load later; the loop ends when not."""
        ...

    def close_link(self) -> None:
        """Leave everything to compute: the loop has failed."""
        ...


class Shared(Generic[T]):
    """The source of one restoration; ``changed`` guards it."""

    def __init__(self, restoration: Restoration[T], clock: Clock) -> None:
        """Start the restoration's clock."""
        self.restoration = restoration
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self._clock, self._origin_s = clock, clock()

    def now_s(self) -> float:
        """Seconds since the restoration started."""
        return self._clock() - self._origin_s

    def claim_load(self, behind_bytes: int) -> LoadOrder[T] | None:
        """See ``LoadSource``; the state counts what is in flight itself."""
        state, now_s = self.restoration.state, self.now_s()
        tile = state.claim_load(now_s)
        return None if tile is None else LoadOrder(self.restoration, tile, now_s, state.expected_load_s())

    def loads_possible(self) -> bool:
        """See ``LoadSource``."""
        return self.restoration.state.loads_possible

    def close_link(self) -> None:
        """See ``LoadSource``."""
        self.restoration.state.close_link()
