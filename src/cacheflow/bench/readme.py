"""``cacheflow bench readme``: the README's measured tables, written from committed results files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from cacheflow.bench.chart import draw_over_bound, studies
from cacheflow.bench.ranks.record import SUITE as RANKS
from cacheflow.bench.ranks.record import RanksRecord, read_ranks_records
from cacheflow.bench.ranks.report import draw_one, ranks_markdown
from cacheflow.bench.record import RestoreRecord, read_records
from cacheflow.bench.summary import Setting, summarise
from cacheflow.bench.table import markdown_caption, markdown_table
from cacheflow.bench.vllm.record import SUITE as VLLM
from cacheflow.bench.vllm.record import read_vllm_records
from cacheflow.errors import ConfigError

BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
MARKED_SUITES = (VLLM, RANKS)
"""Suites whose tables have markers of their own; every other suite's goes between ``BEGIN`` and ``END``."""
_Run = TypeVar("_Run", bound=RestoreRecord)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cacheflow bench readme``."""
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="results.jsonl to read")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help="file to fill in")
    parser.add_argument("--suite", default="restore", help="suite to show (default: restore)")
    parser.add_argument("--num-tokens", type=int, metavar="N", help="prefix length to show (default: the longest)")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the study's time over the bound here")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is out of date")


def run(args: argparse.Namespace) -> int:
    """Fill the table in and draw its picture, or check that the table is up to date.

    Raises:
        ConfigError: A file cannot be read, the markers are missing, or no run fits.
    """
    block = results_block(args.results, suite=args.suite, num_tokens=args.num_tokens)
    try:
        text = args.readme.read_text(encoding="utf-8")
        filled = fill(text, block, markers=markers_of(args.suite))
        if args.check and filled != text:
            raise ConfigError(f"{args.readme} is out of date: run {_command(args.results, args.suite)}")
        if filled != text:
            args.readme.write_text(filled, encoding="utf-8")
        if args.figure is not None and not args.check:
            _draw(args)
    except OSError as error:
        raise ConfigError(f"a file cannot be read or written: {error}") from error
    return 0


def _draw(args: argparse.Namespace) -> None:
    if args.suite == RANKS:
        draw_one(_ranks_runs(args.results, args.num_tokens), args.figure)
        return
    records = _clean_runs(args.results, suite=args.suite, num_tokens=args.num_tokens)
    (sweeps,) = studies(summarise(records)).values()
    draw_over_bound(sweeps, args.figure)


def markers_of(suite: str) -> tuple[str, str]:
    """What stands around a suite's table."""
    if suite not in MARKED_SUITES:
        return BEGIN, END
    return f"<!-- {suite}-results:begin -->", f"<!-- {suite}-results:end -->"


def results_block(results: Path, *, suite: str = "restore", num_tokens: int | None = None) -> str:
    """Markdown of one sweep over load/compute ratios, with its caption and the command that made it.

    Takes the unperturbed runs of a suite at one prefix length, with the most new tokens.

    Raises:
        ConfigError: The file is malformed, no run fits, or the runs that fit are of several settings.
    """
    source = f"From [`{results.as_posix()}`]({results.as_posix()}) by `{_command(results, suite)}`."
    if suite == RANKS:
        return f"{ranks_markdown(_ranks_runs(results, num_tokens))}\n{source}"
    records = _clean_runs(results, suite=suite, num_tokens=num_tokens)
    suffix_tokens = max(record.suffix_tokens for record in records)
    records = [record for record in records if record.suffix_tokens == suffix_tokens]
    summaries = summarise(records)
    return f"{markdown_table(summaries)}\n\n{markdown_caption(summaries, records[-1].environment)}\n{source}"


def _command(results: Path, suite: str) -> str:
    return (
        f"cacheflow bench readme{f' --suite {suite}' if suite in MARKED_SUITES else ''} --results {results.as_posix()}"
    )


def fill(text: str, block: str, *, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """Put a block between two markers, replacing what was there.

    Raises:
        ConfigError: The text does not hold each marker once, in order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"the text must hold {begin} and {end} once each, in this order")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"


def _ranks_runs(results: Path, num_tokens: int | None) -> list[RanksRecord]:
    """The runs of one length over one to several ranks."""
    return _of_one_length(read_ranks_records(results), num_tokens, results, suite=RANKS)


def _clean_runs(results: Path, *, suite: str, num_tokens: int | None) -> list[RestoreRecord]:
    """The unperturbed runs of one study, with and without new tokens."""
    read: Sequence[RestoreRecord] = read_vllm_records(results) if suite == VLLM else read_records(results)
    clean = [record for record in read if record.suite == suite and not record.perturbation]
    return _of_one_length(clean, num_tokens, results, suite=suite)


def _of_one_length(records: Sequence[_Run], num_tokens: int | None, results: Path, *, suite: str) -> list[_Run]:
    """The runs of one prefix length, the longest unless another is asked for."""
    if num_tokens is None:
        num_tokens = max((record.num_tokens for record in records), default=0)
    kept = [record for record in records if record.num_tokens == num_tokens]
    if not kept:
        raise ConfigError(f"{results} holds no clean run of suite {suite!r} with {num_tokens} tokens")
    _require_one_setting(kept, results)
    return kept


def _require_one_setting(records: Sequence[RestoreRecord], results: Path) -> None:
    """All runs must differ in the ratio and the new tokens alone, or one column would hold two studies."""
    shown = ("model", "device", "dtype", "chunk_tokens")
    found = {tuple(getattr(Setting.of(record), key) for key in shown) for record in records}
    if len(found) > 1:
        listed = "; ".join(", ".join(map(str, values)) for values in sorted(found))
        raise ConfigError(f"{results} holds several studies ({', '.join(shown)}): {listed}; keep them in files apart")
