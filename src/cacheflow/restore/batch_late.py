"""Frees reads that their store may still be busy with, on a thread where nobody has to wait for it."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Generic, TypeVar

from cacheflow.restore.ports import Ticket, TransferPort

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Ticket)


class LateReads(Generic[T]):
    """Cancels tickets one after the other; the thread is started with the first."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._queue: queue.SimpleQueue[tuple[TransferPort[T], T] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def free(self, transfer: TransferPort[T], ticket: T) -> None:
        """Cancel a ticket soon; returns at once. Called on one thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cacheflow-late", daemon=True)
            self._thread.start()
        self._queue.put((transfer, ticket))

    def close(self) -> None:
        """Return once every ticket is freed and the thread has ended."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            transfer, ticket = work
            try:
                transfer.cancel(ticket)
            except Exception:
                logger.exception("transfer port raised on cancel")
