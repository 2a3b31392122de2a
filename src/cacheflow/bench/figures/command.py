"""``cacheflow bench figures``: the figures of the CacheFlow paper, and ours, by simulation in virtual time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cacheflow.bench.figures.drawing import draw_figures
from cacheflow.bench.figures.gains import gains
from cacheflow.bench.figures.registry import FIGURES, Figure, find_figures
from cacheflow.bench.options import Flags, make_folder, option
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.bench.results_file import replacing, take_up
from cacheflow.bench.table import Row, text_table
from cacheflow.errors import ConfigError

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class FiguresFlags(Flags):
    """The options of ``bench figures``."""

    out: Path = option(help=f"folder for {RESULTS} and pictures", metavar="DIR")
    only: tuple[int, ...] | None = option(None, f"of {', '.join(map(str, FIGURES))}", metavar="N,N,...")
    fast: bool = option(False, "a reduced set, in under a minute")
    results: Path | None = option(None, "draw these records instead of simulating", metavar="FILE")

    def __post_init__(self) -> None:
        """Check what contradicts.

        Raises:
            ConfigError: Names the options.
        """
        if self.results is not None and self.fast:
            raise ConfigError("--fast is of simulating, --results draws records that are there: drop one of them")


add_arguments = FiguresFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Simulate, write the records, draw them, and print ours against the best rivals.

    Raises:
        ConfigError: A number is no figure, options contradict each other, the folder cannot be written, or the records
            cannot be read.
    """
    flags = FiguresFlags.of(args)
    figures = find_figures(flags.only)
    console = Console(highlight=False)
    make_folder("--out", flags.out)
    if flags.results is None:
        simulate_figures(figures, flags.out / RESULTS, fast=flags.fast, console=console)
    suites = {figure.suite for figure in figures}
    source = flags.results or flags.out / RESULTS
    records = [record for record in read_figures(source) if record.suite in suites]
    if not records:
        raise ConfigError(f"{source} holds no record of figures {', '.join(str(each.number) for each in figures)}")
    console.print(gains_table(figures, records))
    if find_spec("matplotlib") is None:
        console.print("No pictures: matplotlib is missing. pip install 'cacheflow-kv\\[plots]'")
        return 0
    for path in draw_figures(records, flags.out):
        console.print(f"Picture: {path}", soft_wrap=True)
    return 0


def simulate_figures(figures: Sequence[Figure], path: Path, *, fast: bool, console: Console) -> None:
    """Write the file anew after each figure, so that what is done is kept; records of other figures stay.

    They are read again each time: another run may have put some there meanwhile.
    """
    take_up(path, read_figures, tell=partial(console.print, markup=False, soft_wrap=True))
    for figure in figures:
        console.print(f"Figure {figure.number}: {figure.title}", style="dim", soft_wrap=True)
        found = list(figure.records(fast))
        with replacing(path):
            write_figures(path, [*(each for each in read_figures(path) if each.suite != figure.suite), *found])


def read_figures(path: Path) -> list[FigureRecord]:
    """Every record of a results file, which holds nothing but points of figures.

    Raises:
        ConfigError: The file cannot be read, a line is malformed, or it is of something else.
    """
    records = read_records(path, BenchRecord)
    if others := sorted({each.suite for each in records if not isinstance(each, FigureRecord)}):
        raise ConfigError(f"{path} holds no records of figures alone, but of {', '.join(others)}: give another folder")
    return [each for each in records if isinstance(each, FigureRecord)]


def write_figures(path: Path, records: Sequence[FigureRecord]) -> None:
    """Write a whole results file, replacing what was there; an interruption leaves the old file.

    Raises:
        OSError: The file cannot be written.
    """
    part = path.with_suffix(".part")
    part.write_text("".join(f"{record.to_json()}\n" for record in records), encoding="utf-8")
    part.replace(path)


def gains_table(figures: Sequence[Figure], records: Sequence[FigureRecord]) -> Table:
    """How much faster than the best rivals, least to most over the settings of each figure."""
    rows: list[Row] = []
    for figure in figures:
        found = gains(record for record in records if record.suite == figure.suite)
        if found:
            factors = (
                [each.over_pure for each in found],
                [each.over_existing for each in found],
                [each.over_rival for each in found],
                [each.ours.ttft_over_bound for each in found],
            )
            spans = [f"{min(values):.2f} to {max(values):.2f}" for values in factors]
            rows.append(((str(figure.number), str(len(found)), *spans, str(sum(each.loses for each in found))), None))
    heads = ("figure", "settings", "pure", "existing", "rival", "bound", "behind")
    caption = (
        "how many times as fast as the best; pure: vLLM, LMCache, HiCache; existing: those and Cake; rival: those and "
        "CacheFlow v1, v2; bound: time over it; behind: settings where ours is over 2 % + 5 ms behind the best rival"
    )
    return text_table("ours over best of each kind, least to most", heads, rows, caption=caption)
