"""Records in files of shared memory, mapped and page-locked one by one, so that a device copies them by itself.

What a file holds stays as long as somebody has it mapped, whoever removes the file meanwhile: no process has to ask
another one whether a record may go.
"""

from __future__ import annotations

import logging
import mmap
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Container
from functools import partial
from pathlib import Path

import numpy as np

from cacheflow.stores.loan import DeviceReader, LentRecord, wait_until_passed
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.types import Bytes, Passing

logger = logging.getLogger(__name__)

_MAX_SEEN = 1 << 16
"""Names kept of records that were read once."""
_MOST_MAPS = 16_384
"""Of the 65,530 that a process may have of the kernel."""
_DESCRIPTORS_SHARE = 4
"""One part in so many of the process's file descriptors may be for maps: each holds one (before Python 3.13)."""


class _MappedRecord:
    """One file, mapped and page-locked."""

    __slots__ = ("bytes", "copies", "inode", "num_readers", "path")

    def __init__(self, whole: Bytes, path: str, inode: int) -> None:
        self.bytes, self.path, self.inode = whole, path, inode
        self.num_readers = 0
        self.copies: list[Passing] = []

    def is_at(self, status: os.stat_result) -> bool:
        """Whether a file is this one; as long as it is mapped no other has its number."""
        return status.st_ino == self.inode and status.st_size == self.bytes.nbytes


class MappedRecords:
    """Lends records of a store in shared memory, to one process and each from its second read on.

    Page-locking a record takes longer than copying it once, so what is read once is copied. No more than
    ``most_bytes`` are mapped, nor more records than the system lets a process map beside all else; what does not fit is
    copied until something that is mapped leaves the store. What left is noticed when this process removes or scans, and
    by and by as it reads. Any thread; ``LentRecord.end`` waits for nothing.
    """

    def __init__(self, reader: DeviceReader, *, most_bytes: int) -> None:
        """Map nothing yet."""
        self._reader, self._most_bytes = reader, most_bytes
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_maps = min(_MOST_MAPS, descriptors // _DESCRIPTORS_SHARE)
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._records: OrderedDict[str, _MappedRecord] = OrderedDict()
        self._gone: list[_MappedRecord] = []
        self._ended: deque[tuple[_MappedRecord, Passing | None]] = deque()
        self._mapped_bytes = 0
        self._can_pin, self._closed = True, False

    def lend(self, name: str, path: str, num_bytes: int) -> LentRecord | None:
        """The record in a file of so many bytes; None where it is to be read like any other.

        Raises:
            OSError: The file is there and cannot be mapped.
        """
        with self._lock:
            self._look_at_next()
            self._unmap_unused()
            status = _status(path)
            record = self._records.get(name)
            if record is not None and (status is None or not record.is_at(status)):
                self._forget(name)
                record = None
            if status is None or status.st_size != num_bytes:
                return None
            if record is None and (record := self._map(name, path, num_bytes)) is None:
                return None
            record.num_readers += 1
        return LentRecord(
            header=record.bytes[:HEADER_BYTES],
            payload=record.bytes[HEADER_BYTES:],
            is_sound=False,  # other processes can reach it
            end=partial(self._end, record),
        )

    def forget(self, name: str) -> None:
        """Unmap a record that left the store, once nobody reads it."""
        with self._lock:
            self._forget(name)
            self._unmap_unused()

    def keep(self, names: Container[str]) -> None:
        """Unmap all others, once nobody reads them."""
        with self._lock:
            for name in [name for name in self._records if name not in names]:
                self._forget(name)
            self._unmap_unused()

    def close(self) -> None:
        """Unmap everything; waits for copies, and leaves to the end of the process what a device still copies."""
        with self._lock:
            for name in list(self._records):
                self._forget(name)
            self._can_pin, self._closed = False, True
            self._note_ended()
            copies = [copy for record in self._gone for copy in record.copies]
        if not wait_until_passed(copies):
            logger.warning("shared-memory store: it was closed while a device still copied from it")
        with self._lock:
            self._unmap_unused()

    def _stop(self, why: str) -> None:
        self._can_pin = False
        logger.warning(
            "shared-memory store: %s after %d bytes; other reads are copied before the device copies them",
            why, self._mapped_bytes,
        )  # fmt: skip

    def _end(self, record: _MappedRecord, after: Passing | None) -> None:
        self._ended.append((record, after))  # without the lock: a record may be on its way to be page-locked
        if self._closed:  # nobody else looks any more
            with self._lock:
                self._unmap_unused()

    def _note_ended(self) -> None:
        for _ in range(len(self._ended)):
            record, after = self._ended.popleft()
            record.num_readers -= 1
            record.copies = [copy for copy in record.copies if not copy.done()]
            if after is not None:
                record.copies.append(after)

    def _unmap_unused(self) -> None:
        self._note_ended()
        gone, self._gone = self._gone, []
        for record in gone:
            if record.num_readers or not all(copy.done() for copy in record.copies):
                self._gone.append(record)
            else:
                self._reader.unpin(record.bytes)
                self._mapped_bytes -= record.bytes.nbytes

    def _forget(self, name: str) -> None:
        self._seen.pop(name, None)
        if (record := self._records.pop(name, None)) is not None:
            self._gone.append(record)

    def _look_at_next(self) -> None:
        """Whether one of the mapped records is still there; another one each time."""
        if self._records:
            name, record = next(iter(self._records.items()))
            self._records.move_to_end(name)
            status = _status(record.path)
            if status is None or not record.is_at(status):
                self._forget(name)

    def _map(self, name: str, path: str, num_bytes: int) -> _MappedRecord | None:
        if name not in self._seen:
            self._seen[name] = None
            if len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)
            return None
        if (
            not self._can_pin
            or self._mapped_bytes + num_bytes > self._most_bytes
            or len(self._records) + len(self._gone) >= self._most_maps
        ):
            return None
        try:
            found = _mapped(path, num_bytes)
        except OSError as error:
            self._stop(f"a record cannot be mapped ({error})")
            return None
        if found is None:
            return None
        whole, inode = found
        if not self._reader.pin(whole):
            self._stop("there is no more page-locked memory")
            return None
        del self._seen[name]
        self._mapped_bytes += num_bytes
        record = self._records[name] = _MappedRecord(whole, path, inode)
        return record


def _mapped(path: str, num_bytes: int) -> tuple[Bytes, int] | None:
    """A file's memory and number; None where there is no such file of so many bytes."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_size != num_bytes:
            return None
        return np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8), status.st_ino
    finally:
        os.close(descriptor)


def _status(path: str) -> os.stat_result | None:
    """Of a file; None where there is none."""
    try:
        return Path(path).stat()
    except FileNotFoundError:
        return None
