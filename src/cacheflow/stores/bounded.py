"""Base of the stores that bound their own capacity: an LRU index under one lock, with pins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Lock

from cacheflow.errors import ConfigError
from cacheflow.stores.keys import ObjectKey, namespace_of
from cacheflow.stores.lru import LruIndex
from cacheflow.stores.record import ChecksumAlgorithm
from cacheflow.stores.threaded import ThreadedStore, Usage
from cacheflow.types import Clock


class BoundedStore(ThreadedStore):
    """A threaded store that evicts its least recently used objects; subclasses hold ``_lock`` to use ``_index``."""

    def __init__(
        self,
        *,
        capacity_bytes: int,
        num_threads: int,
        algorithm: ChecksumAlgorithm,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Prepare an empty index and the pool.

        Args:
            capacity_bytes: Bound on the records held, headers (4,096 bytes each) included.
            num_threads: Reads and writes carried out at the same time.
            algorithm: Checksum of the records written.
            clock: Monotonic clock, for deadlines, pins and statistics.

        Raises:
            ConfigError: A count is below 1.
        """
        super().__init__(num_threads=num_threads, algorithm=algorithm, clock=clock)
        self._index = LruIndex(capacity_bytes)
        self._lock = Lock()

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[bool, ...]:
        """See ``Store.pin``.

        Raises:
            ConfigError: ``ttl_s`` is not above 0.
        """
        if not ttl_s > 0:
            raise ConfigError(f"pin ttl_s is {ttl_s}, must be above 0")
        until_s = self._clock() + ttl_s
        with self._lock:
            return tuple(self._index.pin(key.name, until_s=until_s) for key in keys)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """See ``Store.unpin``."""
        with self._lock:
            for key in keys:
                self._index.unpin(key.name)

    def census(self) -> Mapping[str, int]:
        """See ``Store.census``."""
        with self._lock:
            names = tuple(self._index.sizes())
        return Counter(namespace for name in names if (namespace := namespace_of(name)) is not None)

    def usage(self) -> Usage:
        """See ``ThreadedStore.usage``."""
        with self._lock:
            return Usage(
                num_objects=len(self._index),
                used_bytes=self._index.used_bytes,
                num_evicted=self._index.num_evicted,
            )
