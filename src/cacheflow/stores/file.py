"""One file per object, read with ``preadv`` straight into the caller's buffer.

The page cache does the caching; nothing here reads ahead or keeps file descriptors open.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock

from cacheflow.stores.base import Capabilities, PutOutcome
from cacheflow.stores.bounded import BoundedStore
from cacheflow.stores.directory import RecordDirectory, RecordFile, drop_front, is_full
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import HEADER_BYTES, ChecksumAlgorithm
from cacheflow.types import Clock

logger = logging.getLogger(__name__)

_SCANS_PER_CAPACITY = 8
"""A process looks at the whole directory again each time it has written this fraction of the capacity."""

_MAX_TRIES = 4
"""Times that one record is written to a full disk; others may take the room that was made for it."""

_HEADROOM = 16
"""On a disk that proved too small, one of so many parts stays free: for block sizes and folders, and for what other
processes write before this one looks again. A scan follows each failed write, so failed writes must be rare."""

_REFIT_S = 60.0
"""Time after which a bound that was lowered to the disk's room is measured anew."""

_TOUCH_S = 60.0
"""A file's modification time follows its last read at this resolution; a system call on each read would cost more."""


class FileStore(BoundedStore):
    """A bounded store in a directory, which processes on one host may share.

    Capacity: each process evicts the least recently used objects it knows of. What others wrote becomes known by
    reading it or by a scan of the directory, at open and after every eighth of the capacity written; so ``n``
    processes may exceed the bound by ``(n - 1) / 8`` of it for a while. The order of use survives the process to
    within a minute, as the files' modification times.

    A disk, or a quota, that is full before the capacity is used lowers the bound to 15/16 of what fits: what records
    hold, whichever process wrote them, and what is free. The record that found no room is written again after the
    least recently used objects made room for it, and is ``FULL`` if too little can be evicted. From then on the bound
    is measured anew once a minute, by the next write, up to the capacity and down again: it follows what others do with
    the disk. Where a quota that the file system does not show ends the room, one write a minute finds that out again.

    A put is written aside, flushed, and renamed: a crash leaves a whole record or none. With ``fsync=False`` it is
    not flushed; then a power failure (not a crash of the process) may leave damaged records, which read as
    ``CORRUPT``.
    """

    def __init__(
        self,
        root: Path | str | RecordDirectory,
        *,
        capacity_bytes: int,
        fsync: bool = True,
        num_threads: int = 3,
        algorithm: ChecksumAlgorithm | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Open or create a directory of records and scan what it holds.

        Args:
            root: The directory, or one that is open; then ``algorithm`` is its own.
            capacity_bytes: Bound on the records held, headers (4,096 bytes each) included.
            fsync: Flush each record to the disk before it becomes visible.
            num_threads: Reads and writes carried out at the same time.
            algorithm: Checksum for a new directory; None for the fastest this process has.
            clock: Monotonic clock, for deadlines, pins and statistics.

        Raises:
            ConfigError: A count is below 1.
            StoreError: The directory is not writable, is marked for another record version, or needs a checksum
                package that is not installed.
        """
        self._directory = (
            root if isinstance(root, RecordDirectory) else RecordDirectory(Path(root), algorithm=algorithm)
        )
        super().__init__(
            capacity_bytes=capacity_bytes, num_threads=num_threads, algorithm=self._directory.algorithm, clock=clock
        )
        self._fsync = fsync
        self._capacity_bytes = capacity_bytes
        self._num_fits = 0  # times that the bound was measured
        self._refit_at_s = 0.0
        self._room_lock = Lock()  # held by the one writer who makes room; never while holding _lock
        self._unscanned_bytes = 0
        self._warned = self._warned_full = False
        self._used_s: dict[str, float] = {}  # wall time at which this process last used an object
        self._learn(self._directory.scan())
        logger.info(
            "%s: capacity %d bytes, %d objects in %d bytes, %d bytes free on the disk, %s checksums",
            self, capacity_bytes, len(self._index), self._index.used_bytes, self._directory.free_bytes(),
            self._algorithm.name,
        )  # fmt: skip

    def __str__(self) -> str:
        """See ``ThreadedStore.__str__``."""
        return f"file store {self._directory.root}"

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``; the capacity is the bound that the disk allows at the moment."""
        return Capabilities(
            name="file",
            persistent=True,
            shared=True,
            capacity_bytes=self._index.capacity_bytes,
            max_parallel_reads=self._num_threads,
        )

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``.

        Raises:
            OSError: The file is there and cannot be read.
        """
        try:
            descriptor = os.open(self._directory.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            with self._lock:
                self._index.discard(key.name)
            return None
        try:
            status = os.fstat(descriptor)
            record_bytes = status.st_size
            fits = record_bytes == HEADER_BYTES + payload.nbytes
            num_read = _read_all(descriptor, [header, payload] if fits else [header])
            now_s = time.time()
            if now_s - status.st_mtime > _TOUCH_S:
                with suppress(OSError):  # a file of another owner keeps its time
                    os.utime(descriptor)
            with self._lock:
                if os.fstat(descriptor).st_nlink:  # not deleted or replaced since it was opened
                    self._index.add(key.name, record_bytes)
                    self._used_s[key.name] = now_s
        finally:
            os.close(descriptor)
        # truncated between fstat and the end of the read: what was read, not what was announced
        return (num_read if fits else record_bytes) - HEADER_BYTES

    def write_record(self, key: ObjectKey, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``ThreadedStore.write_record``; two writers of one key write the same bytes, the last rename stays."""
        del replace  # the rename replaces; existing keys were sorted out before
        num_bytes = sum(part.nbytes for part in parts)
        self._scan_if_due(num_bytes)
        self._refit_if_due()
        for _ in range(_MAX_TRIES):
            with self._lock:
                num_fits = self._num_fits
                victims = self._index.reserve(num_bytes, now_s=self._clock())
            if victims is None:
                return PutOutcome.FULL
            try:
                self._remove_victims(victims)
                self._directory.write(key.name, parts, sync=self._fsync)
            except OSError as error:
                with self._lock:
                    self._index.release(num_bytes)
                if not is_full(error):
                    self._warn_once(error)
                    return PutOutcome.ERROR
                self._lower_bound(error, num_bytes, num_fits)
            else:
                with self._lock:
                    self._index.commit(key.name, num_bytes)
                    self._used_s[key.name] = time.time()
                return PutOutcome.STORED
        return PutOutcome.FULL

    def holds(self, key: ObjectKey) -> bool:
        """See ``ThreadedStore.holds``; asks the file system, since other processes write and evict."""
        return os.access(self._directory.path(key), os.F_OK)

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[bool, ...]:
        """See ``Store.pin``; also for objects that other processes wrote.

        Raises:
            ConfigError: ``ttl_s`` is not above 0.
        """
        for key in keys:
            with suppress(OSError):
                num_bytes = Path(self._directory.path(key)).stat().st_size
                with self._lock:
                    if key.name not in self._index:
                        self._index.add(key.name, num_bytes)
        return super().pin(keys, ttl_s=ttl_s)

    def remove(self, key: ObjectKey) -> bool:
        """See ``ThreadedStore.remove``.

        Raises:
            OSError: The file is there and cannot be removed.
        """
        removed = self._directory.remove(key.name)
        with self._lock:
            self._index.discard(key.name)
        return removed

    def _remove_victims(self, names: Sequence[str]) -> None:
        for name in names:
            with suppress(OSError):  # counted as gone; the next scan finds it again
                self._directory.remove(name)
            with self._lock:  # drop what a read, begun before the file was removed, has noted of it meanwhile
                if name in self._index and not os.access(self._directory.path_of_name(name), os.F_OK):
                    self._index.discard(name)

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
            self._directory.remove_stale_staging()
            self._learn(self._directory.scan())
            # Whatever is said to be free, the record did not fit into it; of a user's quota nothing is known.
            free_bytes = 0 if error.errno == errno.EDQUOT else min(self._directory.free_bytes(), num_bytes)
            used_bytes, bound_bytes = self._fit(free_bytes)
            if not self._warned_full:
                self._warned_full = True
                logger.warning(
                    "%s: the disk is full (%s) with %d bytes of records, of a capacity of %d: the bound is lowered to "
                    "%d bytes and follows the room on the disk from now on; the least recently used objects go first",
                    self, error.strerror, used_bytes, self._capacity_bytes, bound_bytes,
                )  # fmt: skip

    def _refit_if_due(self) -> None:
        """Measure a bound anew that was lowered: the disk may have more room by now, or less."""
        with self._lock:
            now_s = self._clock()
            if self._index.capacity_bytes == self._capacity_bytes or now_s < self._refit_at_s:
                return
            self._refit_at_s = now_s + _REFIT_S
        self._learn(self._directory.scan())
        with suppress(OSError):  # the directory is gone: the write finds out
            self._fit(self._directory.free_bytes())

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
            self._unscanned_bytes += num_bytes
            due = self._unscanned_bytes * _SCANS_PER_CAPACITY >= self._capacity_bytes  # a full disk is scanned anyway
            if due:
                self._unscanned_bytes = 0
        if due:
            self._learn(self._directory.scan())  # not under the lock: reads go on meanwhile

    def _learn(self, found: list[RecordFile]) -> None:
        """Take over what a scan found, in the order of the last use by any process."""
        with self._lock:
            files = {each.name: (each.modified_s, each.num_bytes) for each in found}
            for name, num_bytes in self._index.sizes().items():
                if name not in files and os.access(self._directory.path_of_name(name), os.F_OK):
                    files[name] = (time.time(), num_bytes)  # written since the scan
            used_s = {name: max(modified_s, self._used_s.get(name, 0.0)) for name, (modified_s, _) in files.items()}
            by_use = sorted(files, key=lambda name: (used_s[name], name))
            self._index.rebuild((name, files[name][1]) for name in by_use)
            self._used_s = {name: used_s[name] for name in self._used_s if name in files}

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: a write failed, later failures are only counted: %s", self, error)


def _read_all(descriptor: int, parts: list[memoryview]) -> int:
    """Fill the buffers from the start of the file; returns the bytes read, fewer only at the end of the file."""
    offset = 0
    while parts:
        num_read = os.preadv(descriptor, parts, offset)
        if num_read == 0:
            break
        offset += num_read
        parts = drop_front(parts, num_read)
    return offset
