"""``cacheflow store stat``: what a store holds, by namespace."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass

from cacheflow import durations
from cacheflow.bench.options import option
from cacheflow.bench.table import Row, print_whole, size, text_table
from cacheflow.commands.store.flags import SomeRecordsFlags
from cacheflow.stores.identity_record import read_identities
from cacheflow.stores.keys import identity_key
from cacheflow.stores.opening import check_store_url
from cacheflow.stores.probe import PROBES
from cacheflow.stores.shared import FoundRecord
from cacheflow.stores.upkeep import lives_of, open_existing, records_of, space_of

IDENTITY_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class StatFlags(SomeRecordsFlags):
    """The options of ``store stat``."""

    more: tuple[str, ...] = option((), "of further tiers", words="positionals", metavar="URL", shown="")

    def __post_init__(self) -> None:
        """Check every URL.

        Raises:
            ConfigError: One names no store, or two the same.
        """
        super().__post_init__()
        check_store_url((self.url, *self.more))


add_arguments = StatFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Print a table for each store: objects, bytes and last use of each namespace, what is kept or goes by itself.

    Raises:
        ConfigError, StoreError: There is no such store, or it does not answer.
    """
    flags = StatFlags.of(args)
    for url in (flags.url, *flags.more):
        _print(url, flags)
    return 0


def _print(url: str, flags: StatFlags) -> None:
    """Print a table: objects, bytes and last use of each namespace, and what it stands for."""
    spaces: defaultdict[str, list[FoundRecord]] = defaultdict(list)
    with open_existing(url, only_look=True) as store:
        records = records_of(store, flags.namespace)
        for each in records:
            spaces[space_of(each)].append(each)
        identities = read_identities(store, spaces, timeout_s=IDENTITY_TIMEOUT_S)
        lives_s = lives_of(store, records)
    now_s = time.time()
    rows: list[Row] = []
    for space, held in sorted(spaces.items()):
        # An identity's use is that somebody looked or started an engine.
        used_s = [each.used_s for each in held if each.name != identity_key(space).name] or [held[0].used_s]
        ages = (durations.text_of(now_s - max(used_s)), durations.text_of(now_s - min(used_s)))
        parts = identities.get(space, {})
        stands_for = " ".join(
            f"{name}={parts[name][:16]}" for name in ("dtype", "chunk_tokens", "codec") if name in parts
        )
        if space == PROBES:
            stands_for = "probes of a measurement"
        kept = sum(at_s > now_s for at_s in used_s)
        left_s = [lives_s[each.name] for each in held if each.name in lives_s]
        goes = durations.text_of(min(left_s)) if left_s else ""
        num_bytes = size(sum(each.num_bytes for each in held))
        rows.append(((space, str(len(held)), num_bytes, *ages, str(kept or ""), goes, stands_for), None))
    heads = ("namespace", "objects", "bytes", "last used, ago", "oldest, ago", "kept", "first goes in", "stands for")
    total = ("all", str(len(records)), size(sum(each.num_bytes for each in records)), "", "", "", "", "")
    print_whole(text_table(url, heads, rows, last=total, padding=1))
