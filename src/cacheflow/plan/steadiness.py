"""Whether measured chunk times can be believed: rounds agree, and a chunk never gets cheaper with what is before it.

On a machine that does other work they do neither, and the process gets little of a processor. Pure: the caller
measures and passes in what was timed. A little work that disturbs every round alike cannot be seen this way.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

STEADY_SPREAD = 1.25
"""Up to this the slowest rounds of all chunks together may be slower than the fastest."""
STEADY_DROP = 1.15
"""Up to this a chunk may take longer than the same chunk with more tokens before it."""
STARVED_SHARE = 0.8
"""A process that computes all the time has at least so much of one processor, however many threads it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTimes:
    """One chunk, timed once a round.

    Attributes:
        num_tokens: Its tokens.
        offset: Tokens before it.
        seconds: What it took each time, at least one value.
    """

    num_tokens: int
    offset: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """What is kept of it."""
        return statistics.median(self.seconds)

    @property
    def lost_s(self) -> float:
        """How much longer the slowest round took than the fastest."""
        return max(self.seconds) - min(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steadiness:
    """What rounds say of each other, and chunks of those before them.

    Attributes:
        num_chunks: Chunks that were timed.
        num_compared: Those of them that were timed more than once.
        fastest_s: Seconds of those in their fastest rounds.
        slowest_s: ... and in their slowest.
        worst: The one that lost most between two rounds; None where nothing was timed twice.
        drop: The same chunk at a nearer and at a farther offset, where it fell most; None where it never fell.
        cpu_share: Processor seconds the process got for each second of measuring; None where something else computes.
    """

    num_chunks: int
    num_compared: int
    fastest_s: float
    slowest_s: float
    worst: ChunkTimes | None
    drop: tuple[ChunkTimes, ChunkTimes] | None
    cpu_share: float | None

    @property
    def spread(self) -> float:
        """Slowest over fastest rounds; 1 where nothing was timed twice."""
        return self.slowest_s / self.fastest_s if self.num_compared else 1.0

    @property
    def busy(self) -> bool:
        """Whether the machine did other work, as far as can be seen."""
        return bool(self._reasons())

    @property
    def complaint(self) -> str:
        """Why the times are not to be believed, with the numbers; empty where they are."""
        if self.busy:
            return f"the machine was busy: {'; '.join(self._reasons())}"
        if 2 * self.num_compared < self.num_chunks:
            return (
                "whether the machine was busy cannot be told: in the time given "
                f"{self.num_compared} of {self.num_chunks} chunks were timed more than once"
            )
        return ""

    def _reasons(self) -> list[str]:
        reasons = []
        if self.worst is not None and self.spread > STEADY_SPREAD:
            worst = self.worst
            reasons.append(
                f"the same {self.num_compared} chunks took {_time(self.fastest_s)} in their fastest rounds and "
                f"{_time(self.slowest_s)} in their slowest, {self.spread:.2f} times as long (steady is up to "
                f"{STEADY_SPREAD:g}; worst: {worst.num_tokens:,} tokens after {worst.offset:,} took "
                f"{_time(min(worst.seconds))} and {_time(max(worst.seconds))})"
            )
        if self.drop is not None and _fall(self.drop) > STEADY_DROP:
            near, far = self.drop
            reasons.append(
                f"{near.num_tokens:,} tokens took {_time(near.median_s)} after {near.offset:,} tokens and only "
                f"{_time(far.median_s)} after {far.offset:,}, although they attend to more"
            )
        if self.cpu_share is not None and self.cpu_share < STARVED_SHARE:
            reasons.append(f"this process got {self.cpu_share:.2f} of a processor while it computed all the time")
        return reasons


def judge(times: Sequence[ChunkTimes], *, cpu_share: float | None = None) -> Steadiness:
    """Compare rounds and offsets of chunks of one kind of layer.

    Only chunks of at least half the longest are compared over offsets: shorter ones cost mostly the call itself.

    Args:
        times: Every chunk, with all its rounds.
        cpu_share: Processor seconds the process got for each second of measuring, if it is the one that computes.
    """
    compared = [each for each in times if len(each.seconds) > 1]
    longest = max((each.num_tokens for each in times), default=0)
    ordered = sorted((each for each in times if 2 * each.num_tokens >= longest), key=lambda each: each.offset)
    falls = [
        (near, far)
        for near, far in combinations(ordered, 2)
        if near.num_tokens == far.num_tokens and near.median_s > far.median_s
    ]
    return Steadiness(
        num_chunks=len(times),
        num_compared=len(compared),
        fastest_s=sum(min(each.seconds) for each in compared),
        slowest_s=sum(max(each.seconds) for each in compared),
        worst=max(compared, key=lambda each: each.lost_s, default=None),
        drop=max(falls, key=_fall, default=None),
        cpu_share=cpu_share,
    )


def _fall(pair: tuple[ChunkTimes, ChunkTimes]) -> float:
    return pair[0].median_s / pair[1].median_s


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
