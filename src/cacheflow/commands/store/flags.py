"""What every command about a store is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cacheflow.bench.options import Flags, option
from cacheflow.errors import ConfigError
from cacheflow.stores.opening import check_store_url


@dataclass(frozen=True, kw_only=True)
class StoreFlags(Flags):
    """Which store."""

    url: str = option(help="such as file:///var/cache/kv; see docs/stores.md", words="positional", metavar="URL")

    def __post_init__(self) -> None:
        """Check the URL.

        Raises:
            ConfigError: It names no store.
        """
        super().__post_init__()
        check_store_url(self.url)


@dataclass(frozen=True, kw_only=True)
class SomeRecordsFlags(StoreFlags):
    """Which of its records."""

    namespace: tuple[str, ...] = option(
        (), "only these, or those that begin so; cacheflow store stat lists them", metavar="NAME,NAME,...", shown=""
    )

    def __post_init__(self) -> None:
        """Check the namespaces.

        Raises:
            ConfigError: One is no hex.
        """
        super().__post_init__()
        for name in self.namespace:
            if not re.fullmatch(r"[0-9a-f]+", name):
                raise ConfigError(f"--namespace {name!r} must be the beginning of a namespace, small hex digits")
