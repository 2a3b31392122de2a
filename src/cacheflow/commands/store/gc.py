"""``cacheflow store gc``: frees space in a store."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from rich.console import Console

from cacheflow import durations, sizes
from cacheflow.bench.options import option
from cacheflow.bench.table import size
from cacheflow.commands.store.flags import SomeRecordsFlags
from cacheflow.errors import ConfigError
from cacheflow.stores.upkeep import garbage, open_existing, records_of, remove_records


@dataclass(frozen=True, kw_only=True)
class GcFlags(SomeRecordsFlags):
    """The options of ``store gc``."""

    older_than: str | None = option(None, "what was not used for so long, such as 12h or 7d", metavar="TIME")
    max_bytes: str | None = option(
        None, "the least recently used beyond so much, such as 500MB or 10GB", metavar="SIZE"
    )
    dry_run: bool = option(False, "say what would go, and leave it")

    def __post_init__(self) -> None:
        """Check that something says what goes.

        Raises:
            ConfigError: Nothing does, or a value is wrong.
        """
        super().__post_init__()
        if self.older_than is None and self.max_bytes is None and not self.namespace:
            raise ConfigError(
                "what is to go? give --older-than, --max-bytes or --namespace; `cacheflow store clear` removes all"
            )
        if self.older_than is not None and durations.seconds_of(self.older_than) is None:
            raise ConfigError(f"--older-than {self.older_than!r} {durations.MUST_BE}")
        if self.max_bytes is not None and sizes.bytes_of(self.max_bytes) is None:
            raise ConfigError(f"--max-bytes {self.max_bytes!r} {sizes.MUST_BE}; `cacheflow store clear` removes all")


add_arguments = GcFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Remove what the options say and print how much that was.

    Raises:
        ConfigError, StoreError: There is no such store, or it does not answer.
    """
    flags, console = GcFlags.of(args), Console()
    with open_existing(flags.url, only_look=True) as store:
        records = records_of(store, flags.namespace)
        chosen = garbage(
            records,
            now_s=time.time(),
            older_than_s=None if flags.older_than is None else durations.seconds_of(flags.older_than),
            max_bytes=None if flags.max_bytes is None else sizes.bytes_of(flags.max_bytes),
        )
        if not flags.dry_run:
            remove_records(store, chosen)
    chosen_bytes = sum(each.num_bytes for each in chosen)
    left_bytes = sum(each.num_bytes for each in records) - chosen_bytes
    console.print(
        f"{'would remove' if flags.dry_run else 'removed'} {len(chosen)} of {len(records)} objects, "
        f"{size(chosen_bytes)}; {size(left_bytes)} left{' of these namespaces' if flags.namespace else ''}",
        soft_wrap=True,
    )
    return 0
