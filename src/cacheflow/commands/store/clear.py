"""``cacheflow store clear``: removes everything a store holds."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console

from cacheflow.bench.options import option
from cacheflow.bench.table import size
from cacheflow.commands.store.flags import StoreFlags
from cacheflow.errors import ConfigError
from cacheflow.stores.upkeep import open_existing, records_of, remove_records


@dataclass(frozen=True, kw_only=True)
class ClearFlags(StoreFlags):
    """The options of ``store clear``."""

    yes: bool = option(False, "really")


add_arguments = ClearFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Remove every record, whoever wrote it; what serves from the store meanwhile recomputes.

    Raises:
        ConfigError: Without ``--yes``, or there is no such store.
        StoreError: It does not answer.
    """
    flags, console = ClearFlags.of(args), Console()
    with open_existing(flags.url, only_look=not flags.yes) as store:
        records = records_of(store)
        held = f"{len(records)} objects, {size(sum(each.num_bytes for each in records))}"
        if not flags.yes:
            raise ConfigError(f"{flags.url} holds {held}: give --yes to remove them all")
        remove_records(store, records)
    console.print(f"removed {held}", soft_wrap=True)
    return 0
