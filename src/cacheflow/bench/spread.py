"""Medians with their spread, and runs grouped so that only what ran side by side is compared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

from cacheflow.bench.records.base import RunRecord

S = TypeVar("S", bound=Hashable)
R = TypeVar("R", bound=RunRecord)
Measure = Callable[[R], float | None]
"""What is read off a run; None where it is unknown."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySummary(Generic[R]):
    """One policy in one setting, over all its repeats.

    Attributes:
        runs: One a repeat.
        num_wrong: Those whose check failed or was not made; where there is one, nothing is summarised.
        values: Spreads by measure, of those that are known.
        rival: The rival with the least median of what counts.
        pairs: What counts, of this policy and of the rival, in each repeat that both ran.
    """

    policy: str
    runs: tuple[R, ...]
    num_wrong: int
    values: Mapping[str, Spread] = field(default_factory=dict)
    rival: str | None = None
    pairs: tuple[tuple[float, float], ...] = ()

    def __getitem__(self, measure: str) -> Spread | None:
        return self.values.get(measure)

    @property
    def num_runs(self) -> int:
        """Repeats."""
        return len(self.runs)

    @property
    def exact(self) -> bool:
        """Whether every run of the policy was checked and equal to the reference."""
        return self.num_wrong == 0

    @property
    def over_rival(self) -> Spread | None:
        """What counts over the rival's, within repeats."""
        return Spread.of(ratio(*pair) for pair in self.pairs)

    @property
    def loses(self) -> bool:
        """Whether the rival does better by what counts."""
        return self.over_rival is not None and self.over_rival.median > 1.0


def ratio(value: float | None, base: float | None) -> float | None:
    """A value over another; None where one is unknown or the other is 0."""
    return value / base if value is not None and base else None


def summarise_policies(
    by_policy: Mapping[str, Mapping[int, R]],
    measures: Mapping[str, Measure[R]],
    *,
    counts: Callable[[str], Measure[R] | None],
    is_rival: Callable[[str, str], bool],
    is_good: Callable[[R], bool],
) -> tuple[PolicySummary[R], ...]:
    """Every policy of a setting, in the order they first ran.

    Args:
        by_policy: Runs by policy and repeat.
        measures: What is summarised.
        counts: What a policy is compared by with its rivals; None: it is not.
        is_rival: Whether the second policy is a rival of the first.
        is_good: Whether a run may be shown. A rival has good runs alone, and its luckiest does not count: the one with
            the least median is taken, so that noise picks no rival.
    """
    return tuple(_summarise(name, by_policy, measures, counts(name), is_rival, is_good) for name in by_policy)


def _summarise(
    policy: str,
    by_policy: Mapping[str, Mapping[int, R]],
    measures: Mapping[str, Measure[R]],
    counted: Measure[R] | None,
    is_rival: Callable[[str, str], bool],
    is_good: Callable[[R], bool],
) -> PolicySummary[R]:
    mine = by_policy[policy]
    runs = tuple(mine.values())
    if num_wrong := sum(not is_good(run) for run in runs):
        return PolicySummary(policy=policy, runs=runs, num_wrong=num_wrong)
    spreads = {name: Spread.of(map(measure, runs)) for name, measure in measures.items()}
    values = {name: spread for name, spread in spreads.items() if spread is not None}
    if counted is None:
        return PolicySummary(policy=policy, runs=runs, num_wrong=0, values=values)
    medians = {
        name: spread.median
        for name, group in by_policy.items()
        if is_rival(policy, name) and all(map(is_good, group.values()))
        if (spread := Spread.of(map(counted, group.values()))) is not None
    }
    rival = min(medians, key=lambda name: medians[name]) if medians else None
    theirs = by_policy[rival] if rival is not None else {}
    both = [(counted(run), counted(theirs[repeat])) for repeat, run in mine.items() if repeat in theirs]
    pairs = tuple((one, other) for one, other in both if one is not None and other is not None)
    return PolicySummary(policy=policy, runs=runs, num_wrong=0, values=values, rival=rival, pairs=pairs)
