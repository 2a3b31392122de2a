"""The chunks of a request's tokens, by chain hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cacheflow.stores.keys import chain_hashes, chain_root
from cacheflow.vllm.scheduler.view import MediaSpan


@dataclass(slots=True, kw_only=True)
class RequestPrefix:
    """Chain hashes of a request's leading full chunks, computed as its tokens become known. One thread.

    Attributes:
        chunk_tokens: Tokens of a chunk.
        salt: Tenant salt; requests with different salts share nothing.
        media: What the placeholder tokens stand for, in order.
        hashes: Chain hash at the end of each chunk known so far.
    """

    chunk_tokens: int
    salt: str = ""
    media: Sequence[MediaSpan] = ()
    hashes: list[bytes] = field(default_factory=list)

    def extend(self, tokens: Sequence[int]) -> int:
        """Take in all tokens known by now; returns the number of full chunks."""
        known, num_chunks = len(self.hashes), len(tokens) // self.chunk_tokens
        if num_chunks > known:
            start = known * self.chunk_tokens
            ends = range(self.chunk_tokens, (num_chunks - known) * self.chunk_tokens + 1, self.chunk_tokens)
            parent = self.hashes[-1] if self.hashes else chain_root(self.salt)
            media = [self._media(start + end - self.chunk_tokens, start + end) for end in ends] if self.media else []
            new_tokens = list(tokens[start : start + ends[-1]])
            self.hashes += chain_hashes(new_tokens, list(ends), self.salt, media, parent=parent)
        return len(self.hashes)

    def chain_hashes(self, first: int, end: int) -> tuple[str, ...]:
        """Chain hashes of chunks ``[first, end)``, as hex."""
        return tuple(value.hex() for value in self.hashes[first:end])

    def _media(self, start: int, end: int) -> list[str]:
        """Content of the chunk's media, with its place: the same picture elsewhere is another chunk."""
        spans = [span for span in self.media if span.start < end and span.end > start]
        return [f"{span.content_id}@{span.start - start}" for span in spans]
