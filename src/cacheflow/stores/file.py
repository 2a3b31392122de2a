"""One file per object, read with ``preadv`` straight into the caller's buffer.

The page cache does the caching; nothing here reads ahead or keeps file descriptors open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.bounded import Bounds
from cacheflow.stores.directory import RecordDirectory, drop_front
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import HEADER_BYTES, ChecksumAlgorithm
from cacheflow.stores.shared import FoundRecord, SharedStore

_TOUCH_S = 60.0
"""A file's modification time follows its last read at this resolution; a system call on each read would cost more."""

_TOUCHES_PER_TTL = 10
_AHEAD_S = 7 * 86400.0
"""A last use further ahead is no keep: the clock was set back since, and a read mends it."""


class FileStore(SharedStore):
    """A bounded store in a directory, which processes on one host may share.

    The order of use survives the process to within a minute, as the files' modification times.

    A put is written aside, flushed, and renamed: a crash leaves a whole record or none. With ``fsync=False`` it is
    not flushed; then a power failure (not a crash of the process) may leave damaged records, which read as
    ``CORRUPT``.
    """

    name, default_threads = "file", 3

    def __init__(
        self,
        root: Path | str | RecordDirectory,
        *,
        fsync: bool = True,
        algorithm: ChecksumAlgorithm | None = None,
        only_look: bool = False,
        **bounds: Unpack[Bounds],
    ) -> None:
        """Open or create a directory of records and scan what it holds.

        Args:
            root: The directory, or one that is open; then ``algorithm`` is its own.
            fsync: Flush each record to the disk before it becomes visible.
            algorithm: Checksum for a new directory; None for the fastest this process has.
            only_look: Reading does not count as use, and a directory that is there need not be writable.
            **bounds: See ``Bounds``.

        Raises:
            ConfigError: A count is below 1.
            StoreError: The directory is not writable, is marked for another record version, or needs a checksum
                package that is not installed.
        """
        self._directory = (
            root
            if isinstance(root, RecordDirectory)
            else RecordDirectory(Path(root), algorithm=algorithm, only_look=only_look)
        )
        super().__init__(str(self._directory.root), algorithm=self._directory.algorithm, **bounds)
        self._fsync, self._only_look = fsync, only_look
        # Others must not take for expired what was read a moment ago.
        ttl_s = self._retention.ttl_s
        self._touch_s = _TOUCH_S if ttl_s is None else min(_TOUCH_S, ttl_s / _TOUCHES_PER_TTL)
        with self.opening():
            free_bytes = self.free_bytes()
        self.log_opened(f"{free_bytes} bytes free on the disk, {self._algorithm.name} checksums")

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``.

        Raises:
            OSError: The file is there and cannot be read.
        """
        try:
            descriptor = os.open(self._directory.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.note_gone(key.name)
            return None
        try:
            num_read = _read_all(descriptor, [header, payload])
            status = os.fstat(descriptor)
            if not (self._only_look or -_AHEAD_S < time.time() - status.st_mtime <= self._touch_s):
                with suppress(OSError):  # a file of another owner keeps its time
                    os.utime(descriptor)
            if status.st_nlink:  # not deleted or replaced since it was opened
                self.note_read(key.name, status.st_size)
        finally:
            os.close(descriptor)
        # It may be longer than the buffers, or was truncated since its end was read.
        return max(num_read, status.st_size) - HEADER_BYTES

    def look_up(self, names: Sequence[str]) -> list[FoundRecord]:
        """See ``SharedStore.look_up``."""
        found = []
        for name in names:
            with suppress(OSError):
                status = Path(self._directory.path_of_name(name)).stat()
                found.append(FoundRecord(name, status.st_size, status.st_mtime))
        return found

    def mark_kept(self, names: Sequence[str], *, for_s: float) -> None:
        """See ``SharedStore.mark_kept``: the file's last use is dated ahead, so that whoever scans evicts it last.

        When that time has come it counts as used then; where the pin is ended early, as used when it last was.
        """
        now_s = time.time()
        for name in names:
            path = Path(self._directory.path_of_name(name))
            with suppress(OSError, OverflowError):  # it is gone, or another owner's; later than any date
                dated_s = path.stat().st_mtime
                if dated_s < now_s + for_s or not for_s:
                    os.utime(path, (now_s, now_s + for_s if for_s else self.last_used_s(name, now_s)))

    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """See ``SharedStore.scan``; removes what dead writers left."""
        del known
        self._directory.remove_stale_staging()
        return self._directory.scan()

    def are_there(self, names: Sequence[str]) -> tuple[bool, ...]:
        """See ``SharedStore.are_there``."""
        return tuple(os.access(self._directory.path_of_name(name), os.F_OK) for name in names)

    def write_whole(self, name: str, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``SharedStore.write_whole``; of two writers the last rename stays.

        Raises:
            OSError: The disk is full or failing.
        """
        del replace  # the rename replaces; existing keys were sorted out before
        self._directory.write(name, parts, sync=self._fsync)
        return PutOutcome.STORED

    def erase(self, name: str) -> bool:
        """See ``SharedStore.erase``."""
        return self._directory.remove(name)

    def free_bytes(self) -> int:
        """See ``SharedStore.free_bytes``."""
        return self._directory.free_bytes()


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
