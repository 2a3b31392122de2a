"""Objects in the process's own memory, as whole records: damage to them is noticed like on any other store."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cacheflow.stores.base import Capabilities, PutOutcome
from cacheflow.stores.bounded import BoundedStore
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import HEADER_BYTES, ChecksumAlgorithm, best_algorithm
from cacheflow.stores.retention import DEFAULT_RETENTION, Retention
from cacheflow.types import Clock

logger = logging.getLogger(__name__)

_MAX_TRIES = 4
"""Times that memory for one record is asked for; what was evicted for it may be taken by others."""


class MemoryStore(BoundedStore):
    """A bounded store in host memory; objects die with the process.

    A read copies once, outside the lock and without the GIL; an object evicted meanwhile is read to its end. Where the
    process gets no memory for a record though the capacity would allow it, objects are evicted until it does.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        num_threads: int = 2,
        algorithm: ChecksumAlgorithm | None = None,
        retention: Retention = DEFAULT_RETENTION,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Open an empty store.

        Args:
            capacity_bytes: Bound on the records held, headers (4,096 bytes each) included.
            num_threads: Copies carried out at the same time.
            algorithm: Checksum of the records; None for the fastest this process has.
            retention: What goes first, and what goes by itself.
            clock: Monotonic clock, for deadlines, pins, expiry and statistics.

        Raises:
            ConfigError: A count is below 1.
        """
        super().__init__(
            capacity_bytes=capacity_bytes,
            num_threads=num_threads,
            algorithm=algorithm or best_algorithm(),
            retention=retention,
            clock=clock,
        )
        self._records: dict[str, npt.NDArray[np.uint8]] = {}
        logger.info("memory store: capacity %d bytes", capacity_bytes)

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``."""
        return Capabilities(
            name="memory",
            persistent=False,
            shared=False,
            capacity_bytes=self._index.capacity_bytes,
            max_parallel_reads=self._num_threads,
        )

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``."""
        with self._lock:
            record = self._records.get(key.name)
            self._index.touch(key.name, now_s=self._clock(), tenant=self.tenant_of(key.name))
        if record is None:
            return None
        np.copyto(np.frombuffer(header, np.uint8), record[:HEADER_BYTES])
        num_found = record.nbytes - HEADER_BYTES
        if num_found == payload.nbytes:
            np.copyto(np.frombuffer(payload, np.uint8), record[HEADER_BYTES:])
        return num_found

    def write_record(self, key: ObjectKey, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``ThreadedStore.write_record``."""
        num_bytes = sum(part.nbytes for part in parts)
        with self._lock:
            tenant = self.tenant_of(key.name)
            victims = self._index.reserve(num_bytes, now_s=self._clock(), tenant=tenant)
            for name in victims or ():
                del self._records[name]
        if victims is None:
            return PutOutcome.FULL
        record = self._new_record(num_bytes, tenant)
        if record is None:
            with self._lock:
                self._index.release(num_bytes)
            return PutOutcome.FULL
        _fill(record, parts)
        with self._lock:
            if key.name in self._index and not replace:  # another thread was faster
                self._index.release(num_bytes)
                return PutOutcome.EXISTS
            self._index.commit(key.name, num_bytes, now_s=self._clock(), tenant=tenant)
            self._records[key.name] = record
        return PutOutcome.STORED

    def holds(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``ThreadedStore.holds``."""
        return tuple(key.name in self._records for key in keys)

    def remove(self, key: ObjectKey) -> bool:
        """See ``ThreadedStore.remove``."""
        with self._lock:
            self._index.discard(key.name)
            return self._records.pop(key.name, None) is not None

    def sweep(self) -> int:
        """See ``BoundedStore.sweep``."""
        with self._lock:
            expired = self._index.expire(now_s=self._clock())
            for name in expired:
                del self._records[name]
        return len(expired)

    def _new_record(self, num_bytes: int, tenant: str | None) -> npt.NDArray[np.uint8] | None:
        """Memory for a record, None when too little can be evicted for it."""
        for _ in range(_MAX_TRIES):
            try:
                return np.empty(num_bytes, np.uint8)
            except MemoryError:
                with self._lock:
                    victims = self._index.evict(num_bytes, now_s=self._clock(), tenant=tenant)
                    for name in victims or ():
                        del self._records[name]
                if victims is None:
                    break
        return None


def _fill(record: npt.NDArray[np.uint8], parts: Sequence[memoryview]) -> None:
    start = 0
    for part in parts:
        np.copyto(record[start : start + part.nbytes], np.frombuffer(part, np.uint8))
        start += part.nbytes
