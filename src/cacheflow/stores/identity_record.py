"""What a namespace stands for, written beside its objects, so that others can say why theirs is another one.

A namespace is a digest: two processes whose objects do not meet see only that two digests differ. Each writes the
parts that its own is made of as one object of kind ``IDENTITY``, at every start, since it is evicted like any other.
Whoever finds objects of another namespace in the store (``Store.census``) reads what it stands for and compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json
from cacheflow.stores.base import GetRequest, PutOutcome, PutRequest, Store
from cacheflow.stores.keys import identity_key
from cacheflow.types import LoadOutcome

IDENTITY_BYTES = 16384
"""Length of every identity's payload, so that it can be read without asking for its length."""


def write_identity(store: Store, namespace: str, parts: Mapping[str, str], *, timeout_s: float) -> PutOutcome:
    """Write what a namespace stands for, over what is there; blocks the caller, for ``timeout_s`` at most.

    Args:
        store: Where the objects of the namespace are.
        namespace: ``Namespace.digest``.
        parts: What decides the namespace, by name. Where all of it is too long for one object, the longest values are
            replaced by their SHA-256, as 64 hex digits.
        timeout_s: After this the outcome is ``LATE``; the write may still come to pass.

    Returns:
        ``STORED``, or why it is not there.

    Raises:
        ConfigError: The namespace is no digest, or the names alone are too long: hundreds of parts.
    """
    payload = _encoded(parts)
    request = PutRequest(identity_key(namespace), [payload], (IDENTITY_BYTES,), "uint8", replace=True)
    (outcome,) = store.submit_put([request], deadline_s=timeout_s).wait(timeout_s)
    return outcome or PutOutcome.LATE


def read_identities(store: Store, namespaces: Iterable[str], *, timeout_s: float) -> dict[str, dict[str, str]]:
    """What namespaces stand for; blocks the caller, for ``timeout_s`` at most.

    Args:
        store: Where to look.
        namespaces: Digests, such as the keys of ``Store.census``.
        timeout_s: For all of them together.

    Returns:
        The parts by namespace. What is missing, damaged, late, or no JSON object of texts is left out.

    Raises:
        ConfigError: A namespace is no digest.
    """
    buffers = {namespace: bytearray(IDENTITY_BYTES) for namespace in namespaces}
    requests = [GetRequest(identity_key(namespace), buffer) for namespace, buffer in buffers.items()]
    # A read that hangs keeps its buffer alive. It is not cancelled: that would wait for it.
    outcomes = store.submit_get(requests, deadline_s=timeout_s).wait(timeout_s)
    found = {}
    for (namespace, buffer), outcome in zip(buffers.items(), outcomes, strict=True):
        if outcome is LoadOutcome.OK and (parts := _decoded(bytes(buffer))) is not None:
            found[namespace] = parts
    return found


def differing_parts(own: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the parts that differ, in alphabetical order; a part that only one of them has differs.

    A value and its SHA-256 are the same: which values were too long to be written is no difference.
    """
    return tuple(
        name
        for name in sorted(own.keys() | other.keys())
        if name not in own or name not in other or not _same(own[name], other[name])
    )


def _same(value: str, other: str) -> bool:
    return value == other or _digest(value) == other or value == _digest(other)


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()


def _encoded(parts: Mapping[str, str]) -> bytes:
    """JSON of the parts, padded with spaces to ``IDENTITY_BYTES``."""
    shortened = dict(parts)
    by_length = iter(sorted(parts, key=lambda name: (-len(parts[name]), name)))
    while len(text := json.dumps(shortened, sort_keys=True)) > IDENTITY_BYTES:  # ASCII: as many bytes as characters
        name = next(by_length, None)
        if name is None:
            raise ConfigError(
                f"identity: the names of {len(parts)} parts and 64 digits for each value take {len(text)} bytes, "
                f"{IDENTITY_BYTES} are allowed: give fewer parts"
            )
        shortened[name] = min(_digest(parts[name]), parts[name], key=len)
    return text.ljust(IDENTITY_BYTES).encode()


def _decoded(payload: bytes) -> dict[str, str] | None:
    try:
        parts = parse_json(payload.decode())
    except (UnicodeDecodeError, ConfigError):
        return None
    if not isinstance(parts, dict) or not all(isinstance(value, str) for value in parts.values()):
        return None
    return parts
