"""Frees tickets whose store may still write into their buffer, where nobody has to wait for it."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

from cacheflow.restore.ports import TransferPort
from cacheflow.threads import start_thread

logger = logging.getLogger(__name__)

MAX_THREADS = 4
"""A store that hangs in one read need not hang in the next: so many may hang before tickets queue up."""


class TicketReaper:
    """Cancels tickets on daemon threads that are started when needed; calls no other method of a port."""

    def __init__(self) -> None:
        """Start no thread before there is something to cancel."""
        self._queue: queue.SimpleQueue[tuple[TransferPort[Any], Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._num_busy = 0

    def cancel(self, transfer: TransferPort[Any], ticket: Any) -> None:  # noqa: ANN401 -- a ticket of that port
        """Cancel a ticket on another thread; returns at once."""
        with self._lock:
            self._num_busy += 1
            if self._num_busy > len(self._threads) < MAX_THREADS:
                thread = start_thread(self._run, name="cacheflow-reaper")
                if thread is not None:
                    self._threads.append(thread)
        self._queue.put((transfer, ticket))

    @staticmethod
    def cancel_now(transfer: TransferPort[Any], ticket: Any) -> None:  # noqa: ANN401 -- a ticket of that port
        """Cancel a ticket whose store has let go of the buffer, on this thread; a port that raises is logged."""
        try:
            transfer.cancel(ticket)
        except Exception:
            logger.exception("transfer port raised on cancel")

    def close(self, *, wait: bool) -> None:
        """Let every thread end once it has nothing left to cancel; ``wait`` for that."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        for thread in threads if wait else ():
            thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            self.cancel_now(*work)
            with self._lock:
                self._num_busy -= 1
