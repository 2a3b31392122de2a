"""What a request lacks and another restoration restores: restored once, then copied between their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from cacheflow.restore.work import RestoreTarget


class Sharing(Enum):
    """What to do about a prefix that another request is restoring."""

    NOTHING = "nothing"
    """Nobody is, or what is shared is too little to wait for."""
    WAIT = "wait"
    """The shared part is on its way."""
    COPY = "copy"
    """The shared part is there and can be copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A decision about a shared prefix.

    Attributes:
        sharing: What to do.
        source_blocks: For ``COPY``: KV blocks that hold the tokens ``[start, end)``.
        end: For ``COPY``: one past the last token to copy, the end of a chunk.
    """

    sharing: Sharing
    source_blocks: tuple[int, ...] = ()
    end: int = 0


NOTHING_SHARED = Shared(sharing=Sharing.NOTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request lacks.

    Attributes:
        start: Tokens it has, a multiple of the block size.
        namespace: Of its objects.
        chain_hashes: Chain hash (hex) at the end of each chunk it lacks, the one ``start`` lies in first.
    """

    start: int
    namespace: str
    chain_hashes: tuple[str, ...]


def find_shared(
    wanted: Wanted, others: Iterable[tuple[RestoreTarget, Callable[[], int]]], *, chunk_tokens: int, block_size: int
) -> Shared:
    """What to do about the longest part of ``wanted`` that another restoration restores.

    One that restores nothing else is waited for: vLLM's prefix cache shares its blocks when it ends. The last chunk is
    never copied: a restoration has at least one chunk of its own to restore. Each of ``others`` comes with a call that
    says up to which token its prefix is resident.
    """
    first = wanted.start // chunk_tokens
    most = len(wanted.chain_hashes) - 1
    best = NOTHING_SHARED
    for target, resident in others:
        offset = first - target.object_start // chunk_tokens
        if target.namespace != wanted.namespace or offset < 0 or wanted.start < target.start:
            continue
        pairs = zip(wanted.chain_hashes, target.chain_hashes[offset:], strict=False)
        common = sum(own == other for own, other in pairs)
        shared = min(most, common)
        end = (first + shared) * chunk_tokens
        if common and (first + common) * chunk_tokens >= target.chunk_ends[-1]:
            return Shared(sharing=Sharing.WAIT)
        if shared < 1 or end <= best.end:
            continue
        if resident() < end:
            return Shared(sharing=Sharing.WAIT)
        blocks = target.block_ids[wanted.start // block_size : end // block_size]
        best = Shared(sharing=Sharing.COPY, source_blocks=blocks, end=end)
    return best
