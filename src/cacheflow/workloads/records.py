"""Rows of a trace file, one at a time, with checked access to their fields.

JSON lines, CSV (either may be gzipped) and parquet all become ``Record``; what is wrong with one is said with the file,
the line and the field.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from cacheflow.errors import ConfigError, TraceError
from cacheflow.json_text import parse_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
"""File name endings that can be read."""

MAX_LINE_CHARS = 1 << 28
"""Of one request, or of one session where a line holds a session with its texts."""
GREATEST = 1e24
"""No count and no time of a trace reaches it, in whatever unit."""

_INFINITE = (float("inf"), float("-inf"))
_PARQUET_ROWS = 1024
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Record:
    """One row and where it stands.

    Attributes:
        place: File and line, the head of every complaint.
        fields: The row's values by name; all are text when the file is CSV.
        textual: Numbers are written as text, as CSV does.
    """

    place: str
    fields: Mapping[str, Any]
    textual: bool = False

    def complain(self, problem: str) -> NoReturn:
        """Raise a ``TraceError`` that opens with this record's place."""
        raise TraceError(f"{self.place}: {problem}")

    def count(self, field: str, *, least: int = 0) -> int:
        """An integer field.

        Raises:
            TraceError: It is missing, no integer, or less than ``least``.
        """
        expected = f"an integer, {least} or more"
        value = self._number(field, expected)
        if value != int(value) or value < least:
            self.complain(f"{field} is {value}; expected {expected}")
        return int(value)

    def number(self, field: str, *, least: float = 0.0) -> float:
        """A finite number.

        Raises:
            TraceError: It is missing, no finite number, or less than ``least``.
        """
        expected = f"a number, {least:g} or more"
        value = self._number(field, expected)
        if value < least:
            self.complain(f"{field} is {value}; expected {expected}")
        return float(value)

    def optional_number(self, field: str) -> float | None:
        """A finite number of 0 or more, or None where the field is missing or null."""
        return None if self.fields.get(field) is None else self.number(field)

    def text(self, field: str) -> str:
        """A text field, possibly empty.

        Raises:
            TraceError: It is missing or no text.
        """
        value = self._present(field, "text")
        if not isinstance(value, str):
            self.complain(f"{field} is {_shown(value)}; expected text")
        return value

    def ids(self, field: str) -> list[int]:
        """A list of integers, each 0 or more.

        Raises:
            TraceError: It is missing, no list, or holds anything else.
        """
        value = self._present(field, "a list of integers, 0 or more")
        # `type is int` rather than isinstance: true and false are integers to Python.
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            self.complain(f"{field} is {_shown(value)}; expected a list of integers, 0 or more")
        return value

    def children(self, field: str) -> Iterator[Record]:
        """The records inside a field that holds a list of objects.

        Raises:
            TraceError: It is missing or holds anything else.
        """
        value = self._present(field, "a list of objects")
        if not isinstance(value, list):
            self.complain(f"{field} is {_shown(value)}; expected a list of objects")
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                self.complain(f"{field}[{index}] is {_shown(item)}; expected an object")
            yield Record(f"{self.place}, {field}[{index}]", item, self.textual)

    def _present(self, field: str, expected: str) -> object:
        value = self.fields.get(field)
        if value is None:
            self.complain(f"{field} is missing; expected {expected}")
        return value

    def _number(self, field: str, expected: str) -> int | float:
        value = self._present(field, expected)
        if self.textual:
            value = _parsed(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value or value in _INFINITE:
            self.complain(f"{field} is {_shown(value)}; expected {expected}")
        # Compared, not asked whether it is finite: that fails for whole numbers of hundreds of digits.
        if value >= GREATEST:
            self.complain(f"{field} is {_shown(value)}; expected {expected}, and below {GREATEST:g}")
        return value


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a file, streamed; which reader is chosen by the end of the file's name.

    Raises:
        ConfigError: The file's name has none of the known endings, it cannot be opened, or it is parquet and pyarrow is
            not installed.
        TraceError: A row cannot be parsed, or there is none.
    """
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"trace {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    empty = True
    try:
        for record in _rows(path):
            empty = False
            yield record
    except (EOFError, UnicodeDecodeError, csv.Error, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: damaged, or not what its name says: {error}") from error
    except OSError as error:
        raise ConfigError(f"trace {path}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise TraceError(f"{path}: empty; expected at least one request")


def _rows(path: Path) -> Iterator[Record]:
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    with _open_text(path) as file:
        yield from _csv_rows(path, file) if path.name.endswith((".csv", ".csv.gz")) else _json_rows(path, file)


def _open_text(path: Path) -> TextIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_rows(path: Path, file: TextIO) -> Iterator[Record]:
    for number, line in enumerate(_lines(path, file), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = parse_json(line)
        except ConfigError as error:
            raise TraceError(f"{place}: {error}") from error
        if not isinstance(fields, dict):
            raise TraceError(f"{place}: {_shown(fields)}; expected a JSON object")
        yield Record(place, fields)


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """Lines; none is read that memory might not hold."""
    number = 0
    while line := file.readline(MAX_LINE_CHARS):
        number += 1
        if len(line) == MAX_LINE_CHARS and not line.endswith("\n"):
            raise TraceError(f"{path}, line {number}: longer than {MAX_LINE_CHARS:,} characters; expected one request")
        yield line


def _csv_rows(path: Path, file: TextIO) -> Iterator[Record]:
    reader = csv.DictReader(_lines(path, file))
    for fields in reader:
        yield Record(f"{path}, line {reader.line_num}", fields, textual=True)


def _parquet_rows(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"trace {path}: reading parquet needs pyarrow; install it with pip install 'cacheflow-kv[traces]'"
        ) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", fields)
    except (ArrowException, ArithmeticError, ValueError) as error:
        raise TraceError(f"{path}, after row {number}: damaged, or not parquet: {error}") from error


def _parsed(value: object) -> object:
    """Text as the number it spells; anything else as it is, for the complaint to show."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
