"""Which chunks of a prompt does a store hold?

Chunks end where the save ended them: every ``chunk_tokens`` from where the last one ended, except that a turn may end
with a partial chunk, after which the next turn's chunks start. Full chunks are found by hashing; for partial ones a
small ``NEXT`` object at the chain hash before them lists the lengths that were saved.

``NEXT`` objects are the only ones that change. They are hints: a lost update is a missed hit, a stale one a probe in
vain.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cacheflow.errors import ConfigError
from cacheflow.stores.base import GetRequest, Priority, PutOutcome, PutRequest, Store
from cacheflow.stores.keys import Namespace, ObjectKey, TokenIds, as_token_array, chain_hashes, chain_root, next_key
from cacheflow.types import Clock, LoadOutcome

MAX_NOTED = 8
"""Partial lengths kept per position, the most recent ones."""

PROBE_CHUNKS = 64
"""Full chunks asked for in one ``contains`` call; bounds what is hashed and asked without use after a divergence."""

RequiredKeys = Callable[[bytes], Sequence[ObjectKey]]
"""From the chain hash at the end of a chunk to every object a restoration of that chunk needs."""

Contains = Callable[[Sequence[ObjectKey]], Sequence[bool] | None]
"""Whether each object is there; None where the store did not say so in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMatch:
    """The longest prefix found.

    Attributes:
        chunk_ends: Token position at which each chunk found ends, ascending; empty when nothing was found.
        chain_hashes: Chain hash at the end of each chunk.
        timed_out: The deadline ended the search; more may be there.
    """

    chunk_ends: tuple[int, ...]
    chain_hashes: tuple[bytes, ...]
    timed_out: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix found."""
        return self.chunk_ends[-1] if self.chunk_ends else 0


def note_partial_chunk(
    store: Store, namespace: Namespace, parent_hash: bytes, num_tokens: int, *, timeout_s: float = 1.0
) -> bool:
    """Note that a partial chunk of ``num_tokens`` was saved after ``parent_hash``; to be called after its objects.

    Best effort: of two updates at the same time one may be lost. Blocks the caller.

    Args:
        store: Where the chunk was saved.
        namespace: Its namespace.
        parent_hash: Chain hash before the chunk; ``chain_root(salt)`` for the first.
        num_tokens: Length of the chunk.
        timeout_s: For reading and for writing, each.

    Returns:
        Whether the note is there.

    Raises:
        ConfigError: ``num_tokens`` is below 1.
    """
    if num_tokens < 1:
        raise ConfigError(f"a partial chunk has at least 1 token, not {num_tokens}")
    key = next_key(namespace.digest, parent_hash)
    noted = _read_noted(store, key, timeout_s=timeout_s)
    if noted[:1] == [num_tokens]:
        return True
    lengths = np.zeros(MAX_NOTED, dtype="<i8")
    recent = [num_tokens, *(length for length in noted if length != num_tokens)][:MAX_NOTED]
    lengths[: len(recent)] = recent
    handle = store.submit_put([PutRequest(key, [lengths], (MAX_NOTED,), "int64", replace=True)], deadline_s=timeout_s)
    (outcome,) = handle.wait(timeout_s)
    return outcome is PutOutcome.STORED


def find_prefix(  # noqa: PLR0913 - a question of many parts, all but three by keyword
    store: Store,
    namespace: Namespace,
    tokens: TokenIds,
    *,
    chunk_tokens: int,
    required_keys: RequiredKeys,
    salt: str = "",
    max_tokens: int | None = None,
    deadline_s: float | None = None,
    clock: Clock = time.perf_counter,
    contains: Contains | None = None,
) -> PrefixMatch:
    """Find the longest run of saved chunks from the start of a prompt; blocks the caller.

    At each position a full chunk is preferred, then the noted partial lengths, longest first; the search does not go
    back on its choice. A chunk counts as saved when every object ``required_keys`` names is contained, which is a
    hint like ``contains`` itself.

    Args:
        store: Where to look.
        namespace: Of the model that will restore.
        tokens: Token ids of the prompt.
        chunk_tokens: Size of a full chunk at the save.
        required_keys: The objects a chunk needs.
        salt: Tenant salt.
        max_tokens: Longest prefix wanted, such as all but the last token; None for the whole prompt.
        deadline_s: Seconds from now after which the search ends with what it has; None for no deadline. It is
            looked at between questions to the store.
        clock: Monotonic clock.
        contains: Asks the store, such as one that may hang; an answer of None ends the search as the deadline does.
            None: ``store.contains``.

    Raises:
        ConfigError: ``chunk_tokens`` is below 1 or ``max_tokens`` below 0.
        PromptError: ``tokens`` is not one-dimensional integers of 0 or more.
    """
    if chunk_tokens < 1 or (max_tokens is not None and max_tokens < 0):
        raise ConfigError(f"chunk_tokens is {chunk_tokens} (at least 1), max_tokens {max_tokens} (0 or more)")
    search = _Search(
        store=store,
        namespace=namespace,
        tokens=as_token_array(tokens)[:max_tokens],
        chunk_tokens=chunk_tokens,
        required_keys=required_keys,
        salt=salt,
        end_s=float("inf") if deadline_s is None else clock() + deadline_s,
        clock=clock,
        contains=contains or store.contains,
    )
    ends: list[int] = []
    hashes: list[bytes] = []
    while True:
        start, parent = (ends[-1], hashes[-1]) if ends else (0, chain_root(salt))
        found = search.full_chunks(start, parent) or search.partial_chunk(start, parent)
        if not found:
            return PrefixMatch(chunk_ends=tuple(ends), chain_hashes=tuple(hashes), timed_out=search.timed_out)
        for end, chain in found:
            ends.append(end)
            hashes.append(chain)


@dataclass(slots=True, kw_only=True)
class _Search:
    """One lookup: what is asked for, and the deadline."""

    store: Store
    namespace: Namespace
    tokens: npt.NDArray[np.int64]
    chunk_tokens: int
    required_keys: RequiredKeys
    salt: str
    end_s: float
    clock: Clock
    contains: Contains
    timed_out: bool = False

    def full_chunks(self, start: int, parent: bytes) -> list[tuple[int, bytes]]:
        """``(end, chain hash)`` of the leading full chunks after ``start``, as far as one question reaches."""
        num_chunks = min((len(self.tokens) - start) // self.chunk_tokens, PROBE_CHUNKS)
        return self._leading(start, parent, [self.chunk_tokens * (1 + index) for index in range(num_chunks)])

    def partial_chunk(self, start: int, parent: bytes) -> list[tuple[int, bytes]]:
        """``(end, chain hash)`` of the longest noted chunk after ``start`` that is there, or nothing."""
        room = len(self.tokens) - start
        key = next_key(self.namespace.digest, parent)
        if room < 1 or self._is_over() or not self._contained([key])[0]:
            return []
        left_s = self.end_s - self.clock()
        noted = _read_noted(self.store, key, timeout_s=None if left_s == float("inf") else max(left_s, 0.0))
        for length in sorted(set(noted), reverse=True):
            if length <= room and length != self.chunk_tokens and (found := self._leading(start, parent, [length])):
                return found
        return []

    def _leading(self, start: int, parent: bytes, ends: Sequence[int]) -> list[tuple[int, bytes]]:
        """Those of the chunks with these ends, relative to ``start``, before the first that is not there."""
        if not ends or self._is_over():
            return []
        hashes = chain_hashes(self.tokens[start : start + ends[-1]], ends, self.salt, parent=parent)
        required = [self.required_keys(chain) for chain in hashes]
        contained = iter(self._contained([key for keys in required for key in keys]))
        found = []
        for end, chain, keys in zip(ends, hashes, required, strict=True):
            if not all(list(itertools.islice(contained, len(keys)))):  # takes one answer per key
                break
            found.append((start + end, chain))
        return found

    def _contained(self, keys: Sequence[ObjectKey]) -> Sequence[bool]:
        found = self.contains(keys)
        self.timed_out = self.timed_out or found is None
        return (False,) * len(keys) if found is None else found

    def _is_over(self) -> bool:
        self.timed_out = self.timed_out or self.clock() >= self.end_s
        return self.timed_out


def _read_noted(store: Store, key: ObjectKey, *, timeout_s: float | None) -> list[int]:
    """Lengths in a ``NEXT`` object, most recent first; none when it cannot be read in time."""
    lengths = np.zeros(MAX_NOTED, dtype="<i8")
    handle = store.submit_get([GetRequest(key, lengths)], priority=Priority.AWAITED, deadline_s=timeout_s)
    (outcome,) = handle.wait(timeout_s)
    if outcome is not LoadOutcome.OK:
        return []
    return [int(length) for length in lengths if length > 0]
