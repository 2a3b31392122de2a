"""``cacheflow bench figures``: the figures of the CacheFlow paper, and ours, by simulation in virtual time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cacheflow.bench.figures.chart import Figure
from cacheflow.bench.figures.drawing import draw_figures
from cacheflow.bench.figures.gains import Gain, gains
from cacheflow.bench.figures.record import FigureRecord, read_records, write_records
from cacheflow.bench.figures.registry import FIGURES, find_figures
from cacheflow.bench.options import int_list, make_folder
from cacheflow.bench.results_file import replacing, take_up
from cacheflow.errors import ConfigError

RESULTS = "results.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench figures``."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"folder for {RESULTS} and pictures")
    parser.add_argument("--only", type=int_list, metavar="N,N,...", help=f"of {', '.join(map(str, FIGURES))}")
    parser.add_argument("--fast", action="store_true", help="a reduced set, in under a minute")
    parser.add_argument("--results", type=Path, metavar="FILE", help="draw these records instead of simulating")


def run(args: argparse.Namespace) -> int:
    """Simulate, write the records, draw them, and print ours against the best rivals.

    Raises:
        ConfigError: A number is no figure, options contradict each other, the folder cannot be written, or the records
            cannot be read.
    """
    figures = find_figures(args.only)
    if args.results is not None and args.fast:
        raise ConfigError("--fast is of simulating, --results draws records that are there: drop one of them")
    console = Console(highlight=False)
    make_folder("--out", args.out)
    if args.results is None:
        _simulate(figures, args.out / RESULTS, fast=args.fast, console=console)
    suites = {figure.suite for figure in figures}
    source = args.results or args.out / RESULTS
    records = [record for record in read_records(source) if record.suite in suites]
    if not records:
        raise ConfigError(f"{source} holds no record of figures {', '.join(str(each.number) for each in figures)}")
    console.print(gains_table(figures, records))
    if find_spec("matplotlib") is None:
        console.print("No pictures: matplotlib is missing. pip install 'cacheflow-kv\\[plots]'")
        return 0
    for path in draw_figures(records, args.out):
        console.print(f"Picture: {path}", soft_wrap=True)
    return 0


def _simulate(figures: Sequence[Figure], path: Path, *, fast: bool, console: Console) -> None:
    """Write the file anew after each figure, so that what is done is kept; records of other figures stay.

    They are read again each time: another run may have put some there meanwhile.
    """
    take_up(path, read_records, tell=partial(console.print, markup=False, soft_wrap=True))
    for figure in figures:
        console.print(f"Figure {figure.number}: {figure.title}", style="dim", soft_wrap=True)
        found = list(figure.records(fast))
        with replacing(path):
            write_records(path, [*(each for each in read_records(path) if each.suite != figure.suite), *found])


def gains_table(figures: Sequence[Figure], records: Sequence[FigureRecord]) -> Table:
    """How much faster than the best rivals, least to most over the settings of each figure."""
    table = Table("figure", "settings", "over pure", "over existing", "over best rival", "over bound", "behind")
    for figure in figures:
        found = gains(record for record in records if record.suite == figure.suite)
        if found:
            table.add_row(str(figure.number), str(len(found)), *_spans(found), str(sum(each.loses for each in found)))
    table.caption = (
        "times as fast as; pure: vLLM, LMCache, HiCache; existing: those and Cake; rival: those and CacheFlow v1, v2; "
        "behind: settings where ours is more than 2 % + 5 ms behind the best rival"
    )
    return table


def _spans(found: Sequence[Gain]) -> tuple[str, str, str, str]:
    return (
        _span([each.over_pure for each in found]),
        _span([each.over_existing for each in found]),
        _span([each.over_rival for each in found]),
        _span([each.ours.ttft_over_bound for each in found]),
    )


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
