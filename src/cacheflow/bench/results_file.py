"""A results file: one JSON record a line, appended whole and read back with the line's number in every complaint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cacheflow.errors import ConfigError

R = TypeVar("R")


def append_line(path: Path, text: str) -> None:
    """Append one line in one write, so that runs may share the file and a crash leaves whole lines.

    Raises:
        OSError: The folder does not exist or the file cannot be written.
    """
    line = (text + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: only part of a record was written; remove the last line before going on")
    finally:
        os.close(descriptor)


def read_lines(path: Path, parse: Callable[[str], R], *, wanted: Callable[[str], bool] = lambda line: True) -> list[R]:
    """Every record of a results file, in the order they were written; blank lines are skipped.

    Args:
        path: The file.
        parse: Makes a record of a line; raises ``ConfigError`` when it is none.
        wanted: Lines that are not are skipped unread.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"results file {path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and wanted(line):
            try:
                records.append(parse(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    return records
