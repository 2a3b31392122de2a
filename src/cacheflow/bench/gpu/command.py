"""``cacheflow bench gpu``: runs the parts of the study for which there is time, and prints the tables last."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Group, RenderableType

from cacheflow.bench.gpu.flags import GpuFlags
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.gpu import GpuRecord
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.suite import Suite
from cacheflow.bench.summary import console_tables, summarise
from cacheflow.bench.table import Row, text_table

add_arguments = GpuFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Run the study, taking up an earlier one in the same folder."""
    from cacheflow.bench.gpu.parts import run_parts

    flags = GpuFlags.of(args)
    # The parts watch the clock themselves.
    suite = Suite(out=flags.out, kind=BenchRecord, show=show, resumes=True, time_limit_s=flags.time_limit_s)
    return suite.run(lambda run: run_parts(flags, run))


def show(records: Sequence[BenchRecord]) -> RenderableType:
    """What every part found, then the restorations."""
    rows: list[Row] = [
        ((f"{each.part} {each.name}", *_cells(each)), "red" if each.correct is False else None)
        for each in records
        if isinstance(each, GpuRecord)
    ]
    measured = text_table("measured, part by part", ("part", "what"), rows, padding=1)
    measured.columns[1].justify = "left"
    measured.columns[1].no_wrap = False
    return Group(measured, console_tables(summarise([each for each in records if isinstance(each, RestoreRecord)])))


def _cells(record: GpuRecord) -> tuple[str]:
    said = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.values.items()
    ]
    return (", ".join([*said, *(["NOT EXACT"] if record.correct is False else [])]),)
