"""A store's URL, taken apart: which store, where, and with which options.

::

    memory                              this process's memory; ?verify=always
    file:///var/cache/kv                a directory; ?fsync=yes flushes each record to the disk
    shm://name                          memory that all processes of a host share; ?keep=yes leaves it behind
    redis://host:6379/0                 a Redis or Valkey server; ?timeout_s=2
    rediss://host:6379/0                the same over TLS; ?ca_certs=FILE&certfile=FILE&keyfile=FILE
    s3://bucket/prefix                  a bucket; ?endpoint=URL&region=NAME&timeout_s=10
    mooncake://master:50051             a Mooncake pool; ?segment=4GiB&protocol=tcp&metrics=9003&timeout_s=10
    lmcache:{"type": "fs_native", ...}  an L2 adapter of LMCache, by LMCache's own configuration; ?timeout_s=10

All of them take ``?capacity=4GiB``, a bound of their own instead of the one given for all, and ``?codec=zstd`` (or
``fp8``, ``int8``), by which what is written gets shorter. Which scheme is which store is for ``stores.opening``.

A URL holds no secret, so that it may be printed and logged; one that does is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from cacheflow.errors import ConfigError
from cacheflow.sizes import MUST_BE, bytes_of
from cacheflow.stores import lmcache_url
from cacheflow.stores.codec import Codec
from cacheflow.stores.codecs import codec_named

FORMS = (
    "memory, file:///folder, shm://name, redis://host:port/0, rediss://host:port/0, s3://bucket/prefix, "
    "mooncake://host:50051, lmcache:{...}"
)
"""What the URLs of our own stores look like, for messages."""
CAPACITY, CODEC = "capacity", "codec"
"""The options that every store takes."""
_PORT = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUrl:
    """A store's URL, taken apart.

    Attributes:
        text: As it was given.
        scheme: Which store, such as ``file``.
        host: Between ``//`` and the path, without user and port, as it is written; empty where there is none.
        port: None where there is none.
        username: None where there is none.
        path: With its leading ``/``, unquoted; empty where there is none.
        options: What stands after ``?``, by name.
        settings: LMCache's configuration of an adapter; empty for all other stores.
    """

    text: str
    scheme: str
    host: str = ""
    port: int | None = None
    username: str | None = None
    path: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The URL, for messages; see ``shown_url``."""
        return shown_url(self.text)

    @classmethod
    def parse(cls, text: str) -> StoreUrl:
        """Take a URL apart; whether its scheme is known is for ``stores.opening``.

        Raises:
            ConfigError: It is no URL, holds a password, or repeats an option.
        """
        if text.partition("?")[0] == "memory":
            return cls(text=text, scheme="memory", options=_options(urlsplit(text)))
        if text.startswith(f"{lmcache_url.SCHEME}:"):
            settings, query = lmcache_url.split_url(text)
            options = _options(SplitResult("", "", "", query, ""))
            return cls(text=text, scheme=lmcache_url.SCHEME, options=options, settings=settings)
        try:
            parts = urlsplit(text)
            port, password = parts.port, parts.password
        except ValueError as error:
            # What it says quotes the URL, and may quote a password with a / or # in it.
            why = "" if "@" in text else f" ({error})"
            raise ConfigError(f"store is {shown_url(text)!r}, which is not a URL{why}: give {FORMS}") from None
        if password is not None:
            raise ConfigError(
                "store: the URL holds a password, and URLs are printed and logged: take it out and set the environment "
                "variable that docs/stores.md names"
            )
        if not parts.scheme or "://" not in text:
            raise ConfigError(f"store is {shown_url(text)!r}, must be a URL: {FORMS}")
        return cls(
            text=text,
            scheme=parts.scheme,
            host=unquote(_host(parts)),
            port=port,
            username=None if parts.username is None else unquote(parts.username),
            path=_path(parts.path),
            options=_options(parts),
        )

    @property
    def address(self) -> str:
        """The URL without options, for messages and as a tier's name."""
        if self.settings:
            return shown_url(f"{self.scheme}:{json.dumps(self.settings, sort_keys=True)}")
        return shown_url(self.text.partition("?")[0])

    def require_options(self, *known: str) -> None:
        """Pass if it has no other options than these, ``capacity`` and ``codec``.

        Raises:
            ConfigError: It has; names them, and those that are known.
        """
        unknown = sorted(set(self.options) - {*known, CAPACITY, CODEC})
        if unknown:
            allowed = ", ".join((*known, CAPACITY, CODEC))
            raise ConfigError(f"store: unknown option {', '.join(unknown)} of a {self.scheme} store; known: {allowed}")

    def flag(self, name: str) -> bool:
        """An option that is ``yes`` or ``no``, which it is where it is not given.

        Raises:
            ConfigError: It is something else.
        """
        value = self.options.get(name, "no")
        if value not in ("yes", "no"):
            raise ConfigError(f"store: {name} is {value!r}, must be yes or no")
        return value == "yes"

    def capacity_bytes(self, default: int) -> int:
        """The option ``capacity``: a bound on the records of this store, ``4GiB``, ``500MB`` or in bytes.

        Raises:
            ConfigError: It is no size of at least a byte.
        """
        return self.size(CAPACITY, default)

    def size(self, name: str, default: int) -> int:
        """An option in bytes, ``4GiB``, ``500MB`` or a number.

        Raises:
            ConfigError: It is no size of at least a byte.
        """
        text = self.options.get(name)
        if text is None:
            return default
        size = bytes_of(text)
        if size is None:
            raise ConfigError(f"store: {name} is {text!r}, {MUST_BE}")
        return size

    @property
    def codec(self) -> Codec | None:
        """The option ``codec``; None without one.

        Raises:
            ConfigError: There is no such codec, or its package is not installed.
        """
        name = self.options.get(CODEC)
        return None if name is None else codec_named(name)

    def port_number(self, name: str, default: int) -> int:
        """An option that is a TCP port.

        Raises:
            ConfigError: It is none.
        """
        text = self.options.get(name, str(default))
        if not _PORT.fullmatch(text) or not 0 < int(text) < 1 << 16:
            raise ConfigError(f"store: {name} is {text!r}, must be a port, from 1 to 65535")
        return int(text)

    def seconds(self, name: str, default: float) -> float:
        """An option in seconds.

        Raises:
            ConfigError: It is no finite number above 0.
        """
        text = self.options.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise ConfigError(f"store: {name} is {text!r}, must be seconds, above 0 and finite")
        return value

    def share(self, name: str, default: float) -> float:
        """An option that is ``always``, ``never`` or a share between them.

        Raises:
            ConfigError: It is something else.
        """
        text = self.options.get(name)
        try:
            value = {None: default, "always": 1.0, "never": 0.0}.get(text)
            value = float(text or "") if value is None else value
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ConfigError(f"store: {name} is {text!r}, must be always, never, or a share from 0 to 1")
        return value


def shown_url(text: str) -> str:
    """A URL for messages, without what stands before an ``@``: that may be a password, in a URL that is refused."""
    before, at, after = text.rpartition("@")
    return f"{before.partition(':')[0]}:...@{after}" if at else text


def file_url(folder: Path) -> str:
    """The URL of a folder's file store; a relative folder is one of the current directory.

    Raises:
        ConfigError: Its name is not UTF-8.
    """
    try:
        return f"file://{quote(str(folder.absolute()))}"
    except UnicodeEncodeError:
        raise ConfigError(f"store is {str(folder)!r}, must be a folder whose name is UTF-8") from None


def host_and_port(host: str, port: int) -> str:
    """As a URL has them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(parts: SplitResult) -> str:
    """Not ``SplitResult.hostname``, which is in small letters: that of a bucket or of shared memory is no DNS name."""
    plain, is_bracketed, address = parts.netloc.rpartition("@")[2].partition("[")
    return address.partition("]")[0] if is_bracketed else plain.partition(":")[0]


def _path(quoted: str) -> str:
    try:
        path = unquote(quoted, errors="strict")
        path.encode()
    except UnicodeError:
        path = "\0"
    if "\0" in path:
        raise ConfigError("store: the path of the URL must be UTF-8 without zero bytes; write %25 for a % in a name")
    return path


def _options(parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ConfigError(f"store: an option repeats after ? in the URL: {', '.join(name for name, _ in pairs)}")
    if parts.fragment:
        raise ConfigError("store: the URL has a part after #, which means nothing; write %23 for a # in a name")
    return options
