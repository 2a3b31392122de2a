"""Opens a store by its URL (``stores.url``); the one place that knows which scheme is which store.

Several URLs, the fastest store first, are tiers of one store (``stores.tiered``).

Other packages add schemes as entry points of the group ``cacheflow.stores``: the name is the scheme, the value a
``StoreOpener``. See docs/stores.md.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores import lmcache_url
from cacheflow.stores.base import Store
from cacheflow.stores.codec import Codec
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import VERIFIED_SHARE, MemoryStore
from cacheflow.stores.retention import DEFAULT_RETENTION, Retention
from cacheflow.stores.shm import SharedMemoryStore
from cacheflow.stores.threaded import ThreadedStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.stores.url import FORMS, StoreUrl

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "cacheflow.stores"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_DATABASE = re.compile(r"[0-9]{1,9}")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Variables that name a server of buckets which is not Amazon's."""
_PORTS = {"redis": 6379, "rediss": 6379, "mooncake": 50051}
"""Of those stores whose URL names a server, where it says none."""
_LOOKED_AT = ("file", "shm")
"""Stores that can be read without a trace; the others' media note each read, or none."""


class StoreOpener(Protocol):
    """Checks the URLs of one scheme, and says how each is opened."""

    def __call__(self, url: StoreUrl) -> Callable[..., Store]:
        """Check a URL; touches no disk and no network.

        Args:
            url: Its scheme is this opener's; the rest has not been checked.

        Returns:
            What opens the store, with ``capacity_bytes`` and ``retention`` (a ``stores.retention.Retention``) by
            keyword; raises ``StoreError`` where it cannot be reached or used.

        Raises:
            ConfigError: The URL names no such store, or a package is missing: says which extra brings it.
        """
        ...


def open_store(
    urls: str | Sequence[str],
    *,
    capacity_bytes: int,
    retention: Retention = DEFAULT_RETENTION,
    only_look: bool = False,
) -> Store:
    """Open the store that a URL names, or the tiers that several name, the fastest first; the caller closes it.

    Args:
        urls: See ``stores.url``.
        capacity_bytes: Bound on the records held, headers (4,096 bytes each) included, of each store whose URL has no
            ``capacity`` of its own.
        retention: What goes first, and what goes by itself; the same in every tier.
        only_look: Not to serve from it, so that it stays as it was: closing it leaves a store that was there, no
            ``capacity`` of a URL throws anything out, and reading a file does not count as its use.

    Raises:
        ConfigError: A URL is wrong, its scheme unknown, or a package is missing.
        StoreError: A store cannot be reached or used.
    """
    parsed = check_store_url(urls)
    stores: dict[str, Store] = {}
    try:
        for url in parsed:
            own_bytes = url.capacity_bytes(capacity_bytes)
            capacity = capacity_bytes if only_look else own_bytes
            stores[url.address] = _open(url, capacity_bytes=capacity, retention=retention, only_look=only_look)
    except BaseException:
        for store in stores.values():
            store.close()
        raise
    return TieredStore(stores) if len(stores) > 1 else next(iter(stores.values()))


def _open(url: StoreUrl, *, capacity_bytes: int, retention: Retention, only_look: bool) -> Store:
    looking = {"only_look": True} if only_look and url.scheme in _LOOKED_AT else {}
    store = opener_of(url.scheme)(url)(capacity_bytes=capacity_bytes, retention=retention, **looking)
    if not isinstance(store, Store):
        raise StoreError(f"store {url}: the opener of {url.scheme} returned {store!r}, which is no Store")
    if (codec := url.codec) is not None:
        try:
            _encode(store, codec, url)
        except BaseException:
            store.close()
            raise
    return store


def _encode(store: Store, codec: Codec, url: StoreUrl) -> None:
    """Have a store encode what is written to it, and say what that means."""
    if not isinstance(store, ThreadedStore):
        raise StoreError(f"store {url}: a {url.scheme} store has no codecs (it is no ThreadedStore)")
    store.encode_with(codec)
    if codec.lossy:
        logger.info(
            "%s: keys and values are stored in 8 bits each (codec %s): what is restored is near what was computed, not "
            "equal to it, and tokens may differ. It is kept apart from exact KV", store, codec.name,
        )  # fmt: skip
    else:
        logger.info("%s: records are stored shorter (codec %s), and read back bit for bit", store, codec.name)


def check_store_url(urls: str | Sequence[str]) -> tuple[StoreUrl, ...]:
    """Pass if a URL can name a store, or several the tiers of one; touches no disk and no network.

    Returns:
        Each URL, taken apart.

    Raises:
        ConfigError: See ``open_store``; there is none, two are of the same store, or one has a lossy codec that not all
            have.
    """
    parsed = tuple(map(StoreUrl.parse, [urls] if isinstance(urls, str) else urls))
    if not parsed:
        raise ConfigError(f"store: no URL was given, must be at least one: {FORMS}")
    for number, url in enumerate(parsed):
        opener_of(url.scheme)(url)
        url.capacity_bytes(1)
        _ = url.codec  # check it
        for other in parsed[:number]:
            if _place(other) == _place(url):
                raise ConfigError(f"store: '{other}' and '{url}' are one store; each tier must be a store of its own")
            if other.address == url.address:  # tiers go by it
                raise ConfigError(
                    f"store: two tiers are shown as {url.address}, since what is before an @ may be a secret; write %40"
                )
    lossy = [codec.name if (codec := url.codec) is not None and codec.lossy else "" for url in parsed]
    if len(set(lossy)) > 1:
        named = ", ".join(f"{url.address} {name or 'none'}" for url, name in zip(parsed, lossy, strict=True))
        raise ConfigError(
            f"store: tiers must have the same lossy codec or none, these have {named}: give all of them it"
        )
    return parsed


def _place(url: StoreUrl) -> tuple[object, ...]:
    """What tells a store from another, as far as its URL shows: options, after the ``?``, do not.

    URLs of other packages' schemes are compared as they are written.
    """
    if url.scheme in _PORTS:
        database = 0 if url.scheme == "mooncake" else _database(url)
        return url.scheme, url.host.lower(), _port(url), database
    if url.scheme == "file":  # no .. is taken away: what is before it may be a link
        return url.scheme, url.host, *(part for part in url.path.split("/") if part not in ("", "."))
    if url.scheme in ("s3", "shm"):
        return url.scheme, url.host, url.path.strip("/")
    return url.scheme, url.settings or url.text.partition("?")[0]


def _port(url: StoreUrl) -> int:
    """The port of the server that a URL of ``_PORTS`` names."""
    return _PORTS[url.scheme] if url.port is None else url.port


def _check_host(url: StoreUrl) -> None:
    """Pass if the host can be looked up: sockets raise no ``OSError`` for one that cannot."""
    try:
        url.host.encode("idna")
    except UnicodeError as error:
        raise ConfigError(f"store is '{url}', whose host is no name of a server: {error}") from None


def _database(url: StoreUrl) -> int:
    """The database of a Redis server that a URL names.

    Raises:
        ConfigError: That is no number, or there is no server.
    """
    database = url.path.strip("/") or "0"
    if not url.host or not _DATABASE.fullmatch(database):
        raise ConfigError(f"store is '{url}', must be {url.scheme}://host:6379/0, the last a database's number")
    return int(database)


def _memory(url: StoreUrl) -> Callable[..., Store]:
    if url.address != "memory":
        raise ConfigError(f"store is '{url}': the memory store has no address, give memory")
    url.require_options("verify")
    return partial(MemoryStore, verified_share=url.share("verify", VERIFIED_SHARE))


def _file(url: StoreUrl) -> Callable[..., Store]:
    url.require_options("fsync")
    if url.host or url.path in ("", "/"):
        raise ConfigError(f"store is '{url}', must be file:///absolute/folder, with three slashes")
    # No fsync unless asked for: a torn record is a counted miss, and a save must not wait for the disk.
    return partial(FileStore, Path(url.path), fsync=url.flag("fsync"))


def _shm(url: StoreUrl) -> Callable[..., Store]:
    url.require_options("keep")
    if not _NAME.fullmatch(url.host) or url.path not in ("", "/") or url.port is not None:
        raise ConfigError(f"store is '{url}', must be shm://name, of small letters, digits, - and _")
    return partial(SharedMemoryStore, url.host, keep=url.flag("keep"))


def _redis(url: StoreUrl) -> Callable[..., Store]:
    tls = url.scheme == "rediss"
    files = ("ca_certs", "certfile", "keyfile")
    url.require_options("timeout_s", *(files if tls else ()))
    timeout_s = url.seconds("timeout_s", 2.0)
    database = _database(url)
    _check_host(url)
    for name in files:
        if name in url.options and not Path(url.options[name]).is_file():
            raise ConfigError(f"store: {name} is {url.options[name]!r}, which is no file")
    if "keyfile" in url.options and "certfile" not in url.options:
        raise ConfigError("store: keyfile is the key of a certificate: give its certfile too")
    _require_package("redis", extra="redis", url=url)
    from cacheflow.stores.redis import RedisServer, RedisStore

    server = RedisServer(
        host=url.host,
        port=_port(url),
        database=database,
        username=url.username,
        password=_password("CACHEFLOW_REDIS_PASSWORD"),
        tls=tls,
        timeout_s=timeout_s,
        **{name: url.options[name] for name in files if name in url.options},
    )
    return partial(RedisStore, server)


def _password(variable: str) -> str | None:
    """A password of the environment, or of the file that ``<variable>_FILE`` names, whose end of line does not count.

    Raises:
        ConfigError: It is no UTF-8 text, the file cannot be read or holds nothing, or both are given.
    """
    password, file = os.environ.get(variable), os.environ.get(f"{variable}_FILE")
    if file is None:
        try:
            _ = (password or "").encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{variable} is no UTF-8 text") from None
        return password
    named = f"{variable}_FILE is {file!r}"
    if password is not None:
        raise ConfigError(f"{named}, and {variable} is set too: take one of them out")
    try:
        text = Path(file).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(f"{named}, which cannot be read: {error.strerror or error}") from None
    except ValueError:  # it holds no UTF-8, which the error would quote, or a zero byte is in its name
        raise ConfigError(f"{named}, must be a file of UTF-8 text") from None
    if not text:
        raise ConfigError(f"{named}, which holds no password")
    return text


def _s3(url: StoreUrl) -> Callable[..., Store]:
    url.require_options("endpoint", "region", "timeout_s")
    timeout_s = url.seconds("timeout_s", 10.0)
    if not url.host or url.port is not None or url.username is not None:
        raise ConfigError(
            "store: must be s3://bucket/prefix; credentials come from the environment (AWS_ACCESS_KEY_ID)"
        )
    prefix = url.path.strip("/")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        raise ConfigError(f"store is '{url}': between two / of a prefix must be a name, and not . or ..")
    endpoint = url.options.get("endpoint")
    for name, value in (("endpoint", endpoint), *((each, os.environ.get(each)) for each in _ENDPOINTS)):
        if value and not _is_endpoint(value):  # not shown: it may hold a password
            raise ConfigError(f"store: {name} must be http://host:port or https://host:port, without user and password")
    _require_package("obstore", extra="s3", url=url)
    from cacheflow.stores.s3 import Bucket, BucketStore

    bucket = Bucket(
        name=url.host,
        prefix=prefix,
        endpoint=endpoint,
        region=url.options.get("region"),
        timeout_s=timeout_s,
    )
    return partial(BucketStore, bucket)


def _mooncake(url: StoreUrl) -> Callable[..., Store]:
    url.require_options("segment", "protocol", "device", "host", "metrics", "timeout_s")
    if not url.host or url.username is not None or url.path not in ("", "/"):
        raise ConfigError(f"store is '{url}', must be mooncake://host:50051, where mooncake_master listens")
    _check_host(url)
    protocol = url.options.get("protocol", "tcp")
    if protocol not in ("tcp", "rdma"):
        raise ConfigError(f"store: protocol is {protocol!r}, must be tcp or rdma")
    segment_bytes = url.size("segment", 0)
    metrics_port = url.port_number("metrics", 9003)
    timeout_s = url.seconds("timeout_s", 10.0)
    _require_package("mooncake", extra="mooncake", url=url)
    try:
        from cacheflow.stores.mooncake import MooncakePool, MooncakeStore
    except ImportError as error:  # of a library of the system
        raise ConfigError(
            f"store {url.scheme}:// needs the package mooncake, which cannot be loaded: {error}; "
            "on Debian libibverbs.so.1 comes with apt-get install libibverbs1"
        ) from None

    pool = MooncakePool(
        host=url.host,
        port=_port(url),
        metrics_port=metrics_port,
        segment_bytes=segment_bytes,
        protocol=protocol,
        device=url.options.get("device", ""),
        local_host=url.options.get("host"),
        timeout_s=timeout_s,
    )
    return partial(MooncakeStore, pool)


def _lmcache(url: StoreUrl) -> Callable[..., Store]:
    url.require_options("timeout_s")
    timeout_s = url.seconds("timeout_s", 10.0)
    settings = lmcache_url.with_secrets(url.settings)
    _require_package("lmcache", extra="lmcache", url=url)
    from cacheflow.stores.lmcache import LmcacheStore
    from cacheflow.stores.lmcache_adapter import AdapterSource

    try:
        source = AdapterSource.of(settings, timeout_s=timeout_s)
    except Exception as error:  # noqa: BLE001 - somebody else's module
        said = lmcache_url.cleared(str(error))
        raise ConfigError(f"store: LMCache refuses its configuration {url.settings['type']!r}: {said}") from None
    return partial(LmcacheStore, source)


def _is_endpoint(text: str) -> bool:
    """Whether it is the URL of a server, without user and password."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in text


_OPENERS: Mapping[str, StoreOpener] = {
    "memory": _memory,
    "file": _file,
    "shm": _shm,
    "redis": _redis,
    "rediss": _redis,
    "s3": _s3,
    "mooncake": _mooncake,
    "lmcache": _lmcache,
}


def _require_package(package: str, *, extra: str, url: StoreUrl) -> None:
    if find_spec(package) is None:
        raise ConfigError(
            f"store {url.scheme}:// needs the package {package}, which is not installed: "
            f"pip install 'cacheflow-kv[{extra}]'"
        )


def opener_of(scheme: str) -> StoreOpener:
    """What opens the stores of a scheme.

    Raises:
        ConfigError: There is no such scheme, or the package that adds it cannot be loaded.
    """
    if scheme in _OPENERS:
        return _OPENERS[scheme]
    found = {each.name: each for each in entry_points(group=ENTRY_POINT_GROUP)}
    if scheme not in found:
        others = f", and {', '.join(sorted(found))} of other packages" if found else ""
        raise ConfigError(f"store: no store is called {scheme!r}; known are {FORMS}{others}")
    return _load(found[scheme])


def _load(entry: EntryPoint) -> StoreOpener:
    try:
        opener: StoreOpener = entry.load()
    except Exception as error:  # somebody else's module
        raise ConfigError(
            f"store: {entry.value}, which opens {entry.name} stores, cannot be loaded: {error}"
        ) from error
    return opener
