"""``cacheflow store bench``: a store's latency and bandwidth, by the size of its objects, through its codec."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console

from cacheflow.bench.options import DTYPES, option
from cacheflow.bench.table import Row, seconds, size, text_table
from cacheflow.commands.store.flags import StoreFlags
from cacheflow.errors import StoreError
from cacheflow.stores.base import Store
from cacheflow.stores.opening import open_store
from cacheflow.stores.probe import measure_link, stored_share
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.shared import UNBOUNDED, SharedStore


@dataclass(frozen=True, kw_only=True)
class BenchFlags(StoreFlags):
    """The options of ``store bench``."""

    mib: tuple[float, ...] = option((1.0, 4.0, 16.0), "sizes of objects, in MiB", metavar="N,N,...", above=0)
    objects: int = option(32, "objects of each size", metavar="N", at_least=1)
    rounds: int = option(3, "times they are read; the best counts", metavar="N", at_least=1)
    dtype: str = option("bfloat16", "of the keys and values that they look like to a codec", choices=DTYPES)


add_arguments = BenchFlags.add_flags


def _require_room(store: Store, num_bytes: int) -> None:
    """Pass if probes of so many bytes throw nothing out of a store that others use.

    Raises:
        StoreError: They do not fit, or the store does not answer.
    """
    if not isinstance(store, SharedStore):
        return
    try:
        free_bytes = store.free_bytes()
    except OSError as error:
        raise StoreError(f"{store}: {error.strerror or error}") from error
    if num_bytes > free_bytes:
        raise StoreError(
            f"{store}: the probes need {size(num_bytes)}, {size(free_bytes)} are free, and nothing is thrown out for "
            "them: take fewer (--objects) or smaller ones (--mib)"
        )


def run(args: argparse.Namespace) -> int:
    """Write probes, read them back with as many reads under way as a restoration has, remove them; print a table.

    Raises:
        ConfigError, StoreError: There is no such store, or it does not answer.
    """
    flags, console = BenchFlags.of(args), Console()
    rows: list[Row] = []
    with open_store(flags.url, capacity_bytes=UNBOUNDED, only_look=True) as store:
        _require_room(store, (flags.objects + 1) * (int(max(flags.mib) * (1 << 20)) + 2 * HEADER_BYTES))
        for mib in flags.mib:
            num_bytes = max(1, int(mib * (1 << 20)))
            share = stored_share(store, object_bytes=num_bytes, dtype=flags.dtype)
            link = measure_link(
                store, object_bytes=num_bytes, num_objects=flags.objects, rounds=flags.rounds, dtype=flags.dtype
            )
            cells = (f"{mib:g} MiB", f"{share:.0%}", f"{size(link.bytes_per_s)}/s", seconds(link.latency_s))
            rows.append((cells, None))
        num_evicted = store.stats().num_evicted
    if num_evicted:
        console.print(f"{num_evicted} objects of the store went to make room for the probes", soft_wrap=True)
    console.print(text_table(flags.url, ("objects of", "stored", "read", "latency of 4 KiB"), rows, padding=1))
    return 0
