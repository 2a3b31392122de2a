"""Which record each suite writes, and reading and writing them.

A line's ``suite`` says which record it is (``SUITES``). Several suites share a record, which tagged unions of msgspec
cannot say, so the tag is looked up here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from cacheflow.bench.records.base import BenchRecord, decode
from cacheflow.bench.records.batch import BatchRecord
from cacheflow.bench.records.codecs import CodecRecord
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.bench.records.gpu import GpuRecord
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.simulation import SimulationRecord
from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.records.vllm import LoadRecord, VllmRecord
from cacheflow.bench.results_file import append_line, read_lines
from cacheflow.errors import ConfigError

SUITES: Mapping[str, type[BenchRecord]] = {
    **dict.fromkeys(("restore", "perturbed", "demo"), RestoreRecord),
    "vllm": VllmRecord,
    "vllm-load": LoadRecord,
    "ranks": RanksRecord,
    "batch": BatchRecord,
    "gpu": GpuRecord,
    "simulate": SimulationRecord,
    "stores": StoreReadRecord,
    "codecs": CodecRecord,
    **dict.fromkeys((f"figure-{number}" for number in range(3, 16)), FigureRecord),
}
"""The record of each suite."""

R = TypeVar("R", bound=BenchRecord)


def append_record(path: Path, record: BenchRecord) -> None:
    """Append one record in one write, so that runs may share the file and a crash leaves whole lines.

    Raises:
        ConfigError: The folder does not exist or the file cannot be written.
    """
    append_line(path, record.to_json())


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Every record of a kind in a results file, in the order they were written.

    Args:
        path: The file; blank lines and lines of suites with another record are skipped.
        kind: The class in ``SUITES``; ``BenchRecord`` for all.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; names the line, the field and what is allowed.
    """
    found = read_lines(path, lambda line: _parse(line, kind))
    return [record for record in found if record is not None]


class _Head(msgspec.Struct):
    """What must be known of a line before it can be read."""

    suite: str


def _parse(line: str, kind: type[R]) -> R | None:
    suite = decode(line, _Head).suite
    if suite not in SUITES:
        raise ConfigError(f"record field suite is {suite!r}, must be one of {', '.join(SUITES)}")
    found = SUITES[suite]
    return decode(line, found) if kind in (BenchRecord, found) else None  # type: ignore[return-value]
