"""Reads that were ordered: one I/O thread starts, awaits and places them, for every restoration of a worker.

Two things must never wait for a store: the worker's main thread and the reads of another restoration. So nothing here
waits for a store to let go of a staging buffer except a ``TicketReaper``, on threads of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cacheflow.plan.grid import Tile
from cacheflow.restore.link_clock import LinkClock
from cacheflow.restore.ports import BoundaryPort, Ticket, TransferPort
from cacheflow.restore.reaper import TicketReaper
from cacheflow.restore.work import LoadReport, ReadWork
from cacheflow.types import Clock, LoadOutcome

logger = logging.getLogger(__name__)

HELD = (None, LoadOutcome.LATE, LoadOutcome.CANCELLED)
"""Outcomes after which a store may still write into the staging buffer."""


@dataclass(slots=True, eq=False)
class _Read:
    """One read; ``reported``, ``placing`` and membership in the lists are guarded by the lock.

    ``suspect``: its port raised, so nobody knows whether the store has let go of its buffer.
    """

    restore_id: int
    order: ReadWork
    transfer: TransferPort[Ticket]
    origin_s: float
    started_s: float
    num_bytes: int = 0
    ticket: Ticket | None = None
    placing: bool = False
    suspect: bool = False
    reported: bool = False

    @property
    def deadline_s(self) -> float:
        return self.started_s + self.order.deadline_s


class Reads:
    """Reads under way and the reports of those that ended. Called by one thread; works on an I/O thread of its own."""

    def __init__(self, *, clock: Clock, poll_s: float) -> None:
        """Start no thread before there is something to read.

        Args:
            clock: Monotonic seconds.
            poll_s: Longest time the I/O thread waits for one read before it looks at the others.
        """
        self._clock, self._poll_s = clock, poll_s
        self._changed = threading.Condition()
        self._queued: list[_Read] = []
        self._started: list[_Read] = []
        self._ended: list[LoadReport] = []
        self._link = LinkClock()
        self._reaper = TicketReaper()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def under_way(self) -> bool:
        """Whether a read is under way that will still be reported."""
        return bool(self._queued or self._started)

    def start(
        self, restore_id: int, transfer: TransferPort[Ticket], orders: Sequence[ReadWork], *, origin_s: float
    ) -> None:
        """Hand reads to the I/O thread; their deadlines begin now.

        Args:
            restore_id: Whose reads they are.
            transfer: Where they come from; called on the I/O thread, ``cancel`` from any.
            orders: What to read, in order.
            origin_s: Clock time from which reports count.
        """
        if not orders:
            return
        now_s = self._clock()
        with self._changed:
            self._queued.extend(_Read(restore_id, order, transfer, origin_s, now_s) for order in orders)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cacheflow-io", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drop(self, restore_id: int, cells: Collection[tuple[int, int]] | None = None) -> None:
        """Give up reads of these cells, or of all; on return none of them is being placed or will be.

        Waits for a placement that has begun (a copy), never for a store.
        """
        with self._changed:
            concerned = [
                read
                for read in (*self._queued, *self._started)
                if read.restore_id == restore_id and (cells is None or (read.order.chunk, read.order.block) in cells)
            ]
            # First stop all that can be stopped: while this waits for a copy the I/O thread must not begin another.
            for read in concerned:
                if not read.placing:
                    self._give_up(read)
            self._changed.wait_for(lambda: not any(read.placing for read in concerned))

    def _give_up(self, read: _Read) -> None:
        if read.reported:
            return
        now_s = self._clock()
        if read.ticket is not None:
            self._link.end(read.started_s, now_s)
        self._report(read, LoadOutcome.CANCELLED, 0.0, now_s)
        if read in self._queued:
            self._queued.remove(read)

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to report, nothing is under way, or ``timeout_s`` seconds went by."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self.under_way, timeout=timeout_s)

    def take(self) -> tuple[LoadReport, ...]:
        """Reads that ended since the last call."""
        if not self._ended:
            return ()
        with self._changed:
            ended, self._ended = tuple(self._ended), []
        return ended

    def close(self) -> None:
        """End the I/O thread and give every read up; does not wait for a store that holds on to a buffer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._reaper.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.under_way)
                if self._closed:
                    break
                queued, self._queued = self._queued, []
                self._started.extend(queued)
            for read in queued:
                self._begin(read)
            self._await()
        for read in [*self._started, *self._queued]:
            self._free(read, None)

    def _begin(self, read: _Read) -> None:
        if read.reported:
            self._forget(read)
            return
        order = read.order
        try:
            ticket = _start(read.transfer, order)
        except Exception:
            logger.exception("transfer port raised on start of cell (%d, %d)", order.chunk, order.block)
            self._end(read, LoadOutcome.ERROR)
            return
        with self._changed:
            read.ticket, read.num_bytes = ticket, ticket.num_bytes

    def _await(self) -> None:
        """Give the oldest read some time to end, then look at all the others."""
        patient = True
        for read in list(self._started):
            if read.reported:
                self._free(read, None)
                continue
            left_s = max(0.0, read.deadline_s - self._clock())
            outcome = self._outcome(read, timeout_s=min(self._poll_s, left_s) if patient else 0.0)
            patient = False
            if outcome is None and self._clock() >= read.deadline_s:
                outcome = LoadOutcome.LATE
            if outcome is LoadOutcome.OK:
                self._place(read)
            elif outcome is not None:
                self._end(read, outcome)

    def _outcome(self, read: _Read, *, timeout_s: float) -> LoadOutcome | None:
        assert read.ticket is not None, "a read is awaited after it was started"
        try:
            return read.transfer.wait(read.ticket, timeout_s=timeout_s)
        except Exception:
            read.suspect = True
            logger.exception("transfer port raised on wait for cell (%d, %d)", read.order.chunk, read.order.block)
            return LoadOutcome.ERROR

    def _place(self, read: _Read) -> None:
        assert read.ticket is not None, "a read is placed after it was started"
        now_s = self._clock()
        with self._changed:
            if read.reported:
                wanted = False
            else:
                wanted = read.placing = True
        if not wanted:
            self._free(read, LoadOutcome.OK)
            return
        try:
            read.transfer.place(read.ticket)
            outcome = LoadOutcome.OK
        except Exception:
            read.suspect = True
            logger.exception("transfer port raised on place of cell (%d, %d)", read.order.chunk, read.order.block)
            outcome = LoadOutcome.ERROR
        if outcome is LoadOutcome.OK:
            read.ticket = None
        self._end(read, outcome, now_s=now_s)

    def _end(self, read: _Read, outcome: LoadOutcome, *, now_s: float | None = None) -> None:
        """Report how a read ended, then free its ticket; without a report when it was given up meanwhile."""
        now_s = self._clock() if now_s is None else now_s
        # A store that cancels on its own delivers nothing: to the scheduler CANCELLED is the answer to a drop.
        told = LoadOutcome.ERROR if outcome is LoadOutcome.CANCELLED else outcome
        with self._changed:
            read.placing = False
            if not read.reported:
                busy_s = self._link.end(read.started_s, now_s)
                self._report(read, told, busy_s, now_s)
        self._free(read, outcome)

    def _report(self, read: _Read, outcome: LoadOutcome, busy_s: float, end_s: float) -> None:
        read.reported = True
        self._ended.append(
            LoadReport(
                restore_id=read.restore_id,
                chunk=read.order.chunk,
                block=read.order.block,
                outcome=outcome,
                num_bytes=read.num_bytes,
                busy_s=busy_s,
                end_s=end_s - read.origin_s,
            )
        )
        self._changed.notify_all()

    def _free(self, read: _Read, outcome: LoadOutcome | None) -> None:
        """Hand a ticket back: at once when its store has let go of the buffer, through the reaper otherwise."""
        self._forget(read)
        if read.ticket is None:
            return
        if outcome in HELD or read.suspect:
            self._reaper.cancel(read.transfer, read.ticket)
        else:
            self._reaper.cancel_now(read.transfer, read.ticket)

    def _forget(self, read: _Read) -> None:
        with self._changed:
            if read in self._started:
                self._started.remove(read)
            self._changed.notify_all()


def _start(transfer: TransferPort[Ticket], order: ReadWork) -> Ticket:
    if not order.is_boundary:
        tile = Tile(order.chunk, order.chunk + 1, order.block, order.block + 1)
        return transfer.start(tile, deadline_s=order.deadline_s)
    if not isinstance(transfer, BoundaryPort):
        raise TypeError(f"{type(transfer).__name__} reads no boundary states, and was ordered those of {order.chunk}")
    return transfer.start_boundary(order.chunk, deadline_s=order.deadline_s)
