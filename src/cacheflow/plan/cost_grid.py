"""Measured seconds of one layer on a rectangular grid of chunk lengths and offsets.

Exact at the measured points, bilinear between them, refused outside. Shapes: ``Q`` chunk lengths, ``P`` offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheflow.errors import CostRangeError, ProfileError
from cacheflow.plan.problem import Seconds

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostGrid:
    """What one layer of one kind costs.

    Attributes:
        chunk_tokens: Measured chunk lengths, ascending.
        offsets: Measured offsets (tokens before the chunk), ascending.
        full_QP: Seconds of the whole layer.
        kv_only_QP: Seconds of its keys and values alone; never more than ``full_QP``.
    """

    chunk_tokens: tuple[int, ...]
    offsets: tuple[int, ...]
    full_QP: Seconds
    kv_only_QP: Seconds

    def __post_init__(self) -> None:
        """Check axes, shapes and signs.

        Raises:
            ProfileError: An axis is empty, negative or does not ascend; an array has another shape, holds a cost
                that is not positive and finite, or keys and values cost more than the whole layer.
        """
        for name, axis, least in (("chunk_tokens", self.chunk_tokens, 1), ("offsets", self.offsets, 0)):
            if not axis or axis[0] < least or any(b <= a for a, b in pairwise(axis)):
                raise ProfileError(f"cost grid: {name} must ascend from at least {least}, got {axis}")
        shape = (len(self.chunk_tokens), len(self.offsets))
        for name, seconds in (("full", self.full_QP), ("kv_only", self.kv_only_QP)):
            if seconds.shape != shape:
                raise ProfileError(f"cost grid: {name} has shape {seconds.shape}, its axes need {shape}")
            if not (np.isfinite(seconds) & (seconds > 0)).all():
                raise ProfileError(f"cost grid: {name} holds a cost that is not positive and finite")
        if (self.kv_only_QP > self.full_QP).any():
            raise ProfileError("cost grid: keys and values alone cost more than the whole layer; measure again")

    def full_s(self, chunk_tokens: int, offset: int) -> float:
        """Seconds of one layer for one chunk.

        Raises:
            CostRangeError: The point lies outside the measured range.
        """
        return float(self.full_many_s([chunk_tokens], [offset])[0])

    def kv_only_s(self, chunk_tokens: int, offset: int) -> float:
        """Seconds of one layer's keys and values for one chunk.

        Raises:
            CostRangeError: The point lies outside the measured range.
        """
        return float(self.kv_only_many_s([chunk_tokens], [offset])[0])

    def full_many_s(self, chunk_tokens: Sequence[int], offsets: Sequence[int]) -> Seconds:
        """``full_s`` of several chunks; shape ``(len(chunk_tokens),)``."""
        return self._interpolated(self.full_QP, np.asarray(chunk_tokens), np.asarray(offsets))

    def kv_only_many_s(self, chunk_tokens: Sequence[int], offsets: Sequence[int]) -> Seconds:
        """``kv_only_s`` of several chunks; shape ``(len(chunk_tokens),)``."""
        return self._interpolated(self.kv_only_QP, np.asarray(chunk_tokens), np.asarray(offsets))

    def _interpolated(self, seconds_QP: Seconds, chunk_tokens: Tokens, offsets: Tokens) -> Seconds:
        low_q, high_q, share_q = _bracket("chunk_tokens", self.chunk_tokens, chunk_tokens)
        low_p, high_p, share_p = _bracket("offset", self.offsets, offsets)
        low = _between(seconds_QP[low_q, low_p], seconds_QP[low_q, high_p], share_p)
        high = _between(seconds_QP[high_q, low_p], seconds_QP[high_q, high_p], share_p)
        return _between(low, high, share_q)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "chunk_tokens": list(self.chunk_tokens),
            "offsets": list(self.offsets),
            "full_s": self.full_QP.tolist(),
            "kv_only_s": self.kv_only_QP.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostGrid:
        """The inverse of ``to_dict``.

        Raises:
            ProfileError: A key is missing, or the values make no cost grid.
        """
        try:
            return cls(
                chunk_tokens=tuple(int(value) for value in data["chunk_tokens"]),
                offsets=tuple(int(value) for value in data["offsets"]),
                full_QP=np.array(data["full_s"], dtype=np.float64),
                kv_only_QP=np.array(data["kv_only_s"], dtype=np.float64),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"cost grid: malformed ({type(error).__name__}: {error})") from error


def _between(low: Seconds, high: Seconds, share: Seconds) -> Seconds:
    # Not low + share * (high - low): that rounds at share 1, and the measured points must come back exactly.
    mixed: Seconds = (1.0 - share) * low + share * high
    return mixed


def _bracket(name: str, axis: tuple[int, ...], values: Tokens) -> tuple[Tokens, Tokens, Seconds]:
    """Neighbours of each value on an axis, and how far it lies from the lower one."""
    outside = values[(values < axis[0]) | (values > axis[-1])]
    if outside.size:
        raise CostRangeError(
            f"{name} {int(outside[0])} is outside the measured {axis[0]}..{axis[-1]}: "
            "calibrate a range that includes it"
        )
    points = np.asarray(axis)
    high = np.searchsorted(points, values, side="left")
    low = np.maximum(high - 1, 0)
    low = np.where(points[high] == values, high, low)
    width = np.maximum(points[high] - points[low], 1)
    return low, high, (values - points[low]) / width
