"""Ours against the best rival of each setting, from records alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cacheflow.bench.figures.runs import EXISTING, OURS, PURE
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.bench.summary import PROMISE_FACTOR, PROMISE_S

RIVALS = (*EXISTING, "cacheflow_v1", "cacheflow_v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One setting.

    Attributes:
        pure: The best of those that only recompute or only load.
        existing: The best of what the paper compares with: those and Cake.
        rival: The best rival, the published CacheFlows included.
    """

    ours: FigureRecord
    pure: FigureRecord
    existing: FigureRecord
    rival: FigureRecord

    @property
    def over_pure(self) -> float:
        """How many times as fast we are as the best pure way."""
        return self.pure.ttft_s / self.ours.ttft_s

    @property
    def over_existing(self) -> float:
        """How many times as fast we are as the best existing."""
        return self.existing.ttft_s / self.ours.ttft_s

    @property
    def over_rival(self) -> float:
        """How many times as fast we are as the best rival."""
        return self.rival.ttft_s / self.ours.ttft_s

    @property
    def loses(self) -> bool:
        """Whether ours is further behind than the promise allows."""
        return self.ours.ttft_s > self.rival.ttft_s * PROMISE_FACTOR + PROMISE_S


def gains(records: Iterable[FigureRecord]) -> list[Gain]:
    """One for each setting under which ours and every rival ran; a policy is taken at its best chunk size."""
    best: dict[tuple[object, ...], dict[str, FigureRecord]] = {}
    for record in records:
        found = best.setdefault(record.case, {})
        if record.series not in found or record.ttft_s < found[record.series].ttft_s:
            found[record.series] = record
    return [
        Gain(
            ours=found[OURS],
            pure=_fastest(found, [contender.name for contender in PURE]),
            existing=_fastest(found, EXISTING),
            rival=_fastest(found, RIVALS),
        )
        for found in best.values()
        if found.keys() >= {OURS, *RIVALS}
    ]


def _fastest(found: dict[str, FigureRecord], names: Sequence[str]) -> FigureRecord:
    return min((found[name] for name in names), key=lambda record: record.ttft_s)
