"""What a restoration still needs of compute and of the link, and how long that takes at best.

Source: the closed form of CacheFlow v1, Eq. 1, with the new tokens as work that only compute can do.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.plan.problem import RestoreProblem

NO_LINK_S = 1e9
"""Stands for a link that brings nothing any more."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """Work that is left of a restoration, in corrected seconds.

    Attributes:
        compute_s: To recompute every cell that nobody has restored.
        load_s: To load every one of them instead; ``NO_LINK_S`` when the link is down.
        suffix_s: To run the new tokens, which only compute can do.
    """

    compute_s: float
    load_s: float
    suffix_s: float

    @property
    def alone_s(self) -> float:
        """Seconds to the first token with compute and the link to itself, work infinitely divisible."""
        return together_s(compute_s=self.compute_s, load_s=self.load_s, suffix_s=self.suffix_s)


def together_s(*, compute_s: float, load_s: float, suffix_s: float) -> float:
    """Seconds until compute and link end together, when compute has ``suffix_s`` of its own to do.

    Uniform cost: recomputing the share ``x`` takes ``x * compute_s``, loading the rest ``(1 - x) * load_s``.
    """
    share = compute_share(compute_s=compute_s, load_s=load_s, ahead_s=suffix_s)
    return max(suffix_s + share * compute_s, (1.0 - share) * load_s)


def compute_share(*, compute_s: float, load_s: float, ahead_s: float) -> float:
    """The share that compute takes of a restoration so that it ends with the link, as far as that is possible.

    Args:
        compute_s: To recompute everything.
        load_s: To load everything.
        ahead_s: By how much compute is busier with other work than the link; negative when the link is busier.
    """
    total_s = compute_s + load_s
    return min(1.0, max(0.0, (load_s - ahead_s) / total_s)) if total_s > 0 else 0.0


def remaining_of(problem: RestoreProblem, *, compute_factor: float, bytes_per_s: float) -> Remaining:
    """What a restoration needs that has not started.

    Args:
        problem: What it costs.
        compute_factor: Seconds that one predicted compute second takes now.
        bytes_per_s: Bandwidth of the link now.
    """
    return Remaining(
        compute_s=problem.recompute_s * compute_factor,
        load_s=float(problem.load_bytes_KB.sum()) / bytes_per_s,
        suffix_s=problem.suffix_s * compute_factor,
    )
