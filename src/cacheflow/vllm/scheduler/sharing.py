"""Followers: what a request lacks and a leader restores is restored once, then copied from the leader's blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from cacheflow.restore.work import RestoreTarget


class Following(Enum):
    """What a follower does about a prefix that its leader, another request, is restoring."""

    NOBODY = "nobody"
    """No leader, or what it shares is too little to wait for."""
    WAIT = "wait"
    """The shared part is on its way."""
    COPY = "copy"
    """The shared part is there and can be copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderShare:
    """The decision about the prefix that a leader restores.

    Attributes:
        following: What to do.
        source_blocks: For ``COPY``: KV blocks of the leader that hold the tokens ``[start, end)``.
        end: For ``COPY``: one past the last token to copy, the end of a chunk.
    """

    following: Following
    source_blocks: tuple[int, ...] = ()
    end: int = 0


NO_LEADER = LeaderShare(following=Following.NOBODY)


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


def find_leader(
    wanted: Wanted,
    others: Iterable[tuple[RestoreTarget, Callable[[], int]]],
    *,
    chunk_tokens: int,
    block_size: int,
    copies: bool = True,
) -> LeaderShare:
    """What to do about the longest part of ``wanted`` that another restoration restores.

    One that restores nothing else is waited for: vLLM's prefix cache shares its blocks when it ends. The last chunk is
    never copied: a restoration has at least one chunk of its own to restore. Each of ``others`` comes with a call that
    says up to which token its prefix is resident. Without ``copies``, in a model whose recurrent layers have no states
    in the middle of a prefix that is restored, only what is shared as a whole is waited for.
    """
    first = wanted.start // chunk_tokens
    most = len(wanted.chain_hashes) - 1
    best = NO_LEADER
    for target, resident in others:
        offset = first - target.object_start // chunk_tokens
        if target.namespace != wanted.namespace or offset < 0 or wanted.start < target.start:
            continue
        pairs = zip(wanted.chain_hashes, target.chain_hashes[offset:], strict=False)
        common = sum(own == other for own, other in pairs)
        shared = min(most, common)
        end = (first + shared) * chunk_tokens
        if common and (first + common) * chunk_tokens >= target.chunk_ends[-1]:
            return LeaderShare(following=Following.WAIT)
        if not copies or shared < 1 or end <= best.end:
            continue
        if resident() < end:
            return LeaderShare(following=Following.WAIT)
        blocks = target.block_ids[wanted.start // block_size : end // block_size]
        best = LeaderShare(following=Following.COPY, source_blocks=blocks, end=end)
    return best
