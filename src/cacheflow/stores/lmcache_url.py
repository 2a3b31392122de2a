"""The URL of a store behind LMCache: ``lmcache:`` and LMCache's own configuration of an adapter, as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cacheflow.errors import ConfigError

SCHEME = "lmcache"
SECRETS = "CACHEFLOW_LMCACHE_SECRETS"
"""Environment variable: a JSON object with what of an adapter's configuration is secret."""

FORM = 'lmcache:{"type": "fs_native", "base_path": "/var/cache/kv"}'
_SECRET = re.compile(r"password|passwd|secret|token|credential|access_key|api_key", re.IGNORECASE)
_LONG = 4
_NOT_OURS = ("serde", "eviction")
"""Parts of a configuration that LMCache's storage manager heeds, and an adapter alone does not."""


def split_url(text: str) -> tuple[dict[str, Any], str]:
    """LMCache's configuration in a URL, and the options after ``?``.

    Raises:
        ConfigError: It is none, holds a secret, or asks for what an adapter alone does not do.
    """
    after = text.removeprefix(f"{SCHEME}:")
    try:
        settings, end = json.JSONDecoder().raw_decode(after)
    except (ValueError, RecursionError):
        settings, end = None, 0
    rest = after[end:]
    if not isinstance(settings, dict) or not isinstance(settings.get("type"), str) or rest[:1] not in ("", "?"):
        raise ConfigError(f"store: must be {FORM}: after {SCHEME}: LMCache's configuration of an L2 adapter, as JSON")
    named = sorted(name for name, value in _named(settings) if value and _SECRET.search(name))
    if named:
        raise ConfigError(
            f"store: the URL has a value for {named[0]!r}, and URLs are printed and logged: take it out and set the "
            f"environment variable {SECRETS} to a JSON object that has it"
        )
    for name in _NOT_OURS:
        if name in settings:
            raise ConfigError(f"store: {name!r} is for LMCache's own server, and is not heeded here: take it out")
    return settings, rest[1:]


def with_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the secrets of the environment.

    Raises:
        ConfigError: They are no JSON object.
    """
    return {**settings, **_secrets()}


def _secrets() -> dict[str, Any]:
    text = os.environ.get(SECRETS, "{}")
    try:
        secrets = json.loads(text)
    except ValueError:
        secrets = None
    if not isinstance(secrets, dict):
        raise ConfigError(f"store: the environment variable {SECRETS} must be a JSON object")
    return secrets


def cleared(text: str) -> str:
    """A text of LMCache's, on one line, without the secrets of the environment.

    Each string and number in them is taken out, however deep it lies, as it is and as Python and JSON write it. One of
    fewer than ``_LONG`` characters is taken out where it stands alone, and not of the middle of words.

    Raises:
        ConfigError: They are no JSON object.
    """
    written = {form for leaf in _leaves(_secrets()) for form in (leaf, repr(leaf)[1:-1], json.dumps(leaf)[1:-1])}
    for secret in sorted(written, key=len, reverse=True):  # one may be a part of another
        part = re.escape(secret)
        text = re.sub(part if len(secret) >= _LONG else rf"(?<!\w){part}(?!\w)", "...", text)
    return " ".join(text.split())


def _named(value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - JSON
    """All names and their values, however deep."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _leaves(value: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    """All strings and numbers, however deep, but for empty ones."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    elif value and value is not True:
        yield str(value)
