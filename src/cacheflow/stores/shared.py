"""Base of bounded stores whose medium other processes write and evict too: a directory, a server, a bucket."""

from __future__ import annotations

import errno
import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Unpack

from cacheflow.errors import StoreError
from cacheflow.stores.base import PinOutcome, PutOutcome
from cacheflow.stores.bounded import BoundedStore, Bounds
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.lru import HeldObject
from cacheflow.stores.record import ChecksumAlgorithm
from cacheflow.threads import start_thread

logger = logging.getLogger(__name__)

UNBOUNDED = 1 << 62
"""Bytes: a capacity with which nothing is evicted; the room on a medium that has no bound of its own."""

FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The ``errno`` of a write that failed because the medium, or a quota on it, is full."""

_SCANS_PER_CAPACITY = 8
"""A process looks at the whole medium again each time it has written, and read of others, this fraction of the
capacity."""

_MAX_TRIES = 4
"""Times that one record is written to a full medium; others may take the room that was made for it."""

_HEADROOM = 16
"""On a medium that proved too small, one of so many parts stays free: for block sizes and folders, and for what other
processes write before this one looks again. A scan follows each failed write, so failed writes must be rare."""

_REFIT_S = 60.0
"""Time after which a bound that was lowered to the medium's room is measured anew."""


@dataclass(frozen=True, slots=True)
class FoundRecord:
    """What a scan finds: an ``ObjectKey.name``, the bytes of its record, and the wall time of its last known use."""

    name: str
    num_bytes: int
    used_s: float


class SharedStore(BoundedStore):
    """A bounded store on a medium that processes share; a backend implements four methods on names, and reading.

    Capacity: each process evicts the least recently used objects it knows of. What others wrote becomes known by
    reading it or by a scan of the medium, at open and after every eighth of the capacity written, or read of what was
    not known; so ``n`` processes may exceed the bound by ``(n - 1) / 8`` of it for a while.

    A medium, or a quota, that is full before the capacity is used lowers the bound to 15/16 of what fits: what records
    hold, whichever process wrote them, and what is free. The record that found no room is written again after the
    least recently used objects made room for it, and is ``FULL`` if too little can be evicted. From then on the bound
    is measured anew once a minute, by the next write, up to the capacity and down again: it follows what others do with
    the medium. Where a quota that is not shown ends the room, one write a minute finds that out again.
    """

    persistent, shared = True, True
    can_list = True
    """Whether a scan finds what other processes wrote; where it does not, an operator cannot look after the store."""

    def __init__(self, address: str, *, algorithm: ChecksumAlgorithm | None = None, **bounds: Unpack[Bounds]) -> None:
        """Prepare an empty index and the pool; the backend then reaches its medium inside ``opening``.

        Args:
            address: What messages call the medium, such as its URL.
            algorithm: Checksum of the records written; None for the fastest this process has.
            **bounds: See ``Bounds``.

        Raises:
            ConfigError: A count is below 1.
        """
        super().__init__(algorithm=algorithm, **bounds)
        self._address = address
        self._capacity_bytes = bounds["capacity_bytes"]
        self._num_fits = 0  # times that the bound was measured
        self._refit_at_s = 0.0
        self._room_lock = Lock()  # held by the one writer who makes room; never while holding _lock
        self._unscanned_bytes = 0
        self._writing: set[str] = set()  # counted as reserved, wherever a scan finds it already
        self._scanner: Thread | None = None  # the last one
        self._warned = self._warned_full = False
        self._used_s: dict[str, float] = {}  # wall time at which this process last used an object
        self._first_seen_s: dict[str, float] = {}  # of ``first_seen``

    def __str__(self) -> str:
        """See ``ThreadedStore.__str__``."""
        return f"{self.name} store {self._address}"

    @contextmanager
    def opening(self, hint: str = "") -> Iterator[None]:
        """Around a backend's first exchange with its medium; then learns what is there. Closes the store on failure.

        Args:
            hint: What the user should look at then.

        Raises:
            StoreError: The medium cannot be used.
        """
        try:
            yield
            self.learn()
        except OSError as error:
            self.close()
            raise StoreError(f"{self} cannot be used: {error.strerror or error}{hint and '; '}{hint}") from error

    def log_opened(self, more: str = "") -> None:
        """Say in the log what the store may hold, what it holds, and ``more`` of its medium."""
        logger.info(
            "%s: capacity %d bytes, %d objects in %d bytes%s",
            self, self._capacity_bytes, len(self._index), self._index.used_bytes, more and f"; {more}",
        )  # fmt: skip

    def require_open(self) -> None:
        """Pass unless the store is closed.

        Raises:
            ConnectionError: It is.
        """
        if self._closed:
            raise ConnectionError(errno.ESHUTDOWN, f"{self} is closed")

    @abstractmethod
    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """Every record, in no particular order; what is not named like one is left out.

        Args:
            known: Bytes of the records that this process knows of, by name; a medium on which sizes are costly need not
                ask for them again.

        Raises:
            OSError: The medium does not answer.
        """

    @abstractmethod
    def are_there(self, names: Sequence[str]) -> tuple[bool, ...]:
        """Whether each record is on the medium.

        Raises:
            OSError: The medium does not answer.
        """

    @abstractmethod
    def write_whole(self, name: str, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """Make a record visible, whole or not at all; ``STORED``, or ``EXISTS`` where another process was faster.

        Raises:
            OSError: It failed; under the name is nothing, what was there, or the whole record, of which the next scan
                learns. With an ``errno`` of ``FULL_ERRORS``: for want of room, and nothing changed.
        """

    @abstractmethod
    def erase(self, name: str) -> bool:
        """Remove a record from the medium; whether it was there.

        Raises:
            OSError: It is there and cannot be removed.
        """

    def free_bytes(self) -> int:
        """Bytes free on the medium; ``UNBOUNDED`` unless a backend knows better.

        Raises:
            OSError: The medium does not answer.
        """
        return UNBOUNDED

    def write_record(self, key: ObjectKey, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``ThreadedStore.write_record``; two writers of one key write the same bytes."""
        num_bytes = sum(part.nbytes for part in parts)
        self._scan_if_due(num_bytes)
        self._refit_if_due()
        for _ in range(_MAX_TRIES):
            with self._lock:
                num_fits, tenant = self._num_fits, self.tenant_of(key.name)
                victims = self._index.reserve(num_bytes, now_s=self._clock(), tenant=tenant)
                if victims is None:
                    return PutOutcome.FULL
                self._writing.add(key.name)
            try:
                self._remove_victims(victims)
                outcome = self.write_whole(key.name, parts, replace=replace)
            except OSError as error:
                with self._lock:
                    self._index.release(num_bytes)
                    self._writing.discard(key.name)
                if error.errno not in FULL_ERRORS:
                    self._warn_once(error)
                    return PutOutcome.ERROR
                self._lower_bound(error, num_bytes, num_fits)
            except BaseException:
                with self._lock:
                    self._index.release(num_bytes)
                    self._writing.discard(key.name)
                raise
            else:
                with self._lock:
                    self._index.commit(key.name, num_bytes, now_s=self._clock(), tenant=tenant)
                    self._used_s[key.name] = time.time()
                    self._writing.discard(key.name)
                return outcome
        return PutOutcome.FULL

    def holds(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``ThreadedStore.holds``; asks the medium, since other processes write and evict."""
        return self.are_there([key.name for key in keys])

    def remove(self, key: ObjectKey) -> bool:
        """See ``ThreadedStore.remove``.

        Raises:
            OSError: It is there and cannot be removed.
        """
        removed = self.erase(key.name)
        self.note_gone(key.name)
        return removed

    def look_up(self, names: Sequence[str]) -> list[FoundRecord]:
        """What is on the medium of some records; by a scan, where a backend has no shorter way.

        Raises:
            OSError: The medium does not answer.
        """
        wanted = set(names)
        return [each for each in self.scan({}) if each.name in wanted]

    def mark_kept(self, names: Sequence[str], *, for_s: float) -> None:
        """Tell other processes by the medium that records are pinned for so long, 0 for no longer.

        Nothing, unless a backend has a way to.

        Raises:
            OSError: The medium does not answer.
        """

    def lives_s(self, names: Sequence[str]) -> list[float | None]:
        """Seconds after which the medium itself removes each record; None where it does not.

        Raises:
            OSError: The medium does not answer.
        """
        return [None] * len(names)

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[PinOutcome, ...]:
        """See ``Store.pin``; also for objects that other processes wrote, of which the medium is asked.

        Raises:
            ConfigError: ``ttl_s`` is not above 0.
        """
        with self._lock:
            unknown = [key.name for key in keys if key.name not in self._index]
        if unknown:
            with suppress(OSError):  # what is not found is not pinned
                found = self.look_up(unknown)
                with self._lock:
                    for each in found:
                        if each.name not in self._index:
                            tenant = self.tenant_of(each.name)
                            self._index.add(each.name, each.num_bytes, now_s=self._clock(), tenant=tenant)
        outcomes = super().pin(keys, ttl_s=ttl_s)
        pinned = [key.name for key, each in zip(keys, outcomes, strict=True) if each is PinOutcome.PINNED]
        if pinned:
            with suppress(OSError):  # this process heeds it all the same
                self.mark_kept(pinned, for_s=ttl_s)
        return outcomes

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """See ``Store.unpin``."""
        with self._lock:
            unpinned = [key.name for key in keys if self._index.unpin(key.name)]
        if unpinned:
            with suppress(OSError):
                self.mark_kept(unpinned, for_s=0.0)

    def sweep(self) -> int:
        """See ``BoundedStore.sweep``; looks at the whole medium first, since other processes use it too."""
        try:
            self.learn()
            with self._lock:
                expired = self._index.expire(now_s=self._clock())
            lives_s = self.lives_s(expired)
        except OSError:  # the medium is gone: the next time finds out
            return 0
        # What the medium itself removes is left to it, which may know of later uses; the next scan finds it again.
        ours = [name for name, life_s in zip(expired, lives_s, strict=True) if life_s is None]
        self._remove_victims(ours)
        return len(ours)

    def first_seen(self, sizes: Mapping[str, int]) -> list[FoundRecord]:
        """What a scan found, by name its bytes, on a medium that does not say when a record was used.

        What others wrote counts as used when this process first saw it.
        """
        now_s = time.time()
        with self._lock:
            self._first_seen_s = {name: self._first_seen_s.get(name, now_s) for name in sizes}
            first_seen_s = self._first_seen_s
        return [FoundRecord(name, num_bytes, first_seen_s[name]) for name, num_bytes in sizes.items()]

    def note_read(self, name: str, num_bytes: int) -> None:
        """Take a record of ``num_bytes`` that was just read for the most recently used.

        Of what others wrote it is not heard when that goes again: after enough of it the medium is looked at, on a
        thread of its own, since somebody waits for the read.
        """
        with self._lock:
            due = name not in self._index and self._is_scan_due(num_bytes)
            self._index.add(name, num_bytes, now_s=self._clock(), tenant=self.tenant_of(name))
            self._used_s[name] = time.time()
            if due and not self._closed and (self._scanner is None or not self._scanner.is_alive()):
                self._scanner = start_thread(self._look_again, name="cacheflow-scan")

    def last_used_s(self, name: str, default_s: float) -> float:
        """Wall time at which this process last used a record, or ``default_s`` where it has not."""
        with self._lock:
            return self._used_s.get(name, default_s)

    def note_gone(self, name: str) -> None:
        """Forget a record that is no longer there."""
        with self._lock:
            self._index.discard(name)

    def learn(self) -> None:
        """Take over what a scan finds, in the order of the last use by any process.

        Raises:
            OSError: The medium does not answer.
        """
        began_s = time.time()
        with self._lock:
            known = self._index.sizes()
        found = self.scan(known)  # not under the lock: reads go on meanwhile
        with self._lock:
            underway = {name for name in self._writing if name not in self._index}
            records = {each.name: (each.used_s, each.num_bytes) for each in found if each.name not in underway}
            for name, num_bytes in self._index.sizes().items():
                if name not in records and self._used_s.get(name, 0.0) >= began_s:
                    records[name] = (self._used_s[name], num_bytes)  # written since the scan
            used_s = {name: max(at_s, self._used_s.get(name, 0.0)) for name, (at_s, _) in records.items()}
            by_use = sorted(records, key=lambda name: (used_s[name], name))
            ahead_s = self._clock() - time.time()  # of this process's clock, on which the index counts
            self._index.rebuild(
                (name, HeldObject(records[name][1], ahead_s + used_s[name], self.tenant_of(name))) for name in by_use
            )
            self._used_s = {name: at_s for name, at_s in self._used_s.items() if name in records}

    def _threads_to_join(self) -> list[Thread]:
        return [*super()._threads_to_join(), *([] if self._scanner is None else [self._scanner])]

    def _remove_victims(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(OSError):  # counted as gone; the next scan finds it again
                self.erase(name)
            with self._lock:
                noted = name in self._index
            if noted:  # drop what a read, begun before the record was removed, has noted of it meanwhile
                with suppress(OSError):
                    if not self.are_there([name])[0]:
                        self.note_gone(name)

    def _lower_bound(self, error: OSError, num_bytes: int, num_fits: int) -> None:
        """After a write failed for want of room: lower the bound so that its next try evicts.

        Args:
            error: Of the write.
            num_bytes: Of its record.
            num_fits: ``_num_fits`` when it began; a bound measured since then may be low enough and is tried first.
        """
        with self._room_lock:
            with self._lock:
                if self._num_fits != num_fits:
                    return
            free_bytes = 0
            with suppress(OSError):
                self.learn()
                # Whatever is said to be free, the record did not fit into it; of a user's quota nothing is known.
                free_bytes = 0 if error.errno == errno.EDQUOT else min(self.free_bytes(), num_bytes)
            used_bytes, bound_bytes = self._fit(free_bytes)
            if not self._warned_full:
                self._warned_full = True
                logger.warning(
                    "%s: it is full (%s) with %d bytes of records, of a capacity of %d: the bound is lowered to "
                    "%d bytes and follows the room there is from now on; the least recently used objects go first",
                    self, error.strerror, used_bytes, self._capacity_bytes, bound_bytes,
                )  # fmt: skip

    def _refit_if_due(self) -> None:
        """Measure a bound anew that was lowered: the medium may have more room by now, or less."""
        with self._lock:
            now_s = self._clock()
            if self._index.capacity_bytes == self._capacity_bytes or now_s < self._refit_at_s:
                return
            self._refit_at_s = now_s + _REFIT_S
        with suppress(OSError):  # the medium is gone: the write finds out
            self.learn()
            self._fit(self.free_bytes())

    def _fit(self, free_bytes: int) -> tuple[int, int]:
        """Set the bound to what records hold, after a scan, and what is free, less the headroom.

        Returns:
            Bytes that records hold, and the bound.
        """
        with self._lock:
            used_bytes = self._index.used_bytes
            fitting_bytes = used_bytes + self._index.reserved_bytes + free_bytes
            bound_bytes = max(1, min(self._capacity_bytes, fitting_bytes - fitting_bytes // _HEADROOM))
            self._index.capacity_bytes = bound_bytes
            self._num_fits += 1
            self._refit_at_s = self._clock() + _REFIT_S
        return used_bytes, bound_bytes

    def _scan_if_due(self, num_bytes: int) -> None:
        """Learn what other processes wrote, used and evicted."""
        with self._lock:
            due = self._is_scan_due(num_bytes)
        if due:
            self._look_again()

    def _is_scan_due(self, num_bytes: int) -> bool:
        """Count bytes that were written, or were not known; whether it is time for a scan. Call with the lock held."""
        self._unscanned_bytes += num_bytes
        due = self._unscanned_bytes * _SCANS_PER_CAPACITY >= self._capacity_bytes  # a full one is scanned anyway
        if due:
            self._unscanned_bytes = 0
        return due

    def _look_again(self) -> None:
        with suppress(OSError):  # the medium is gone: the next operation finds out
            self.learn()

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: a write failed, later failures are only counted: %s", self, error)
