"""Base of the stores that bound their own capacity: an LRU index under one lock, with pins, expiry and tenants."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from threading import Event, Lock, Thread
from typing import ClassVar, Required, TypedDict

from cacheflow.errors import ConfigError
from cacheflow.stores.base import Capabilities, PinOutcome
from cacheflow.stores.keys import ObjectKey, chain_hash_of, namespace_of
from cacheflow.stores.lru import LruIndex
from cacheflow.stores.record import HEADER_BYTES, ChecksumAlgorithm, best_algorithm
from cacheflow.stores.retention import DEFAULT_RETENTION, Retention
from cacheflow.stores.threaded import ThreadedStore, Usage
from cacheflow.threads import start_thread
from cacheflow.types import Clock

logger = logging.getLogger(__name__)

MAX_CLAIMS = 1 << 17
"""Chunks whose tenant is remembered until their objects are used; the objects held keep theirs beyond it."""

_SWEEPS_PER_TTL = 10
"""What expires goes at most this part of the ``ttl_s`` late."""


class Bounds(TypedDict, total=False):
    """What every bounded store is opened with, by keyword; all but the capacity may be left out.

    Attributes:
        capacity_bytes: Bound on the records held, headers (4,096 bytes each) included.
        num_threads: Reads and writes carried out at the same time; ``BoundedStore.default_threads`` unless given.
        retention: What goes first, and what goes by itself.
        clock: Monotonic clock, for deadlines, pins, expiry and statistics.
    """

    capacity_bytes: Required[int]
    num_threads: int
    retention: Retention
    clock: Clock


class BoundedStore(ThreadedStore):
    """A threaded store that evicts its least recently used objects; subclasses hold ``_lock`` to use ``_index``.

    Where the retention has a ``ttl_s``, a daemon thread, started with the first read or write, calls ``sweep``.

    Attributes:
        name: See ``Capabilities``, as of the next two.
        persistent: Objects survive the process.
        shared: Other processes may see and change the same objects.
        default_threads: ``num_threads`` where it is not given.
    """

    name: ClassVar[str]
    persistent: ClassVar[bool]
    shared: ClassVar[bool]
    default_threads: ClassVar[int] = 1

    def __init__(
        self,
        *,
        capacity_bytes: int,
        num_threads: int | None = None,
        algorithm: ChecksumAlgorithm | None = None,
        retention: Retention = DEFAULT_RETENTION,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Prepare an empty index and the pool; see ``Bounds``.

        ``algorithm`` is the checksum of the records written, None for the fastest this process has.

        Raises:
            ConfigError: A count is below 1.
        """
        super().__init__(
            num_threads=self.default_threads if num_threads is None else num_threads,
            algorithm=algorithm or best_algorithm(),
            clock=clock,
        )
        self._retention = retention
        self._index = LruIndex(capacity_bytes, retention=retention)
        self._lock = Lock()
        self._tenants: OrderedDict[str, str] = OrderedDict()  # by chain hash
        self._sweeper: Thread | None = None
        self._stopped = Event()

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``; the capacity is the bound that the medium allows at the moment."""
        return Capabilities(
            name=self.name,
            persistent=self.persistent,
            shared=self.shared,
            capacity_bytes=self._index.capacity_bytes,
            max_parallel_reads=self._num_threads,
        )

    @abstractmethod
    def sweep(self) -> int:
        """Remove what has expired; returns how many objects that were."""

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[PinOutcome, ...]:
        """See ``Store.pin``.

        Raises:
            ConfigError: ``ttl_s`` is not above 0, or not finite.
        """
        if not 0 < ttl_s < float("inf"):
            raise ConfigError(f"pin ttl_s is {ttl_s}, must be above 0 and finite")
        now_s = self._clock()
        with self._lock:
            return tuple(self._index.pin(key.name, until_s=now_s + ttl_s, now_s=now_s) for key in keys)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """See ``Store.unpin``."""
        with self._lock:
            for key in keys:
                self._index.unpin(key.name)

    def claim(self, chain_hashes: Sequence[str], *, tenant: str) -> None:
        """See ``Store.claim``."""
        if self._retention.tenant_quota is None:
            return
        with self._lock:
            for chain_hash in chain_hashes:
                self._tenants[chain_hash] = tenant
                self._tenants.move_to_end(chain_hash)
            while len(self._tenants) > MAX_CLAIMS:
                self._tenants.popitem(last=False)

    def tenant_of(self, name: str) -> str | None:
        """Whom an object is counted for by ``claim``; call with the lock held."""
        return self._tenants.get(chain_hash_of(name)) if self._tenants else None

    def stored_bytes(self, payloads: Sequence[tuple[ObjectKey, int]]) -> tuple[int, ...]:
        """See ``Store.stored_bytes``; what a scan found may count with a little more than its bytes."""
        with self._lock:
            found = [self._index.size_of(key.name) for key, _ in payloads]
        return tuple(
            num_bytes if size is None else min(num_bytes, max(1, size - HEADER_BYTES))
            for (_, num_bytes), size in zip(payloads, found, strict=True)
        )

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
                pinned_bytes=self._index.pinned_bytes,
            )

    def close(self) -> None:
        """See ``Store.close``."""
        self._stopped.set()
        super().close()

    def _threads_to_join(self) -> list[Thread]:
        return [*super()._threads_to_join(), *([] if self._sweeper is None else [self._sweeper])]

    def _start_threads(self) -> None:
        super()._start_threads()
        if self._retention.ttl_s is not None and self._sweeper is None:
            self._sweeper = start_thread(self._keep_sweeping, name="cacheflow-expiry")

    def _keep_sweeping(self) -> None:
        assert self._retention.ttl_s is not None, "without a time to live nothing expires"
        while not self._stopped.wait(self._retention.ttl_s / _SWEEPS_PER_TTL):
            try:
                self.sweep()
            except Exception:  # a bug in a backend must not end it
                logger.exception("%s: what has expired could not be removed", self)
