"""``cacheflow bench readme``: the measured tables of a Markdown file, written from committed results files."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from cacheflow.bench.chart import draw_over_bound, draw_time_bars, studies
from cacheflow.bench.codecs.report import codecs_markdown
from cacheflow.bench.options import Flags, option
from cacheflow.bench.ranks.report import draw_one, ranks_markdown
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.codecs import CodecRecord
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.bench.stores.report import stores_markdown
from cacheflow.bench.summary import RunSetting, by_store_markdown, summarise, sweep_caption, sweep_markdown
from cacheflow.errors import ConfigError

README = Path("README.md")
BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
RESTORE, VLLM, RANKS, STORES, CODECS = "restore", "vllm", "ranks", "stores", "codecs"
MARKED_SUITES = (VLLM, RANKS, STORES, CODECS)
"""Suites whose tables have markers of their own; every other suite's goes between ``BEGIN`` and ``END``."""


@dataclass(frozen=True, kw_only=True)
class ReadmeFlags(Flags):
    """The options of ``cacheflow bench readme``."""

    results: Path = option(help="results.jsonl to read", metavar="FILE")
    readme: Path = option(README, "file to fill in", metavar="FILE")
    suite: str = option(RESTORE, "suite to show")
    policies: tuple[str, ...] | None = option(None, "rows of the table (default: all)", metavar="P,P,...")
    num_tokens: int | None = option(None, "prefix length to show (default: the longest)", metavar="N")
    by: str = option("ratio", "what differs between the runs that are shown", choices=("ratio", "store"))
    table: str | None = option(None, "where it goes: between <!-- NAME-results:begin --> and :end (default: by suite)")
    figure: Path | None = option(None, "also draw the study's time over the bound here", metavar="FILE")
    check: bool = option(False, "change nothing; fail if the table is out of date")

    @property
    def command(self) -> str:
        """What makes the table again."""
        words = ["cacheflow bench readme"]
        words += [f"--suite {self.suite}"] if self.suite != RESTORE else []
        words += [f"--policies {','.join(self.policies)}"] if self.policies else []
        words += [f"--num-tokens {self.num_tokens}"] if self.num_tokens is not None else []
        words += [f"--by {self.by}"] if self.by != "ratio" else []
        words += [f"--table {self.table}"] if self.table is not None else []
        words += [f"--results {self.results.as_posix()}"]
        words += [f"--readme {self.readme.as_posix()}"] if self.readme != README else []
        return " ".join(words)


add_arguments = ReadmeFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Fill the table in and draw its picture, or check that the table is up to date.

    Raises:
        ConfigError: A file cannot be read, the markers are missing, or no run fits.
    """
    flags = ReadmeFlags.of(args)
    block = results_block(flags)
    try:
        text = flags.readme.read_text(encoding="utf-8")
        filled = fill(text, block, markers=markers_of(flags.suite, flags.table))
        if flags.check and filled != text:
            raise ConfigError(f"{flags.readme} is out of date: run {flags.command}")
        if filled != text:
            flags.readme.write_text(filled, encoding="utf-8")
        if flags.figure is not None and not flags.check:
            _draw(flags, flags.figure)
    except OSError as error:
        raise ConfigError(f"a file cannot be read or written: {error}") from error
    return 0


def _draw(flags: ReadmeFlags, figure: Path) -> None:
    """Draw every policy of the study, those that the table leaves out included.

    Raises:
        ConfigError: There is no picture of it.
    """
    if flags.suite in (STORES, CODECS) or flags.by == "store":
        raise ConfigError("--figure: stores and codecs have a table alone")
    records = _clean_runs(flags)
    if flags.suite == RANKS:
        draw_one([each for each in records if isinstance(each, RanksRecord)], figure)
        return
    (sweeps,) = studies(summarise(records)).values()
    if flags.suite == VLLM:
        draw_time_bars(sweeps[-1], figure)
    else:
        draw_over_bound(sweeps, figure)


def markers_of(suite: str, table: str | None = None) -> tuple[str, str]:
    """What stands around a table: the one of this name, or of its suite."""
    name = table or (suite if suite in MARKED_SUITES else None)
    if name is None:
        return BEGIN, END
    return f"<!-- {name}-results:begin -->", f"<!-- {name}-results:end -->"


def results_block(flags: ReadmeFlags) -> str:
    """Markdown of one sweep over load/compute ratios or stores, with its caption and the command that made it.

    Takes the unperturbed runs of a suite at one prefix length, with the most new tokens; of suites that have
    a table alone all.

    Raises:
        ConfigError: The file is malformed, no run fits, or the runs that fit are of several settings.
    """
    target = Path(os.path.relpath(flags.results, flags.readme.parent)).as_posix()
    source = f"From [`{flags.results.as_posix()}`]({target}) by `{flags.command}`."
    if flags.suite in (STORES, CODECS):
        return f"{_table_alone(flags)}\n{source}"
    records = _clean_runs(flags)
    if flags.suite == RANKS:
        return f"{ranks_markdown([each for each in records if isinstance(each, RanksRecord)])}\n{source}"
    suffix_tokens = max(record.suffix_tokens for record in records)
    records = [record for record in records if record.suffix_tokens == suffix_tokens]
    summaries = summarise(records)
    in_markdown = sweep_markdown if flags.by == "ratio" else by_store_markdown
    table = in_markdown(summaries, policies=flags.policies)
    return f"{table}\n\n{sweep_caption(summaries, records[-1].environment)}\n{source}"


def _table_alone(flags: ReadmeFlags) -> str:
    try:
        if flags.suite == STORES:
            return stores_markdown(read_records(flags.results, StoreReadRecord))
        return codecs_markdown(read_records(flags.results, CodecRecord))
    except ValueError as error:
        raise ConfigError(f"{flags.results} holds no table of suite {flags.suite!r}: {error}") from None


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


def _clean_runs(flags: ReadmeFlags) -> list[RestoreRecord]:
    """The unperturbed runs of one suite at one prefix length, the longest unless another is asked for."""
    clean = [
        record
        for record in read_records(flags.results, BenchRecord)
        if record.suite == flags.suite and isinstance(record, RestoreRecord) and not record.perturbation
    ]
    num_tokens = flags.num_tokens
    if num_tokens is None:
        num_tokens = max((record.num_tokens for record in clean), default=0)
    kept = [record for record in clean if record.num_tokens == num_tokens]
    if not kept:
        raise ConfigError(f"{flags.results} holds no clean run of suite {flags.suite!r} with {num_tokens} tokens")
    if missing := set(flags.policies or ()) - {record.policy for record in kept}:
        raise ConfigError(f"{flags.results} holds no run of {', '.join(sorted(missing))}: drop it from --policies")
    _require_one_setting(kept, flags.results)
    return kept


def _require_one_setting(records: list[RestoreRecord], results: Path) -> None:
    """All runs must differ in the ratio and the new tokens alone, or one column would hold two studies."""
    shown = ("model", "device", "dtype", "chunk_tokens")
    found = {tuple(getattr(RunSetting.of(record), key) for key in shown) for record in records}
    if len(found) > 1:
        listed = "; ".join(", ".join(map(str, values)) for values in sorted(found))
        raise ConfigError(f"{results} holds several studies ({', '.join(shown)}): {listed}; keep them in files apart")
