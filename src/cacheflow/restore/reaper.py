"""Frees tickets whose store may still write into their buffer, where nobody has to wait for it."""

from __future__ import annotations

import logging
import queue
import threading

from cacheflow.restore.ports import Ticket, TransferPort

logger = logging.getLogger(__name__)

MAX_THREADS = 4
"""A store that hangs in one read need not hang in the next: so many may hang before tickets queue up."""

_Work = tuple[TransferPort[Ticket], Ticket] | None


class TicketReaper:
    """Cancels tickets on daemon threads that are started when needed; calls no other method of a port."""

    def __init__(self) -> None:
        """Start no thread before there is something to cancel."""
        self._queue: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = self._num_busy = 0

    def cancel(self, transfer: TransferPort[Ticket], ticket: Ticket) -> None:
        """Cancel a ticket on another thread; returns at once."""
        with self._lock:
            self._num_busy += 1
            if self._num_busy > self._num_threads < MAX_THREADS:
                self._num_threads += 1
                threading.Thread(target=self._run, name="cacheflow-reaper", daemon=True).start()
        self._queue.put((transfer, ticket))

    @staticmethod
    def cancel_now(transfer: TransferPort[Ticket], ticket: Ticket) -> None:
        """Cancel a ticket whose store has let go of the buffer, on this thread; a port that raises is logged."""
        try:
            transfer.cancel(ticket)
        except Exception:
            logger.exception("transfer port raised on cancel")

    def close(self) -> None:
        """Let every thread end once it has nothing left to cancel; does not wait for it."""
        with self._lock:
            for _ in range(self._num_threads):
                self._queue.put(None)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            self.cancel_now(*work)
            with self._lock:
                self._num_busy -= 1
