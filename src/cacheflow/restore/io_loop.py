"""The I/O side of the executor: keeps reads in flight, places what verified, reports what did not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Generic, TypeVar

from cacheflow.plan.explain import Lane, Span, SpanKind
from cacheflow.plan.grid import Tile
from cacheflow.restore.link_clock import LinkClock
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import Ticket, TransferPort
from cacheflow.restore.shared import Shared
from cacheflow.types import LoadOutcome

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Ticket)


@dataclass(slots=True)
class _Read(Generic[T]):
    tile: Tile
    ticket: T
    started_s: float
    deadline_s: float


class IoLoop(Generic[T]):
    """Runs on the executor's I/O thread until the restoration needs no more loads.

    A port that raises is a bug or a broken store: it is logged, the link is closed and compute restores the rest.
    """

    def __init__(self, shared: Shared, transfer: TransferPort[T], options: ExecutorOptions) -> None:
        """Nothing is read before ``run``."""
        self._shared, self._transfer, self._options = shared, transfer, options
        self._reads: list[_Read[T]] = []
        self._abandoned: list[T] = []
        self._link = LinkClock()

    def run(self) -> None:
        """Read until nothing is left to load or the restoration is over; leaves no read under way."""
        try:
            while not self._shared.stop.is_set() and self._step():
                pass
        except Exception:
            logger.exception("transfer port raised; the link is closed and compute restores the rest")
            self._give_up(LoadOutcome.ERROR)
        finally:
            self._cancel_all()

    def _step(self) -> bool:
        """Start, await and settle some reads; False when nothing is left to load."""
        self._fill()
        if not self._reads:
            with self._shared.changed:
                if not self._shared.state.loads_possible:
                    return False
                self._shared.changed.wait(self._options.poll_s)
            return True
        oldest = self._reads[0]
        patience_s = min(self._options.poll_s, max(0.0, oldest.deadline_s - self._shared.now_s()))
        self._settle(oldest, self._transfer.wait(oldest.ticket, timeout_s=patience_s))
        for read in list(self._reads):
            if read is not oldest:
                self._settle(read, self._transfer.wait(read.ticket, timeout_s=0.0))
        return True

    def _fill(self) -> None:
        options = self._options
        while len(self._reads) < options.max_reads_in_flight:
            with self._shared.changed:
                now_s = self._shared.now_s()
                tile = self._shared.state.claim_load(now_s)
                allowed_s = options.deadline_floor_s + options.deadline_factor * self._shared.state.expected_load_s()
            if tile is None:
                return
            try:
                ticket = self._transfer.start(tile, deadline_s=allowed_s)
            except Exception:
                with self._shared.changed:
                    self._shared.state.fail_load(tile, LoadOutcome.ERROR)
                raise
            self._reads.append(_Read(tile, ticket, now_s, now_s + allowed_s))

    def _settle(self, read: _Read[T], outcome: LoadOutcome | None) -> None:
        now_s = self._shared.now_s()
        if outcome is None:
            if now_s < read.deadline_s:
                return
            outcome = LoadOutcome.LATE
        self._reads.remove(read)
        if outcome is LoadOutcome.OK:
            self._place(read, now_s)
            return
        self._abandoned.append(read.ticket)
        with self._shared.changed:
            self._shared.state.fail_load(read.tile, outcome)
            self._note(read, SpanKind.FAILED, now_s)

    def _place(self, read: _Read[T], now_s: float) -> None:
        shared = self._shared
        with shared.changed:
            wanted = shared.state.begin_place(read.tile)
            busy_s = self._note(read, SpanKind.LOAD if wanted else SpanKind.WASTED, now_s)
            shared.state.rates.observe_load(num_bytes=read.ticket.num_bytes, busy_s=busy_s)
        if not wanted:
            self._transfer.cancel(read.ticket)
            return
        try:
            self._transfer.place(read.ticket)
        except Exception:
            self._abandoned.append(read.ticket)
            with shared.changed:
                shared.state.fail_place(read.tile)
            raise
        with shared.changed:
            shared.state.complete_load(read.tile)
            shared.note_restored()
            shared.changed.notify_all()

    def _note(self, read: _Read[T], kind: SpanKind, end_s: float) -> float:
        """Note how a read ended; returns the seconds the link worked on it."""
        tile = read.tile
        busy_s = self._link.end(read.started_s, end_s)
        self._shared.spans.append(
            Span(
                lane=Lane.IO,
                kind=kind,
                start_s=end_s - busy_s,
                end_s=end_s,
                chunk=tile.chunk_lo,
                block_lo=tile.block_lo,
                block_hi=tile.block_hi,
            )
        )
        self._shared.changed.notify_all()
        return busy_s

    def _give_up(self, outcome: LoadOutcome) -> None:
        with self._shared.changed:
            for read in self._reads:
                self._shared.state.fail_load(read.tile, outcome)
            self._shared.state.close_link()
            self._shared.changed.notify_all()

    def _cancel_all(self) -> None:
        """Free every ticket; a late read is only waited for here, when nobody waits for its cell any more."""
        for ticket in (*self._abandoned, *(read.ticket for read in self._reads)):
            self._transfer.cancel(ticket)
        self._reads.clear()
        self._abandoned.clear()
