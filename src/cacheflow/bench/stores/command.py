"""``cacheflow bench stores``: what stores deliver, beside the best other way to the same bytes, checked run by run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cacheflow.bench.environment import environment
from cacheflow.bench.options import Flags, option
from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.stores.report import stores_tables
from cacheflow.bench.stores.study import StoreRound, StoreStudy, open_store_study
from cacheflow.bench.suite import OnRun, Suite, SuiteRun, new_progress
from cacheflow.errors import ConfigError
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.shared import UNBOUNDED

MIB = 1 << 20
CLIENTS = ("xxhash", "redis", "hiredis", "obstore")
"""Packages whose versions decide what is measured."""


@dataclass(frozen=True, kw_only=True)
class StoresFlags(Flags):
    """The options of ``bench stores``."""

    out: Path = option(help="folder for results.jsonl", metavar="DIR")
    store: tuple[str, ...] = option(
        help="memory, or the URL of a store; given several times, each is measured by itself", words="repeated",
        metavar="URL",
    )  # fmt: skip
    mib: tuple[float, ...] = option((1.0, 4.0, 16.0), "sizes of objects, in MiB", metavar="N,N,...", above=0)
    total_mib: float = option(128.0, "all objects of one size together, in MiB", metavar="N", above=0, finite=True)
    reads: int = option(3, "reads in flight", metavar="N", at_least=1)
    seconds: float = option(0.5, "length of a turn", metavar="S", above=0, finite=True)
    repeats: int = option(5, "alternations", metavar="N", at_least=1)
    gbps: float = option(
        10.0, "link over which reads are timed with and without verification, in gigabits per second", metavar="G",
        above=0, finite=True,
    )  # fmt: skip
    time_limit_s: float | None = option(
        None, "stop after this long; the same command goes on where it stopped", metavar="S", above=0
    )

    def __post_init__(self) -> None:
        """Check each value, and each URL.

        Raises:
            ConfigError: Names the option; a store has a codec; or two stores would be one on record.
        """
        super().__post_init__()
        urls = [url for each in self.store for url in check_store_url(each)]
        if any(url.codec is not None for url in urls):
            raise ConfigError("--store: leave codec out: objects are random bytes here, which no codec makes shorter")
        schemes = [url.scheme for url in urls]
        for scheme in schemes:
            if schemes.count(scheme) > 1:
                raise ConfigError(f"--store: two are of {scheme}, which is all that a record says: give each its --out")

    @property
    def link_bytes_per_s(self) -> float:
        """Of the link before the store."""
        return self.gbps * 1e9 / 8

    def num_objects(self, object_bytes: int) -> int:
        """How many of a size there are."""
        return max(self.reads, int(self.total_mib * MIB / object_bytes))


add_arguments = StoresFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Measure each store, taking up an earlier run in the same folder; prints the tables.

    Raises:
        ConfigError, StoreError: There is no such store, or it does not answer.
    """
    flags = StoresFlags.of(args)
    suite = Suite(
        out=flags.out, kind=StoreReadRecord, show=stores_tables, time_limit_s=flags.time_limit_s, resumes=True
    )
    return suite.run(partial(_work, flags))


def _work(flags: StoresFlags, suite: SuiteRun[StoreReadRecord]) -> bool:
    named = {**environment(), **{name: _version(name) for name in CLIENTS}}
    return all([_measure(flags, url, suite, named) for url in flags.store])  # noqa: C419 -- every store


def _measure(flags: StoresFlags, url: str, suite: SuiteRun[StoreReadRecord], named: Environment) -> bool:
    """Measure one store with objects of every size; False when the time limit ended it."""
    (parsed,) = check_store_url(url)
    with open_store(url, capacity_bytes=UNBOUNDED, only_look=True) as store:
        for mib in flags.mib:
            if suite.is_over:
                return False
            object_bytes = max(1, int(mib * MIB))
            with open_store_study(
                store,
                parsed,
                object_bytes=object_bytes,
                num_objects=flags.num_objects(object_bytes),
                num_reads=flags.reads,
                link_bytes_per_s=flags.link_bytes_per_s,
            ) as study:
                if not _alternate(flags, study, suite, named):
                    return False
    return True


def _alternate(flags: StoresFlags, study: StoreStudy, suite: SuiteRun[StoreReadRecord], named: Environment) -> bool:
    """Let the ways of one study take turns; False when the time limit ended it."""
    every = map(study.round, range(flags.repeats))
    rounds = [each for each in every if not is_done(study, each, suite.done)]
    what = f"{study.url.scheme}, {study.objects.num_bytes / MIB:g} MiB"

    def measure(round_: StoreRound, on_run: OnRun) -> Iterator[StoreReadRecord]:
        return study.run(round_, seconds=flags.seconds, environment=named, on_run=on_run)

    with new_progress(suite.console) as progress:
        return suite.run_rounds(progress, rounds, measure, lambda round_: what)


def is_done(study: StoreStudy, round_: StoreRound, records: Sequence[StoreReadRecord]) -> bool:
    """Whether a results file already holds every turn of a round."""
    wanted = {(each.name, each.link_bytes_per_s, each.way.num_reads) for each in study.contenders}
    same = (study.url.scheme, study.objects.num_bytes, len(study.objects), round_.repeat)
    return wanted <= {
        (each.way, each.link_bytes_per_s, each.reads_in_flight)
        for each in records
        if (each.store, each.object_bytes, each.num_objects, each.repeat) == same
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
