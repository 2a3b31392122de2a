"""Reads under way: one I/O thread starts, awaits and places them, for every restoration of an engine or a worker.

Two things must never wait for a store: the thread that computes, and the reads of another restoration. So nothing here
waits for a store to let go of a staging buffer except a ``TicketReaper``, on threads of its own.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Container
from typing import Generic, Protocol, TypeVar

from cacheflow.plan.grid import Piece
from cacheflow.plan.read_window import Flight, ReadMeter, ReadSample
from cacheflow.restore.ports import Ticket, TransferPort
from cacheflow.restore.reaper import TicketReaper
from cacheflow.types import Clock, LoadOutcome

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Ticket)

HELD = (None, LoadOutcome.LATE, LoadOutcome.CANCELLED)
"""Outcomes after which a store may still write into the staging buffer."""


class ReadOwner(Protocol[T]):
    """The restoration that a read belongs to. All but ``transfer`` is called with the lock held, on the I/O thread.

    Of each read exactly one of ``fail_read``, ``drop_read`` and ``end_place`` is called, or none when ``begin_place``
    has said no.
    """

    @property
    def transfer(self) -> TransferPort[T]:
        """Where its reads come from."""
        ...

    def begin_place(self, read: Read[T]) -> bool:
        """Whether to place a read whose bytes have verified; see ``Read.busy_s`` and ``Read.end_s``."""
        ...

    def end_place(self, read: Read[T], *, now_s: float, failed: bool) -> None:
        """Note that a read was placed, or could not be."""
        ...

    def fail_read(self, read: Read[T], outcome: LoadOutcome) -> None:
        """Note that a read gave nothing usable; ``outcome`` is neither ``OK`` nor ``CANCELLED``."""
        ...

    def drop_read(self, read: Read[T]) -> None:
        """Note that a read was given up by ``Reads.drop``, on the thread that called it; see ``Read.busy_s``."""
        ...


class ReadSource(Protocol[T]):
    """Where the I/O thread gets its reads from. Every method is called with ``changed`` held."""

    @property
    def changed(self) -> threading.Condition:
        """Guards the source and every owner of its reads; notified whenever one of them changed."""
        ...

    @property
    def idle_s(self) -> float | None:
        """Longest sleep of the I/O thread while nothing is under way; None until ``changed`` is notified."""
        ...

    def next_read(self, num_reads: int, num_bytes: int) -> Read[T] | None:
        """The next read to start; None when the link should wait.

        Args:
            num_reads: Reads under way.
            num_bytes: What they move.
        """
        ...

    def close_link(self) -> None:
        """Ask for no more reads: the I/O thread has failed."""
        ...


class Read(Generic[T]):
    """One read, from the claim to its end; guarded by the source's lock.

    Attributes:
        owner: The restoration it belongs to.
        piece: What it brings.
        claimed_at_s: When it was claimed, on the clock of ``Reads``; its deadline counts from then.
        allowed_s: Seconds after which it is late.
        num_bytes: Bytes it moves; 0 before it was started.
        busy_s: Seconds the link worked on it, waiting in line excluded; 0 before it ended.
        end_s: When it ended.
        tier: Number of the store it comes from; None of boundary states.
        sample: What it told of that store; None where it told nothing, and before it ended.
    """

    __slots__ = (
        "allowed_s", "busy_s", "claimed_at_s", "dropped", "end_s", "ended", "flight", "num_bytes", "owner", "piece",
        "placing", "sample", "suspect", "ticket", "tier",
    )  # fmt: skip

    def __init__(
        self, owner: ReadOwner[T], piece: Piece, *, claimed_at_s: float, allowed_s: float, tier: int | None = 0
    ) -> None:
        """Claimed, not started yet."""
        self.owner, self.piece = owner, piece
        self.claimed_at_s, self.allowed_s = claimed_at_s, allowed_s
        self.num_bytes, self.tier = 0, tier
        self.flight: Flight | None = None
        self.sample: ReadSample | None = None
        self.busy_s, self.end_s = 0.0, claimed_at_s
        self.ticket: T | None = None
        self.placing = False
        self.dropped = False
        self.ended = False
        """Its owner was told; it is still under way until its ticket was handed back."""
        self.suspect = False
        """Its port raised, so nobody knows whether the store has let go of its buffer."""


class Reads(Generic[T]):
    """The I/O thread and its reads; ``wake``, ``drop`` and ``close`` are called on any thread.

    A transfer port that raises costs that read, not the others.
    """

    def __init__(self, source: ReadSource[T], *, clock: Clock, poll_s: float) -> None:
        """Start no thread before ``wake``.

        Args:
            source: What is read.
            clock: Monotonic seconds.
            poll_s: Longest time the I/O thread waits for one read before it looks at the others.
        """
        self._source, self._clock, self._poll_s = source, clock, poll_s
        self._changed = source.changed
        self._reads: list[Read[T]] = []
        self._link_free_s = float("-inf")
        self._meters: defaultdict[int | None, ReadMeter] = defaultdict(ReadMeter)
        self._reaper = TicketReaper()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def under_way(self) -> bool:
        """Whether a read is under way."""
        return bool(self._reads)

    def wake(self) -> None:
        """Have the I/O thread ask its source for reads."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="cacheflow-io", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drop(self, owner: ReadOwner[T], pieces: Container[Piece] | None = None) -> None:
        """Give up an owner's reads of these pieces, or all; on return none of them is being placed or will be.

        Waits for a placement that has begun (a copy), never for a store.
        """
        with self._changed:
            concerned = [r for r in self._reads if r.owner is owner and (pieces is None or r.piece in pieces)]
            if not concerned:
                return
            # First stop all that can be stopped: while this waits for a copy the I/O thread must not begin another.
            for read in concerned:
                if not (read.placing or read.ended):
                    read.dropped = True
                    self._end(read)
                    owner.drop_read(read)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(read.placing for read in concerned))

    def close(self, *, wait: bool) -> None:
        """End the I/O thread and give every read up; owners are not notified.

        Args:
            wait: Give stores ``reaper.CLOSE_S`` to let go of the staging buffers. A store that hangs for longer keeps
                those; they are staging buffers of its reads alone.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._reaper.close(wait=wait)

    def _run(self) -> None:
        try:
            while self._start_reads():
                self._poll()
        except Exception:
            logger.exception("the I/O thread failed; nothing is read any more, compute restores the rest")
            with self._changed:
                self._closed = True
                for read in self._reads:
                    if read.placing or not read.ended:
                        read.owner.fail_read(read, LoadOutcome.ERROR)
                self._source.close_link()
                self._changed.notify_all()
        finally:
            for read in list(self._reads):
                self._free(read, None)

    def _start_reads(self) -> bool:
        """Start all that the source asks for, and wait for it while nothing is under way; False once closed."""
        while True:
            with self._changed:
                read = None
                while not self._closed and read is None:
                    read = self._source.next_read(len(self._reads), sum(each.num_bytes for each in self._reads))
                    if read is None:
                        if self._reads:
                            return True
                        self._changed.wait(self._source.idle_s)
                if read is None:
                    return False
                self._reads.append(read)
                read.flight = self._meters[read.tier].begin(self._clock())
            self._start(read)

    def _start(self, read: Read[T]) -> None:
        if read.dropped:
            self._forget(read)
            return
        try:
            ticket = read.owner.transfer.start(read.piece, deadline_s=read.allowed_s)
        except Exception:
            logger.exception("transfer port raised on start of %s", read.piece)
            self._fail(read, LoadOutcome.ERROR)
            return
        with self._changed:
            read.ticket, read.num_bytes = ticket, ticket.num_bytes

    def _poll(self) -> None:
        """Give the oldest read some time to end, then look at all the others."""
        patient = True
        for read in list(self._reads):
            if read.dropped:
                self._free(read, None)
                continue
            late_at_s = read.claimed_at_s + read.allowed_s
            left_s = max(0.0, late_at_s - self._clock())
            outcome = self._outcome(read, timeout_s=min(self._poll_s, left_s) if patient else 0.0)
            patient = False
            if outcome is None and self._clock() >= late_at_s:
                outcome = LoadOutcome.LATE
            if outcome is LoadOutcome.OK:
                self._place(read)
            elif outcome is not None:
                self._fail(read, outcome)

    def _outcome(self, read: Read[T], *, timeout_s: float) -> LoadOutcome | None:
        assert read.ticket is not None, "a read is awaited after it was started"
        try:
            return read.owner.transfer.wait(read.ticket, timeout_s=timeout_s)
        except Exception:
            read.suspect = True
            logger.exception("transfer port raised on wait for %s", read.piece)
            return LoadOutcome.ERROR

    def _place(self, read: Read[T]) -> None:
        assert read.ticket is not None, "a read is placed after it was started"
        with self._changed:
            if not read.dropped:
                self._end(read, brought=True)
                read.placing = read.owner.begin_place(read)
                self._changed.notify_all()
        if not read.placing:
            self._free(read, LoadOutcome.OK)
            return
        failed = False
        try:
            read.owner.transfer.place(read.ticket)
            read.ticket = None
        except Exception:
            failed = read.suspect = True
            logger.exception("transfer port raised on place of %s", read.piece)
        with self._changed:
            read.placing = False
            read.owner.end_place(read, now_s=self._clock(), failed=failed)
            self._changed.notify_all()
        self._free(read, LoadOutcome.OK)

    def _fail(self, read: Read[T], outcome: LoadOutcome) -> None:
        with self._changed:
            if not read.dropped:
                self._end(read)
                # A store that cancels on its own delivers nothing: CANCELLED is the answer to a drop.
                ended = LoadOutcome.ERROR if outcome is LoadOutcome.CANCELLED else outcome
                read.owner.fail_read(read, ended)
                self._changed.notify_all()
        self._free(read, outcome)

    def _end(self, read: Read[T], *, brought: bool = False) -> None:
        """Note when a read ended; its own time on the link began when it started and the one before it had ended."""
        read.ended, read.end_s = True, self._clock()
        if read.flight is not None:
            read.sample = self._meters[read.tier].end(read.flight, read.end_s, brought=brought)
        if read.ticket is not None or not read.dropped:
            read.busy_s = max(0.0, read.end_s - max(read.claimed_at_s, self._link_free_s))
            self._link_free_s = max(self._link_free_s, read.end_s)

    def _free(self, read: Read[T], outcome: LoadOutcome | None) -> None:
        """Hand a ticket back: at once when its store has let go of the buffer, through the reaper otherwise."""
        self._forget(read)
        if read.ticket is None:
            return
        if outcome in HELD or read.suspect:
            self._reaper.cancel(read.owner.transfer, read.ticket)
        else:
            self._reaper.cancel_now(read.owner.transfer, read.ticket)

    def _forget(self, read: Read[T]) -> None:
        with self._changed:
            self._reads.remove(read)
            if not self._reads:
                self._changed.notify_all()  # somebody may wait until nothing is under way
