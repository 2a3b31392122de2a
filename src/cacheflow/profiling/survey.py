"""Times chunks of several lengths at several offsets, in rounds, within a time limit.

The first round goes from the near offsets to the far ones, so that what the time does not allow is the far end of the
range; the next rounds repeat what the first has measured, so that rounds can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cacheflow.plan.steadiness import ChunkTimes
from cacheflow.types import Clock

LEAST_OFFSETS = 2
"""Costs of a table are interpolated between offsets: one alone says nothing of any other."""


@dataclass(frozen=True, slots=True)
class ChunkPoint:
    """A chunk to be timed: ``num_tokens`` tokens at ``offset``, everything before resident."""

    num_tokens: int
    offset: int


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """Seconds of one layer for one chunk: in full, and for its keys and values only."""

    full_s: float
    kv_only_s: float


def median_cost(costs: Sequence[ChunkCost]) -> ChunkCost:
    """What is kept of several rounds; keys and values alone never cost more than all."""
    return ChunkCost(
        full_s=statistics.median(cost.full_s for cost in costs),
        kv_only_s=statistics.median(min(cost.kv_only_s, cost.full_s) for cost in costs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was measured.

    Attributes:
        offsets: Those at which every length was timed, ascending; fewer than were asked for where time ran out.
        costs: Every round of each chunk at them.
        num_measured: Measurements made, those of an offset that was not completed included.
        num_wanted: Measurements that were to be made.
        seconds: What all of it took.
    """

    offsets: tuple[int, ...]
    costs: dict[ChunkPoint, list[ChunkCost]] = field(repr=False)
    num_measured: int
    num_wanted: int
    seconds: float

    def times(self, *, num_layers: int) -> list[ChunkTimes]:
        """Every chunk's rounds through so many layers."""
        return [
            ChunkTimes(
                num_tokens=point.num_tokens,
                offset=point.offset,
                seconds=tuple(cost.full_s * num_layers for cost in costs),
            )
            for point, costs in self.costs.items()
        ]


class Surveyor:
    """Times every length at every offset, once a round; ``survey`` may be called once."""

    def __init__(
        self, measure: Callable[[ChunkPoint], ChunkCost], *, lengths: Sequence[int], offsets: Sequence[int], rounds: int
    ) -> None:
        """Measure nothing yet.

        Args:
            measure: Times one chunk.
            lengths: Tokens of chunks, ascending.
            offsets: Ascending.
            rounds: How often each chunk is to be timed.
        """
        self._measure, self._lengths, self._offsets, self._rounds = measure, lengths, offsets, rounds
        self._costs: dict[ChunkPoint, list[ChunkCost]] = {}
        self._took_s: dict[ChunkPoint, float] = {}
        self._num_measured = 0

    def survey(
        self, *, limit_s: float, clock: Clock, on_step: Callable[[int, int], None] = lambda done, total: None
    ) -> Survey:
        """Measure what the time allows.

        Args:
            limit_s: Seconds that all of it may take. A measurement that is expected to end later is not begun. Beyond
                the second offset the first round may use its share of the time alone, so that it can be repeated.
            clock: Times the whole.
            on_step: Called after every measurement with those made and those wanted.
        """
        began_s = clock()
        end_s, first_end_s = began_s + limit_s, began_s + limit_s / self._rounds
        num_wanted = len(self._lengths) * len(self._offsets) * self._rounds

        def sample(point: ChunkPoint, expected_s: float) -> bool:
            start_s = clock()
            if start_s + expected_s > end_s:
                return False
            self._costs.setdefault(point, []).append(self._measure(point))
            self._took_s[point] = clock() - start_s
            self._num_measured += 1
            on_step(self._num_measured, num_wanted)
            return True

        measured: list[int] = []
        for index, offset in enumerate(self._offsets):
            points = [ChunkPoint(length, offset) for length in self._lengths]
            column_s = sum(map(self._expected_s, points))
            if clock() + column_s > (end_s if index < LEAST_OFFSETS else first_end_s):
                break
            if not all(sample(point, self._expected_s(point)) for point in points):
                break
            measured.append(offset)
        kept = {point: costs for point, costs in self._costs.items() if point.offset in measured}
        if len(measured) >= LEAST_OFFSETS:
            for point in [*kept] * (self._rounds - 1):
                if not sample(point, self._took_s[point]):
                    break
        return Survey(
            offsets=tuple(measured),
            costs=kept,
            num_measured=self._num_measured,
            num_wanted=num_wanted,
            seconds=clock() - began_s,
        )

    def _expected_s(self, point: ChunkPoint) -> float:
        """What a chunk should take, along the line through it at the two offsets before; it never falls."""
        index = self._offsets.index(point.offset)
        if index == 0:
            return 0.0
        *before, last = (
            (offset, self._took_s[ChunkPoint(point.num_tokens, offset)])
            for offset in self._offsets[max(0, index - 2) : index]
        )
        rise = max(0.0, (last[1] - before[0][1]) / (last[0] - before[0][0])) if before else 0.0
        return last[1] + rise * (point.offset - last[0])
