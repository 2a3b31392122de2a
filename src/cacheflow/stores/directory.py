"""The directory of a file store: its marker, where records lie, and how one becomes visible.

::

    <root>/cacheflow-store.json            record version and checksum; written once, by the first process
    <root>/objects/<2 hex>/<2 hex>/<name>  records, by the first digits of the chain hash
    <root>/staging/<pid>-<unique>          records being written
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from cacheflow.errors import StoreError
from cacheflow.stores.keys import ObjectKey, chain_hash_of, namespace_of
from cacheflow.stores.record import RECORD_VERSION, ChecksumAlgorithm, best_algorithm, require
from cacheflow.stores.shared import FULL_ERRORS, FoundRecord

STALE_STAGING_S = 3600.0
"""Age at which a staging file is taken for the remains of a dead writer; a live one takes seconds. One from as far in
the future was left before the clock was set back."""

_MARKER = "cacheflow-store.json"
_MAX_PARTS = 512
"""Buffers per system call; the kernel allows 1,024."""


def is_record_directory(folder: Path) -> bool:
    """Whether a directory of records is there; touches nothing."""
    return (folder / _MARKER).is_file()


class RecordDirectory:
    """One directory of records, shared by any number of processes of one record version."""

    def __init__(
        self,
        root: Path,
        *,
        algorithm: ChecksumAlgorithm | None = None,
        make_root: Callable[[], object] | None = None,
        only_look: bool = False,
    ) -> None:
        """Open or create the directory and remove stale staging files.

        Args:
            root: Created if it does not exist, closed to other users; records are as open as it is.
            algorithm: Checksum for a new directory; None for the fastest this process has. An existing directory
                keeps its own.
            make_root: Makes the root where it is not there, now and after somebody deleted it; raises ``OSError``. It
                alone does, whatever is deleted. None for a folder that this user alone may open.
            only_look: Where the directory is there already it need not be writable.

        Raises:
            StoreError: The directory cannot be created or written, is marked for another record version, or has
                checksums this process cannot compute.
        """
        self.root = root
        self._make_root = make_root or partial(root.mkdir, mode=0o700, parents=True, exist_ok=True)
        self._objects = f"{root}/objects"
        self._staging = f"{root}/staging"
        try:
            if not (only_look and is_record_directory(root)):
                self._make_folders()
                self._probe_writing()
            self.algorithm = self._agree(algorithm or best_algorithm())
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"store directory {root} cannot be used: {error}; choose a directory this process can create and write"
            ) from error
        require(self.algorithm, where=f"store directory {root}")
        self.remove_stale_staging()

    def path(self, key: ObjectKey) -> str:
        """Where a key's record lies."""
        return self.path_of_name(key.name)

    def path_of_name(self, name: str) -> str:
        """Where the record of a ``ObjectKey.name`` lies."""
        digits = chain_hash_of(name)
        return f"{self._objects}/{digits[:2]}/{digits[2:4]}/{name}"

    def write(self, name: str, parts: Sequence[memoryview], *, sync: bool) -> None:
        """Write a record aside, then make it visible under ``name`` in one step, replacing what was there.

        Args:
            name: ``ObjectKey.name``.
            parts: The record's bytes.
            sync: Flush the record to the disk before it becomes visible.

        Raises:
            OSError: The disk is full (``FULL_ERRORS``) or failing; nothing of it remains and nothing changed under
                ``name``.
        """
        staged = Path(f"{self._staging}/{os.getpid()}-{uuid.uuid4().hex}")
        try:
            descriptor = self._open_staged(staged)
            try:
                _write_all(descriptor, parts)
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            target = Path(self.path_of_name(name))
            try:
                staged.replace(target)
            except FileNotFoundError:
                for folder in (Path(self._objects), target.parent.parent, target.parent):
                    folder.mkdir(exist_ok=True)  # not with its parents: the root may just have been deleted
                staged.replace(target)
        except BaseException:
            with suppress(OSError):
                staged.unlink(missing_ok=True)
            raise

    def _open_staged(self, staged: Path) -> int:
        try:
            return self._create(staged)
        except FileNotFoundError as missing:  # somebody deleted the directory: a cache may be emptied while it serves
            self._make_folders()
            agreed = self._agree(self.algorithm)
            if agreed is not self.algorithm:
                text = f"store directory {self.root} was made anew, with {agreed.name} checksums: restart to use it"
                raise StoreError(text) from missing
            return self._create(staged)

    def _create(self, staged: Path) -> int:
        mode = self.root.stat().st_mode & 0o666
        return os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def _make_folders(self) -> None:
        self._make_root()
        for folder in (self._objects, self._staging):
            Path(folder).mkdir(exist_ok=True)

    def remove(self, name: str) -> bool:
        """Remove a record; whether it was there.

        Raises:
            OSError: It is there and cannot be removed.
        """
        try:
            Path(self.path_of_name(name)).unlink()
        except FileNotFoundError:
            return False
        return True

    def scan(self) -> list[FoundRecord]:
        """Every record, in no particular order; files that are not named like one are left alone."""
        return [
            FoundRecord(entry.name, status.st_size, status.st_mtime)
            for outer in _entries(self._objects)
            for inner in _entries(outer.path)
            for entry in _entries(inner.path)
            if namespace_of(entry.name) is not None and (status := _status(entry)) is not None
        ]

    def free_bytes(self) -> int:
        """Bytes free on the disk for this process, 0 where no further file can be made; knows nothing of user quotas.

        Raises:
            OSError: The directory is gone, or the disk does not answer.
        """
        status = os.statvfs(self.root)
        out_of_files = status.f_files > 0 and status.f_favail == 0  # some file systems have no limit and count none
        return 0 if out_of_files else status.f_bavail * status.f_frsize

    def _probe_writing(self) -> None:
        # by doing it: permission bits say nothing about root, read-only mounts or quotas
        probe = Path(f"{self._staging}/probe-{uuid.uuid4().hex}")
        try:
            probe.write_bytes(b"cacheflow")
        except OSError as error:
            if error.errno not in FULL_ERRORS:  # a full disk can be used: eviction makes room
                raise
        finally:
            probe.unlink(missing_ok=True)

    def _agree(self, wanted: ChecksumAlgorithm) -> ChecksumAlgorithm:
        """Read the marker, or be the one process that creates it."""
        marker = self.root / _MARKER
        if not marker.exists():
            staged = Path(f"{self._staging}/marker-{uuid.uuid4().hex}")
            try:
                staged.write_text(json.dumps({"record_version": RECORD_VERSION, "checksum": wanted.name}) + "\n")
                with suppress(FileExistsError):
                    marker.hardlink_to(staged)  # unlike a rename, fails when another process was first
            finally:
                staged.unlink(missing_ok=True)
        text = marker.read_text(errors="replace")
        try:
            values = json.loads(text)
            version = values["record_version"]
            if version == RECORD_VERSION:  # another one may have checksums that this one has no name for
                return ChecksumAlgorithm[values["checksum"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{marker} is not a store marker: {text[:100]!r}; use another directory") from error
        raise StoreError(
            f"store directory {self.root} holds records of version {version}, this is version {RECORD_VERSION}; "
            f"use another directory, or delete this one (a cache, nothing else is lost)"
        )

    def remove_stale_staging(self) -> None:
        """Remove what dead writers left."""
        now_s = time.time()
        for entry in _entries(self._staging):
            status = _status(entry)
            if status is not None and abs(now_s - status.st_mtime) > STALE_STAGING_S:
                with suppress(OSError):
                    Path(entry.path).unlink()


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder; none when it vanished or is no folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        yield from entries


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Status of a file; None when it vanished meanwhile or is no file."""
    try:
        return entry.stat(follow_symlinks=False) if entry.is_file(follow_symlinks=False) else None
    except OSError:
        return None


def _write_all(descriptor: int, parts: Sequence[memoryview]) -> None:
    pending = list(parts)
    offset = 0
    while pending:
        written = os.pwritev(descriptor, pending[:_MAX_PARTS], offset)
        offset += written
        pending = drop_front(pending, written)


def drop_front(parts: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of a list of buffers after its first ``num_bytes`` bytes were transferred."""
    for index, part in enumerate(parts):
        if num_bytes < part.nbytes:
            return [part[num_bytes:], *parts[index + 1 :]]
        num_bytes -= part.nbytes
    return []
