"""Objects in the process's own memory, as whole records: damage to them is noticed like on any other store.

A device is lent them where they lie, in page-locked slabs. Nobody else can reach this memory, so such a record is
verified once it was written and then, unless told otherwise, at one read in sixteen: a checksum at each would hold up
the device's copy. Once one has found damage, every read is verified.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Unpack

from cacheflow.errors import ConfigError
from cacheflow.stores.base import PutOutcome, byte_view
from cacheflow.stores.bounded import BoundedStore, Bounds
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import DeviceReader, LentRecord, wait_until_passed
from cacheflow.stores.record import HEADER_BYTES, verify
from cacheflow.stores.slabs import Allocation, OrdinaryMemory, RecordMemory, SlabMemory
from cacheflow.stores.staging import copy_record, gather
from cacheflow.types import Bytes, LoadOutcome, Passing

logger = logging.getLogger(__name__)

VERIFIED_SHARE = 1 / 16
"""Of the reads that are lent a record, those that verify it."""
_MAX_TRIES = 4
"""Times that memory for one record is asked for; what was evicted for it may be taken by others."""


class _Record:
    """A record's memory and who reads it, guarded by the store's lock; it goes back when the last one has."""

    __slots__ = ("allocation", "copies", "is_dropped", "memory", "num_readers")

    def __init__(self, allocation: Allocation, memory: RecordMemory) -> None:
        self.allocation, self.memory = allocation, memory
        self.num_readers = 0
        self.copies: list[Passing] = []
        self.is_dropped = False

    @property
    def bytes(self) -> Bytes:
        return self.allocation.bytes

    def drop(self) -> None:
        self.is_dropped = True
        self.give_if_unused()

    def give_if_unused(self) -> None:
        if self.is_dropped and not self.num_readers:
            self.memory.give(self.allocation, self.copies)


class MemoryStore(BoundedStore):
    """A bounded store in host memory; objects die with the process.

    A read copies once, outside the lock and without the GIL; an object evicted meanwhile is read to its end. Where the
    process gets no memory for a record though the capacity would allow it, objects are evicted until it does.
    """

    name, persistent, shared = "memory", False, False
    default_threads = 2

    def __init__(self, *, verified_share: float = VERIFIED_SHARE, **bounds: Unpack[Bounds]) -> None:
        """Open an empty store.

        Args:
            verified_share: Of the reads that are lent a record, those that verify it, drawn at random; with less than
                all of them each record is verified when it was written too. A read that is copied is always verified.
            **bounds: See ``Bounds``.

        Raises:
            ConfigError: A count is below 1, or the share is outside [0, 1].
        """
        if not 0 <= verified_share <= 1:
            raise ConfigError(f"memory store: verified_share is {verified_share}, must be from 0 to 1")
        super().__init__(**bounds)
        self._records: dict[str, _Record] = {}
        self._memory: RecordMemory = OrdinaryMemory()
        self._verified_share, self._random = verified_share, random.Random()
        logger.info("memory store: capacity %d bytes", self._index.capacity_bytes)

    def lend_to(self, reader: DeviceReader) -> None:
        """See ``Store.lend_to``; what is held already is copied as before.

        Without page-locked memory everything is.
        """
        if self._memory.is_lendable:
            return
        capacity_bytes = self._index.capacity_bytes
        try:
            self._memory = SlabMemory(reader.new_memory, capacity_bytes=capacity_bytes)
        except MemoryError:
            logger.warning(
                "memory store: no page-locked memory, so that reads are copied before the device copies them"
            )
            return
        logger.info(
            "memory store: page-locked memory as it is needed; %.3g of the reads by the device verify their record",
            self._verified_share,
        )

    def lend_record(self, key: ObjectKey, num_bytes: int) -> LentRecord | None:
        """See ``ThreadedStore.lend_record``."""
        record = self._begin_reading(key, lendable_bytes=num_bytes)
        if record is None:
            return None
        return LentRecord(
            header=record.bytes[:HEADER_BYTES],
            payload=record.bytes[HEADER_BYTES:],
            is_sound=not self._num_damaged and self._random.random() >= self._verified_share,
            end=partial(self._end_reading, record),
        )

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``."""
        record = self._begin_reading(key)
        if record is None:
            return None
        try:
            return copy_record(record.bytes, header, payload)
        finally:
            self._end_reading(record, None)

    def _begin_reading(self, key: ObjectKey, *, lendable_bytes: int | None = None) -> _Record | None:
        """A record, kept until ``_end_reading``; with a payload's length given, only one of it that can be lent."""
        with self._lock:
            record = self._records.get(key.name)
            if record is None:
                return None
            if lendable_bytes is not None and not (
                record.memory.is_lendable and record.bytes.nbytes == HEADER_BYTES + lendable_bytes
            ):
                return None
            self._index.touch(key.name, now_s=self._clock(), tenant=self.tenant_of(key.name))
            record.num_readers += 1
            return record

    def _end_reading(self, record: _Record, after: Passing | None) -> None:
        # Asked without the lock: a device may take its time to answer.
        passed = [] if after is None else [copy for copy in record.copies if copy.done()]
        with self._lock:
            if after is not None:
                record.copies = [*(copy for copy in record.copies if copy not in passed), after]
            record.num_readers -= 1
            record.give_if_unused()

    def write_record(self, key: ObjectKey, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``ThreadedStore.write_record``.

        Raises:
            OSError: What was written is not what was to be.
        """
        num_bytes = sum(part.nbytes for part in parts)
        with self._lock:
            tenant = self.tenant_of(key.name)
            victims = self._index.reserve(num_bytes, now_s=self._clock(), tenant=tenant)
            self._drop(victims or ())
        if victims is None:
            return PutOutcome.FULL
        record = self._new_record(num_bytes, tenant)
        if record is None:
            with self._lock:
                self._index.release(num_bytes)
            return PutOutcome.FULL
        gather(parts, record.bytes)
        damaged = self._is_damaged(record, key)
        with self._lock:
            exists = key.name in self._index and not replace  # another thread was faster
            if damaged or exists:
                self._index.release(num_bytes)
                record.drop()
            else:
                self._drop([key.name])
                self._index.commit(key.name, num_bytes, now_s=self._clock(), tenant=tenant)
                self._records[key.name] = record
        if damaged:
            raise OSError(f"memory store: the record of {key.name} is damaged right after it was written")
        return PutOutcome.EXISTS if exists else PutOutcome.STORED

    def _is_damaged(self, record: _Record, key: ObjectKey) -> bool:
        """Whether a new record that will be lent unverified is not what it should be."""
        if not record.memory.is_lendable or self._verified_share == 1:
            return False
        whole = byte_view(record.bytes)
        return verify(whole[:HEADER_BYTES], whole[HEADER_BYTES:], key) is not LoadOutcome.OK

    def _drop(self, names: Iterable[str]) -> None:
        """Let records go that the index no longer has; the lock is held."""
        for name in names:
            if (record := self._records.pop(name, None)) is not None:
                record.drop()

    def holds(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``ThreadedStore.holds``."""
        return tuple(key.name in self._records for key in keys)

    def remove(self, key: ObjectKey) -> bool:
        """See ``ThreadedStore.remove``."""
        with self._lock:
            found = key.name in self._records
            self._index.discard(key.name)
            self._drop([key.name])
            return found

    def sweep(self) -> int:
        """See ``BoundedStore.sweep``."""
        with self._lock:
            expired = self._index.expire(now_s=self._clock())
            self._drop(expired)
        return len(expired)

    def close(self) -> None:
        """See ``Store.close``; returns once no device copies from its records, with a warning after 5 s."""
        super().close()
        with self._lock:
            copies = [*self._memory.copies, *(copy for record in self._records.values() for copy in record.copies)]
        if not wait_until_passed(copies):
            logger.warning("memory store: it was closed while a device still copied from it")

    def _new_record(self, num_bytes: int, tenant: str | None) -> _Record | None:
        """Memory for a record, None when too little can be evicted for it."""
        memory = self._memory
        for _ in range(_MAX_TRIES):
            try:
                return _Record(memory.take(num_bytes), memory)
            except MemoryError:
                with self._lock:
                    victims = self._index.evict(num_bytes, now_s=self._clock(), tenant=tenant)
                    self._drop(victims or ())
                if victims is None:
                    break
        return None
