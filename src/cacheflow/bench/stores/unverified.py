"""A store whose reads verify nothing, which nobody may use but to measure what verification costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cacheflow.stores.base import Capabilities, GetRequest, PinOutcome, PutOutcome
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import best_algorithm
from cacheflow.stores.threaded import ThreadedStore, Usage
from cacheflow.types import LoadOutcome


class UnverifiedStore(ThreadedStore):
    """The records of another store, read as that reads them, on threads of its own, and taken as they come."""

    def __init__(self, backend: ThreadedStore) -> None:
        """Read from ``backend``, which stays the caller's to close."""
        super().__init__(num_threads=backend.capabilities().max_parallel_reads, algorithm=best_algorithm())
        self._backend = backend

    def _get(self, request: GetRequest, payload: memoryview, header: memoryview) -> LoadOutcome:
        found = self._backend.read_record(request.key, header, payload)
        return LoadOutcome.OK if found == payload.nbytes else LoadOutcome.MISS

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``."""
        return self._backend.capabilities()

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``."""
        return self._backend.read_record(key, header, payload)

    def write_record(self, key: ObjectKey, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``ThreadedStore.write_record``."""
        return self._backend.write_record(key, parts, replace=replace)

    def holds(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``ThreadedStore.holds``."""
        return self._backend.holds(keys)

    def remove(self, key: ObjectKey) -> bool:
        """See ``ThreadedStore.remove``."""
        return self._backend.remove(key)

    def usage(self) -> Usage:
        """See ``ThreadedStore.usage``."""
        return self._backend.usage()

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[PinOutcome, ...]:
        """See ``Store.pin``."""
        return self._backend.pin(keys, ttl_s=ttl_s)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """See ``Store.unpin``."""
        self._backend.unpin(keys)

    def claim(self, chain_hashes: Sequence[str], *, tenant: str) -> None:
        """See ``Store.claim``."""
        self._backend.claim(chain_hashes, tenant=tenant)

    def census(self) -> Mapping[str, int]:
        """See ``Store.census``."""
        return self._backend.census()
