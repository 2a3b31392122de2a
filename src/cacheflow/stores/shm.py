"""Files in shared memory: one tier in memory for all processes of a host.

A device is lent records that this process reads again: see ``mapped``. Each is verified right before, at every read,
since other processes of the user can reach it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Unpack

from cacheflow.errors import StoreError
from cacheflow.stores.bounded import Bounds
from cacheflow.stores.directory import RecordDirectory, is_record_directory
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import DeviceReader, LentRecord
from cacheflow.stores.mapped import MappedRecords
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.shared import FoundRecord

SHARED_MEMORY = Path("/dev/shm")
_LOCK = "users.lock"
_REMOVED = ".removed-"
_MAX_TRIES = 100
_MAPPED_SHARE = 2
"""At most one part in so many of the capacity is mapped by each process."""


def shm_folder(name: str) -> Path:
    """Where the records of a shared-memory store lie."""
    return SHARED_MEMORY / f"cacheflow-{os.geteuid()}-{name}"


class SharedMemoryStore(FileStore):
    """A file store in ``/dev/shm``, of one user: its folder is closed to others.

    Every process that has it open holds a shared lock, which ends with the process however that ends. The last one to
    close it removes the folder, and so frees the memory. What killed processes leave is taken up by the next one that
    opens the store; where none will, ``cacheflow store clear`` removes it.

    A folder that somebody deletes meanwhile is made anew by the next write, which joins it as opening the store does.
    """

    name, persistent = "shm", False

    def __init__(self, name: str, *, keep: bool = False, only_look: bool = False, **bounds: Unpack[Bounds]) -> None:
        """Open or create the store of that name.

        Args:
            name: Part of a file name.
            keep: Leave what it holds to the next process, though this one is the last.
            only_look: Reading does not count as use, and a store that is there is left to the next process.
            **bounds: See ``Bounds``.

        Raises:
            ConfigError: A count is below 1.
            StoreError: There is no shared memory, or the folder belongs to another user.
        """
        self._folder = shm_folder(name)
        self._keep = keep or (only_look and is_record_directory(self._folder))
        self._mapped: MappedRecords | None = None
        self._users = _join(self._folder)
        self._users_lock = Lock()
        try:
            directory = RecordDirectory(self._folder, make_root=self._join_anew)
            super().__init__(directory, fsync=False, only_look=only_look, **bounds)
        except BaseException:
            self._leave()
            raise

    def lend_to(self, reader: DeviceReader) -> None:
        """See ``Store.lend_to``."""
        if self._mapped is None:
            self._mapped = MappedRecords(reader, most_bytes=self._index.capacity_bytes // _MAPPED_SHARE)

    def lend_record(self, key: ObjectKey, num_bytes: int) -> LentRecord | None:
        """See ``ThreadedStore.lend_record``.

        Raises:
            OSError: The file is there and cannot be mapped.
        """
        if self._mapped is None:
            return None
        path, record_bytes = self._directory.path(key), HEADER_BYTES + num_bytes
        lent = self._mapped.lend(key.name, path, record_bytes)
        if lent is not None:
            self.note_read(key.name, record_bytes)
            with suppress(OSError):
                if time.time() - Path(path).stat().st_mtime > self._touch_s:
                    os.utime(path)
        return lent

    def erase(self, name: str) -> bool:
        """See ``SharedStore.erase``."""
        removed = super().erase(name)
        if self._mapped is not None:
            self._mapped.forget(name)
        return removed

    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """See ``SharedStore.scan``."""
        found = super().scan(known)
        if self._mapped is not None:
            self._mapped.keep({record.name for record in found})
        return found

    def close(self) -> None:
        """See ``Store.close``; the last process to close it removes what it holds."""
        super().close()
        if self._mapped is not None:
            self._mapped.close()
        self._leave()

    def _join_anew(self) -> None:
        """Make the folder again and hold its lock, where it was deleted; on a store's thread.

        Raises:
            OSError: The store is closed, or the folder is somebody else's by now.
        """
        with self._users_lock:
            if self._users < 0:
                raise ConnectionError(errno.ESHUTDOWN, f"store {self._folder} is closed")
            if not _is_at(self._users, self._folder / _LOCK):
                users = _join(self._folder)
                os.close(self._users)
                self._users = users

    def _leave(self) -> None:
        with self._users_lock:
            users, self._users = self._users, -1
        if users < 0:
            return
        with suppress(OSError):  # others have it open, and the last of them removes it
            if not self._keep:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # What was made in place of a folder that somebody deleted is for those to remove who have joined it.
                if _is_at(users, self._folder / _LOCK):
                    # Renamed first, so that nobody opens what is being removed.
                    removed = self._folder.rename(f"{self._folder}{_REMOVED}{uuid.uuid4().hex}")
                    shutil.rmtree(removed, ignore_errors=True)
        os.close(users)


def _join(folder: Path) -> int:
    """Make the folder ours and hold its lock with the others; returns the descriptor that holds it."""
    try:
        for _ in range(_MAX_TRIES):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            with suppress(FileNotFoundError):  # the last user has just removed the folder
                status = folder.lstat()
                if status.st_uid != os.geteuid() or status.st_mode & 0o077 or folder.is_symlink():
                    raise StoreError(
                        f"store {folder} is not a folder that this user alone may open: remove it or take another name"
                    )
                users = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(users, fcntl.LOCK_SH)
                if _is_at(users, folder / _LOCK):
                    for removed in folder.parent.glob(f"{folder.name}{_REMOVED}*"):  # by a process killed over it
                        shutil.rmtree(removed, ignore_errors=True)
                    return users
                os.close(users)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"store {folder} cannot be used: {error}") from error
    raise StoreError(f"store {folder} was removed {_MAX_TRIES} times while it was opened")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a file that is open is the one at ``path``."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
