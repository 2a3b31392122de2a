"""Frees tickets whose store may still write into their buffer, where nobody has to wait for it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

from cacheflow.restore.ports import TransferPort
from cacheflow.threads import start_thread

logger = logging.getLogger(__name__)

CLOSE_S = 2.0
"""A store that hangs is waited for so long at the end, then it keeps the buffers of its reads until it lets go."""
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
        """Let every thread end once it has nothing left to cancel; ``wait`` for that, for ``CLOSE_S`` at most.

        A thread that is left hands its ticket back when the store has let go of the buffer: nobody else has it before.
        """
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        if not wait:
            return
        until_s = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        if num_left := sum(thread.is_alive() for thread in threads):
            logger.warning(
                "a store has not let go of the buffers of reads that were given up %g s ago: %d threads wait for it, "
                "and nothing else does",
                CLOSE_S,
                num_left,
            )

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            self.cancel_now(*work)
            with self._lock:
                self._num_busy -= 1
