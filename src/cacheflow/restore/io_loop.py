"""The I/O side of the executors: keeps reads in flight, places what verified, reports what did not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cacheflow.plan.grid import Tile
from cacheflow.restore.link_clock import LinkClock
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import Ticket, TransferPort
from cacheflow.restore.shared import LoadSource, Restoration
from cacheflow.state.report import Lane, Span, SpanKind
from cacheflow.types import LoadOutcome

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Ticket)


@dataclass(slots=True, eq=False)
class _Read(Generic[T]):
    restoration: Restoration[T]
    tile: Tile
    ticket: T
    started_s: float
    deadline_s: float


class IoLoop(Generic[T]):
    """Runs on the executor's I/O thread until its source needs no more loads.

    A port that raises is a bug or a broken store: it is logged, the link is closed for its restoration and compute
    restores the rest of it.
    """

    def __init__(
        self,
        source: LoadSource[T],
        options: ExecutorOptions,
        *,
        free_late: Callable[[TransferPort[T], T], None] | None = None,
    ) -> None:
        """Nothing is read before ``run``.

        Args:
            source: Whose cells are read.
            options: Depth and deadlines.
            free_late: Cancels, somewhere else and without blocking, a read that its store may still be busy with;
                without it such reads are cancelled when the loop ends.
        """
        self._source, self._options = source, options
        self._reads: list[_Read[T]] = []
        self._late: list[_Read[T]] = []
        self._free_late = free_late
        self._link = LinkClock()

    def run(self) -> None:
        """Read until nothing is left to load or the source stops; leaves no read under way."""
        try:
            while not self._source.stop.is_set() and self._step():
                pass
        except Exception:
            logger.exception("the I/O loop failed; the link is closed and compute restores the rest")
            for restoration in {read.restoration for read in self._reads}:
                self._give_up(restoration)
            with self._source.changed:
                self._source.close_link()
                self._source.changed.notify_all()
        finally:
            self._cancel_all()

    def _step(self) -> bool:
        """Start, await and settle some reads; False when nothing is left to load."""
        self._drop_ended()
        self._fill()
        if not self._reads:
            with self._source.changed:
                if not self._source.loads_possible():
                    return False
                self._source.changed.wait(self._options.poll_s)
            return True
        oldest = self._reads[0]
        self._await(oldest, min(self._options.poll_s, max(0.0, oldest.deadline_s - self._source.now_s())))
        for read in list(self._reads):
            if read is not oldest and read in self._reads:
                self._await(read, 0.0)
        return True

    def _fill(self) -> None:
        options = self._options
        while len(self._reads) < options.max_reads_in_flight:
            behind_bytes = sum(read.ticket.num_bytes for read in self._reads)
            with self._source.changed:
                order = self._source.claim_load(behind_bytes)
            if order is None:
                return
            allowed_s = options.deadline_floor_s + options.deadline_factor * order.expected_s
            restoration, tile = order.restoration, order.tile
            try:
                ticket = restoration.transfer.start(tile, deadline_s=allowed_s)
            except Exception:
                logger.exception("transfer port raised; the link is closed and compute restores the rest")
                with self._source.changed:
                    restoration.state.fail_load(tile, LoadOutcome.ERROR)
                self._give_up(restoration)
            else:
                self._reads.append(_Read(restoration, tile, ticket, order.now_s, order.now_s + allowed_s))

    def _await(self, read: _Read[T], timeout_s: float) -> None:
        try:
            self._settle(read, read.restoration.transfer.wait(read.ticket, timeout_s=timeout_s))
        except Exception:
            logger.exception("transfer port raised; the link is closed and compute restores the rest")
            self._give_up(read.restoration)

    def _settle(self, read: _Read[T], outcome: LoadOutcome | None) -> None:
        now_s = self._source.now_s()
        if outcome is None:
            if now_s < read.deadline_s:
                return
            outcome = LoadOutcome.LATE
        self._reads.remove(read)
        if outcome is LoadOutcome.OK:
            self._place(read, now_s)
            return
        self._let_go(read)
        with self._source.changed:
            read.restoration.state.fail_load(read.tile, outcome)
            self._note(read, SpanKind.FAILED, now_s)

    def _place(self, read: _Read[T], now_s: float) -> None:
        restoration, changed = read.restoration, self._source.changed
        with changed:
            wanted = not restoration.over and restoration.state.begin_place(read.tile)
            restoration.placing = wanted
            busy_s = self._note(read, SpanKind.LOAD if wanted else SpanKind.WASTED, now_s)
            restoration.state.rates.observe_load(num_bytes=read.ticket.num_bytes, busy_s=busy_s)
        if not wanted:
            restoration.transfer.cancel(read.ticket)
            return
        try:
            restoration.transfer.place(read.ticket)
        except Exception:
            self._let_go(read)
            with changed:
                restoration.placing = False
                restoration.state.fail_place(read.tile)
            raise
        with changed:
            restoration.placing = False
            restoration.state.complete_load(read.tile)
            restoration.note_restored(self._source.now_s())
            changed.notify_all()

    def _note(self, read: _Read[T], kind: SpanKind, end_s: float) -> float:
        """Note how a read ended; returns the seconds the link worked on it."""
        tile = read.tile
        busy_s = self._link.end(read.started_s, end_s)
        read.restoration.spans.append(
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
        self._source.changed.notify_all()
        return busy_s

    def _give_up(self, restoration: Restoration[T]) -> None:
        """Close the link for one restoration."""
        reads = [read for read in self._reads if read.restoration is restoration]
        with self._source.changed:
            for read in reads:
                restoration.state.fail_load(read.tile, LoadOutcome.ERROR)
            restoration.state.close_link()
            self._source.changed.notify_all()
        self._forget(reads)

    def _drop_ended(self) -> None:
        """Give up the reads of restorations that ended before them."""
        ended = [read for read in self._reads if read.restoration.over]  # set once: no lock needed to see it
        for read in ended:
            self._link.end(read.started_s, self._source.now_s())  # or the next read would seem to have taken this long
        self._forget(ended)

    def _forget(self, reads: list[_Read[T]]) -> None:
        for read in reads:
            self._reads.remove(read)
            self._let_go(read)

    def _let_go(self, read: _Read[T]) -> None:
        if self._free_late is None:
            self._late.append(read)
        else:
            self._free_late(read.restoration.transfer, read.ticket)

    def _cancel_all(self) -> None:
        """Free every ticket; a late read is only waited for here, when nobody waits for its cell any more."""
        for read in (*self._late, *self._reads):
            try:
                read.restoration.transfer.cancel(read.ticket)
            except Exception:
                logger.exception("transfer port raised on cancel")
        self._late.clear()
        self._reads.clear()
