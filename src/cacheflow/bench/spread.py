"""Medians with their spread, and runs grouped so that only what ran side by side is compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from cacheflow.bench.record import RunRecord

S = TypeVar("S", bound=Hashable)
R = TypeVar("R", bound=RunRecord)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and greatest value seen."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are known; None when there are none."""
        listed = sorted(value for value in values if value is not None)
        return cls(median(listed), listed[0], listed[-1]) if listed else None


def median_or_none(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known; None when there are none."""
    spread = Spread.of(values)
    return None if spread is None else spread.median


def by_setting(records: Sequence[R], setting_of: Callable[[R], S]) -> dict[S, dict[str, dict[int, R]]]:
    """Runs by setting, then by policy in the order they first ran, then by repeat.

    A repeat that was run again (same setting, policy and repeat) counts once, with its last record.
    """
    found: dict[S, dict[str, dict[int, R]]] = {}
    for record in records:
        found.setdefault(setting_of(record), {}).setdefault(record.policy, {})[record.repeat] = record
    return found


def best_rival(
    rivals: Mapping[str, Mapping[int, R]], measure: Callable[[R], float | None], is_good: Callable[[R], bool]
) -> str | None:
    """The policy with the least median of what ``measure`` says, all of whose runs are good; None without any.

    Its luckiest run does not count, so noise picks no rival.
    """
    medians = {
        name: spread.median
        for name, runs in rivals.items()
        if all(map(is_good, runs.values())) and (spread := Spread.of(map(measure, runs.values()))) is not None
    }
    return min(medians, key=lambda name: medians[name]) if medians else None
