"""``cacheflow store bench``: a store's latency and bandwidth, by the size of its objects, through its codec."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console

from cacheflow.bench.options import DTYPES, option
from cacheflow.bench.table import Row, seconds, size, text_table
from cacheflow.commands.store.flags import StoreFlags
from cacheflow.stores.opening import open_store
from cacheflow.stores.probe import measure_link, stored_share
from cacheflow.stores.shared import UNBOUNDED


@dataclass(frozen=True, kw_only=True)
class BenchFlags(StoreFlags):
    """The options of ``store bench``."""

    mib: tuple[float, ...] = option((1.0, 4.0, 16.0), "sizes of objects, in MiB", metavar="N,N,...", above=0)
    objects: int = option(32, "objects of each size", metavar="N", at_least=1)
    rounds: int = option(3, "times they are read; the best counts", metavar="N", at_least=1)
    dtype: str = option("bfloat16", "of the keys and values that they look like to a codec", choices=DTYPES)


add_arguments = BenchFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Write probes, read them back with as many reads under way as a restoration has, remove them; print a table.

    Raises:
        ConfigError, StoreError: There is no such store, or it does not answer.
    """
    flags, console = BenchFlags.of(args), Console()
    rows: list[Row] = []
    with open_store(flags.url, capacity_bytes=UNBOUNDED, only_look=True) as store:
        for mib in flags.mib:
            num_bytes = max(1, int(mib * (1 << 20)))
            share = stored_share(store, object_bytes=num_bytes, dtype=flags.dtype)
            link = measure_link(
                store, object_bytes=num_bytes, num_objects=flags.objects, rounds=flags.rounds, dtype=flags.dtype
            )
            cells = (f"{mib:g} MiB", f"{share:.0%}", f"{size(link.bytes_per_s)}/s", seconds(link.latency_s))
            rows.append((cells, None))
    console.print(text_table(flags.url, ("objects of", "stored", "read", "latency of 4 KiB"), rows, padding=1))
    return 0
