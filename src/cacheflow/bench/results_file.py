"""A results file: one JSON record a line, appended whole and read back with the line's number in every complaint.

A run that is killed while it writes may leave half a line. The next run cuts it off first (``take_up``), before any
work, so that no record is appended to it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json

R = TypeVar("R")


def append_line(path: Path, text: str) -> None:
    """Append one line whole or not at all, so that runs may share the file; a full disk leaves whole lines.

    Raises:
        ConfigError: The folder does not exist or the file cannot be written; what was there is as before.
    """
    line = (text + "\n").encode()
    try:
        with _locked(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError("only part of a record could be written: is the disk full?")
            except BaseException:  # also when interrupted
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
    except OSError as error:
        raise ConfigError(f"results file {path} cannot be written: {error.strerror or error}") from error


def read_lines(path: Path, parse: Callable[[str], R]) -> list[R]:
    """Every record of a results file, in the order they were written; blank lines are skipped.

    Args:
        path: The file.
        parse: Makes a record of a line; raises ``ConfigError`` when it is none.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """
    if path.is_char_device():
        raise ConfigError(f"results file {path} cannot be read: it is a device, which has no end")
    try:
        # Not splitlines(): a text may hold characters that it takes for the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"results file {path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(parse(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    return records


def take_up(path: Path, read: Callable[[Path], list[R]], *, tell: Callable[[str], None]) -> list[R]:
    """The records that a run goes on from; to be called before it does any work.

    Args:
        path: The results file; one that does not exist yet holds no record.
        read: Reads it.
        tell: Gets a sentence when the last line was only half written and has been cut off.

    Raises:
        ConfigError: The file cannot be read or written, or a line is malformed; the message names the line.
    """
    if not path.exists():
        return []
    try:
        with _locked(path, os.O_RDWR | os.O_APPEND) as descriptor:
            cut = _mend(descriptor)
    except OSError as error:
        raise ConfigError(f"results file {path} cannot be written: {error.strerror or error}") from error
    if cut:
        tell(f"{path}: the last line was only half written when a run ended; its {cut:,} bytes were cut off")
    return read(path)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a folder for one measurement: a second would disturb the times of the first, and measure the same again.

    The hold ends with the process, however it ends.

    Raises:
        ConfigError: Another run holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--out {folder} is in use by another run, whose times this one would disturb: wait until it has ended"
            ) from error
        except OSError:
            pass  # a file system without locks: better unguarded than not at all
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[None]:
    """Keep other runs from replacing a file between this one's reading it and replacing it; it is made if need be.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        while True:
            with _locked(path, os.O_RDWR | os.O_CREAT) as descriptor:
                if os.path.samestat(os.fstat(descriptor), path.stat()):  # else it was replaced while we waited
                    yield
                    return
    except OSError as error:
        raise ConfigError(f"results file {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """An open file that nobody else who asks for this holds meanwhile."""
    descriptor = os.open(path, flags, 0o644)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _mend(descriptor: int) -> int:
    """Let a file end with a whole line; returns the bytes that were cut off for it."""
    size = os.fstat(descriptor).st_size
    start = _last_line(descriptor, size)
    tail = os.pread(descriptor, size - start, start)
    if not tail:
        return 0
    try:
        parse_json(tail.decode())
    except (ConfigError, UnicodeDecodeError):
        os.ftruncate(descriptor, start)
        return len(tail)
    os.write(descriptor, b"\n")  # whole, but for its end
    return 0


def _last_line(descriptor: int, size: int, *, step: int = 1 << 16) -> int:
    """Where the last line begins: after the last newline."""
    end = size
    while end > 0:
        begin = max(0, end - step)
        if (found := os.pread(descriptor, end - begin, begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0
