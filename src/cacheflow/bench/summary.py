"""Records to figures: medians and spreads of ratios, each ratio taken between runs of the same repeat.

Policies alternate within a repeat, so that drift of the machine (heat, neighbours) hits both sides of a ratio alike;
the median is over repeats of ratios, never a ratio of medians of runs that were not side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from cacheflow.bench.record import RestoreRecord

OURS = "cacheflow"
"""The policy whose losses are flagged."""
PROMISE_FACTOR = 1.02
"""A policy of ours may be this much slower than its best rival, plus ``PROMISE_S``."""
PROMISE_S = 0.005

IMPOSSIBLE = 0.95
"""A ratio to the lower bound under this comes from a bound and a run measured at different speeds of the machine."""
MAX_UNEVEN = 1.33
"""Slowest over fastest pure recomputation of one setting, above which the machine counts as disturbed."""

Metric = Literal["restore", "ttft"]


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What must be equal for two runs to be compared; ``perturbation`` is canonical JSON."""

    suite: str
    model: str
    device: str
    dtype: str
    perturbation: str
    num_tokens: int
    suffix_tokens: int
    chunk_tokens: int
    load_compute_ratio: float
    layers_per_block: int = 1
    store: str = "memory"
    fingerprint: str = ""

    @classmethod
    def of(cls, record: RestoreRecord) -> Setting:
        """The setting of a record; the ratio is rounded to three digits so that repeats fall together."""
        return cls(
            suite=record.suite,
            model=record.model,
            device=record.device,
            dtype=record.dtype,
            perturbation=json.dumps(dict(record.perturbation), sort_keys=True),
            num_tokens=record.num_tokens,
            suffix_tokens=record.suffix_tokens,
            chunk_tokens=record.chunk_tokens,
            load_compute_ratio=float(f"{record.load_compute_ratio:.3g}"),
            layers_per_block=record.layers_per_block,
            store=record.store,
            fingerprint=record.fingerprint,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and greatest value seen."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """The spread of some values; None when there are none."""
        listed = sorted(values)
        return cls(median(listed), listed[0], listed[-1]) if listed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySummary:
    """One policy in one setting, over all its repeats.

    Times and ratios are None when a run of the policy was wrong (nothing of it is shown then) or had no suffix.

    Attributes:
        policy: Its name.
        num_runs: Repeats.
        num_wrong: Repeats whose check failed or was not made.
        restore_s: Restoration time.
        ttft_s: Time to first token.
        restore_over_bound: Restoration time over its bound.
        ttft_over_bound: Time to first token over its bound.
        rival: The other policy with the least median time (to first token, without a suffix of restoration).
        over_rival: That time over the rival's in the same repeat.
        breaks_promise: Whether the median is over ``PROMISE_FACTOR`` times the rival's plus ``PROMISE_S``.
        compute_busy: Median share of the restoration in which compute worked.
        io_busy: Median share in which the link worked.
        loaded_bytes: Median bytes over the link.
        recomputed_share: Median share of the cells that compute restored.
        failed_loads: Reads that failed, over all repeats.
    """

    policy: str
    num_runs: int
    num_wrong: int
    restore_s: Spread | None = None
    ttft_s: Spread | None = None
    restore_over_bound: Spread | None = None
    ttft_over_bound: Spread | None = None
    rival: str | None = None
    over_rival: Spread | None = None
    breaks_promise: bool = False
    compute_busy: float | None = None
    io_busy: float | None = None
    loaded_bytes: float | None = None
    recomputed_share: float | None = None
    failed_loads: int = 0

    @property
    def exact(self) -> bool:
        """Whether every run of the policy was checked and equal to the reference."""
        return self.num_wrong == 0

    def over_bound(self, metric: Metric) -> Spread | None:
        """The time over its bound, of restoration or to the first token."""
        return self.ttft_over_bound if metric == "ttft" else self.restore_over_bound

    def time_s(self, metric: Metric) -> Spread | None:
        """The time itself."""
        return self.ttft_s if metric == "ttft" else self.restore_s


@dataclass(frozen=True, slots=True)
class SettingSummary:
    """Every policy in one setting, in the order they first ran, with the medians of the two bounds."""

    setting: Setting
    policies: tuple[PolicySummary, ...]
    bound_restore_s: float | None
    bound_ttft_s: float | None

    @property
    def disturbed(self) -> bool:
        """Whether the machine changed its speed under the runs, so that their times say little.

        Either a median lies clearly under its bound, which nothing can, or compute alone varied by more than a third.
        """
        recompute = self.of("recompute")
        times = recompute.restore_s if recompute else None
        ratios = [ratio for policy in self.policies if (ratio := policy.over_bound(self.metric)) is not None]
        uneven = times is not None and times.high > MAX_UNEVEN * times.low
        return uneven or any(ratio.median < IMPOSSIBLE for ratio in ratios)

    @property
    def metric(self) -> Metric:
        """What counts here: time to first token, or restoration when there is no suffix."""
        return "ttft" if self.setting.suffix_tokens else "restore"

    def of(self, policy: str) -> PolicySummary | None:
        """The summary of one policy; None when it did not run here."""
        return next((p for p in self.policies if p.policy == policy), None)


def summarise(records: Sequence[RestoreRecord]) -> list[SettingSummary]:
    """Group records by setting and summarise each policy; settings ascend, policies keep their order.

    A repeat that was run again (same setting, policy and repeat) counts once, with its last record.
    """
    settings: dict[Setting, dict[str, dict[int, RestoreRecord]]] = {}
    for record in records:
        runs = settings.setdefault(Setting.of(record), {}).setdefault(record.policy, {})
        runs[record.repeat] = record
    return [_summarise_setting(setting, settings[setting]) for setting in sorted(settings)]


Runs = Mapping[int, RestoreRecord]


def _summarise_setting(setting: Setting, by_policy: Mapping[str, Runs]) -> SettingSummary:
    metric: Metric = "ttft" if setting.suffix_tokens else "restore"
    every = [run for runs in by_policy.values() for run in runs.values()]
    bounds = {m: Spread.of(b for run in every if (b := _bound_s(run, m)) is not None) for m in ("restore", "ttft")}
    restore, ttft = bounds["restore"], bounds["ttft"]
    return SettingSummary(
        setting=setting,
        policies=tuple(_summarise_policy(policy, by_policy, metric) for policy in by_policy),
        bound_restore_s=restore.median if restore else None,
        bound_ttft_s=ttft.median if ttft else None,
    )


def _summarise_policy(policy: str, by_policy: Mapping[str, Runs], metric: Metric) -> PolicySummary:
    runs = by_policy[policy]
    num_wrong = sum(not run.timed for run in runs.values())
    failed_loads = sum(run.failed_loads for run in runs.values())
    if num_wrong:
        return PolicySummary(policy=policy, num_runs=len(runs), num_wrong=num_wrong, failed_loads=failed_loads)
    rival = _best_rival(policy, by_policy, metric)
    over_rival, breaks_promise = _against(runs, by_policy[rival], metric) if rival else (None, False)
    listed = list(runs.values())
    cells = [run.recomputed_cells + run.loaded_cells for run in listed]
    return PolicySummary(
        policy=policy,
        num_runs=len(runs),
        num_wrong=0,
        restore_s=Spread.of(_times(listed, "restore")),
        ttft_s=Spread.of(_times(listed, "ttft")),
        restore_over_bound=Spread.of(_over_bound(listed, "restore")),
        ttft_over_bound=Spread.of(_over_bound(listed, "ttft")),
        rival=rival,
        over_rival=over_rival,
        breaks_promise=breaks_promise,
        compute_busy=_median(run.compute_busy for run in listed),
        io_busy=_median(run.io_busy for run in listed),
        loaded_bytes=_median(run.loaded_bytes for run in listed),
        recomputed_share=_median(run.recomputed_cells / n for run, n in zip(listed, cells, strict=True) if n),
        failed_loads=failed_loads,
    )


def _best_rival(policy: str, by_policy: Mapping[str, Runs], metric: Metric) -> str | None:
    """The other policy with the least median; its luckiest run does not count, so noise picks no rival."""
    medians = {
        other: median(times)
        for other, runs in by_policy.items()
        if other != policy and all(run.timed for run in runs.values()) and (times := _times(runs.values(), metric))
    }
    return min(medians, key=lambda other: medians[other]) if medians else None


def _against(runs: Runs, rival_runs: Runs, metric: Metric) -> tuple[Spread | None, bool]:
    """Ratios to the rival within each shared repeat, and whether the median difference breaks the promise."""
    pairs = [
        (mine, theirs)
        for repeat, run in runs.items()
        if repeat in rival_runs
        and (mine := _time_s(run, metric)) is not None
        and (theirs := _time_s(rival_runs[repeat], metric)) is not None
    ]
    ratios = Spread.of(mine / theirs for mine, theirs in pairs if theirs > 0)
    excess = Spread.of(mine - PROMISE_FACTOR * theirs for mine, theirs in pairs)
    return ratios, excess is not None and excess.median > PROMISE_S


def _time_s(run: RestoreRecord, metric: Metric) -> float | None:
    return run.ttft_s if metric == "ttft" else run.restore_s


def _bound_s(run: RestoreRecord, metric: str) -> float | None:
    return run.bound_ttft_s if metric == "ttft" else run.bound_restore_s


def _times(runs: Iterable[RestoreRecord], metric: Metric) -> list[float]:
    return [time_s for run in runs if (time_s := _time_s(run, metric)) is not None]


def _over_bound(runs: Iterable[RestoreRecord], metric: Metric) -> list[float]:
    return [
        time_s / bound_s
        for run in runs
        if (time_s := _time_s(run, metric)) is not None and (bound_s := _bound_s(run, metric))
    ]


def _median(values: Iterable[float | None]) -> float | None:
    listed = [value for value in values if value is not None]
    return median(listed) if listed else None
