"""Asks a store what it holds, for no longer than whoever asks will wait: a store that hangs has no answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError
from functools import partial

from cacheflow.errors import RestoreCancelled
from cacheflow.stores.asker import Asker
from cacheflow.stores.base import Store
from cacheflow.stores.keys import ObjectKey

NUM_THREADS = 2
CANCEL_POLL_S = 0.02
"""Longest time between two looks at a ``cancel``."""


class StoreLookup:
    """Asks one store, of which a question may be more than a look at this process's memory. Thread-safe."""

    def __init__(self, store: Store) -> None:
        """Start no thread before the first question, and none for a store that no other process shares."""
        self._store = store
        self._asker = Asker("cacheflow-lookup", num_threads=NUM_THREADS) if store.capabilities().shared else None

    def contains(
        self, keys: Sequence[ObjectKey], *, until_s: float, cancel: threading.Event | None = None
    ) -> tuple[bool, ...] | None:
        """Whether each object is there; None where that is not known at ``until_s`` (``time.perf_counter``).

        Raises:
            RestoreCancelled: ``cancel`` was set while the store was waited for.
        """
        if self._asker is None:
            return self._store.contains(keys)
        future = self._asker.ask(partial(self._store.contains, keys), (False,) * len(keys))
        try:
            while True:
                left_s = max(0.0, until_s - time.perf_counter())
                try:
                    return future.result(left_s if cancel is None else min(left_s, CANCEL_POLL_S))
                except TimeoutError:
                    if cancel is not None and cancel.is_set():
                        raise RestoreCancelled("cancelled while the store was asked what it holds") from None
                    if time.perf_counter() >= until_s:
                        return None
        finally:
            future.cancel()  # a store that hangs now is not to be asked all that once it answers again

    def close(self) -> None:
        """End the threads without waiting for one that hangs."""
        if self._asker is not None:
            self._asker.close()
