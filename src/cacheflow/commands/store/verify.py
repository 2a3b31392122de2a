"""``cacheflow store verify``: reads every record and checks it."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

from rich.console import Console

from cacheflow.bench.options import option
from cacheflow.bench.suite import new_progress
from cacheflow.bench.table import size
from cacheflow.commands.store.flags import SomeRecordsFlags
from cacheflow.stores.upkeep import check_record, open_existing, records_of, remove_records
from cacheflow.types import LoadOutcome

EXIT_DAMAGED = 1


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(SomeRecordsFlags):
    """The options of ``store verify``."""

    delete: bool = option(False, "remove the damaged ones")


add_arguments = VerifyFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Check every record against its header; 1 where one is damaged or cannot be read.

    Raises:
        ConfigError, StoreError: There is no such store, or it does not answer.
    """
    flags, console = VerifyFlags.of(args), Console()
    outcomes: Counter[LoadOutcome] = Counter()
    damaged = []
    errors: Counter[str] = Counter()
    with open_existing(flags.url, only_look=True) as store:
        records = records_of(store, flags.namespace)
        with new_progress(console) as progress:
            for each in progress.track(records, description="checking"):
                outcome = check_record(store, each, on_error=lambda why: errors.update([why]))
                outcomes[outcome] += 1
                if outcome is LoadOutcome.CORRUPT:
                    damaged.append(each)
                    console.print(f"damaged: {each.name}", markup=False, soft_wrap=True)
        freed_bytes = remove_records(store, damaged) if flags.delete else 0
    console.print(
        f"{outcomes[LoadOutcome.OK]} records are whole, {len(damaged)} damaged, {outcomes[LoadOutcome.ERROR]} could "
        f"not be read, {outcomes[LoadOutcome.MISS]} went meanwhile",
        soft_wrap=True,
    )
    for why, count in errors.most_common():
        console.print(f"{count} could not be read: {why}", markup=False, soft_wrap=True)
    if freed_bytes:
        console.print(f"removed the damaged ones, {size(freed_bytes)}")
    elif damaged:
        console.print("--delete removes the damaged ones; each counts as absent", soft_wrap=True)
    return EXIT_DAMAGED if damaged or outcomes[LoadOutcome.ERROR] else 0
