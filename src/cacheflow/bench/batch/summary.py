"""Records of batches to summaries: medians by setting and policy, and how far the simulator was from what happened.

Policies are compared within a repeat, where they served the same order of arrival side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from cacheflow.bench.batch.policies import OURS
from cacheflow.bench.records.batch import BatchRecord
from cacheflow.bench.spread import Measure, PolicySummary, by_setting, summarise_policies

CLEARLY = 1.05
"""Two policies differ when one takes this many times as long; the simulator must rank those alike."""

MEASURES: Mapping[str, Measure[BatchRecord]] = {
    "mean_ttft_s": lambda run: run.mean_ttft_s,
    "p99_ttft_s": lambda run: run.p99_ttft_s,
    "makespan_s": lambda run: run.makespan_s,
    "mean_over_bound": lambda run: run.mean_ttft_s / run.bound_mean_ttft_s,
    "makespan_over_bound": lambda run: run.makespan_s / run.bound_makespan_s,
    "num_late": lambda run: run.num_late,
    "compute_busy": lambda run: run.compute_busy,
    "io_busy": lambda run: run.io_busy,
}
"""What is summarised."""
OBJECTIVES: Mapping[str, Measure[BatchRecord]] = {
    "mean_ttft": MEASURES["mean_ttft_s"],
    "p99_ttft": MEASURES["p99_ttft_s"],
    "makespan": MEASURES["makespan_s"],
    "slo": lambda run: 1.0 + run.num_late,
}
"""By policy of ours: what it minimises. One more than the late requests, so that ratios exist."""
ContenderSummary = PolicySummary[BatchRecord]


@dataclass(frozen=True, slots=True, order=True)
class BatchSetting:
    """What must be equal for two runs to be compared."""

    model: str
    device: str
    dtype: str
    lengths: tuple[int, ...]
    suffix_tokens: int
    chunk_tokens: int
    arrival_gap_s: float
    starvation_s: float
    load_compute_ratio: float
    slo_factor: float = 0.0
    fingerprint: str = ""

    @classmethod
    def of(cls, record: BatchRecord) -> BatchSetting:
        """The setting of a record."""
        same = ("model", "device", "dtype", "lengths", "suffix_tokens", "chunk_tokens", "arrival_gap_s", "fingerprint")
        return cls(
            **{name: getattr(record, name) for name in same},
            starvation_s=float("inf") if record.starvation_s is None else record.starvation_s,
            load_compute_ratio=float(f"{record.load_compute_ratio:.3g}"),
            slo_factor=record.slo_factor or 0.0,
        )


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """Every policy in one setting, in the order of their first runs, and the median bounds."""

    setting: BatchSetting
    policies: tuple[ContenderSummary, ...]
    bound_mean_ttft_s: float
    bound_makespan_s: float

    def of(self, policy: str) -> ContenderSummary | None:
        """The summary of one policy; None when it did not run here."""
        return next((each for each in self.policies if each.policy == policy), None)


def summarise_batches(records: Sequence[BatchRecord]) -> list[BatchSummary]:
    """Group records by setting and summarise each policy; settings ascend, policies keep their order."""
    return [
        BatchSummary(
            setting=setting,
            policies=summarise_policies(
                by_policy,
                MEASURES,
                counts=OBJECTIVES.get,
                is_rival=lambda policy, other: other not in OURS,
                is_good=lambda run: run.is_good,
            ),
            bound_mean_ttft_s=median(run.bound_mean_ttft_s for runs in by_policy.values() for run in runs.values()),
            bound_makespan_s=median(run.bound_makespan_s for runs in by_policy.values() for run in runs.values()),
        )
        for setting, by_policy in sorted(by_setting(records, BatchSetting.of).items())
    ]


def starvation_kept(policy: ContenderSummary) -> bool | None:
    """Whether the bound on starvation was kept in every repeat; None without one."""
    kept = [run.starvation_kept for run in policy.runs]
    return None if None in kept else all(kept)


def ttft_by_request(policy: ContenderSummary) -> tuple[float, ...]:
    """Median time to first token of each request, by its index among the lengths."""
    by_index: dict[int, list[float]] = {}
    for run in policy.runs:
        for index, request in zip(run.order, run.requests, strict=True):
            by_index.setdefault(index, []).append(request.ttft_s)
    return tuple(median(by_index[index]) for index in sorted(by_index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the simulator was from what happened.

    Attributes:
        median_error: Median of ``|simulated - measured| / measured`` of the time to first token.
        mean_ttft_error: Median of the same of the mean over a batch.
        makespan_error: Median of the same of the makespan.
        num_pairs: Pairs of policies in one repeat whose mean time to first token, or makespan, clearly differed.
    """

    num_requests: int
    median_error: float
    max_error: float
    mean_ttft_error: float
    makespan_error: float
    num_pairs: int
    num_ranked_alike: int


def simulator_agreement(records: Sequence[BatchRecord]) -> Agreement | None:
    """Compare every correct record with its simulation; None without any."""
    checked = [record for record in records if record.correct]
    if not checked:
        return None
    errors = [
        abs(simulated_s - request.ttft_s) / request.ttft_s
        for record in checked
        for request, simulated_s in zip(record.requests, record.simulated.ttft_s, strict=True)
    ]
    alike = [each for pair in _side_by_side(checked) for each in _ranked_alike(*pair)]
    return Agreement(
        num_requests=len(errors),
        median_error=median(errors),
        max_error=max(errors),
        mean_ttft_error=median(abs(r.simulated.mean_ttft_s - r.mean_ttft_s) / r.mean_ttft_s for r in checked),
        makespan_error=median(abs(r.simulated.makespan_s - r.makespan_s) / r.makespan_s for r in checked),
        num_pairs=len(alike),
        num_ranked_alike=sum(alike),
    )


def _side_by_side(records: Sequence[BatchRecord]) -> Iterable[tuple[BatchRecord, BatchRecord]]:
    for by_policy in by_setting(records, lambda record: (BatchSetting.of(record), record.repeat)).values():
        yield from combinations((record for runs in by_policy.values() for record in runs.values()), 2)


def _ranked_alike(one: BatchRecord, other: BatchRecord) -> Iterable[bool]:
    """For each measure by which two runs clearly differ, whether the simulator says the same is less."""
    pairs = (
        ((one.mean_ttft_s, other.mean_ttft_s), (one.simulated.mean_ttft_s, other.simulated.mean_ttft_s)),
        ((one.makespan_s, other.makespan_s), (one.simulated.makespan_s, other.simulated.makespan_s)),
    )
    for measured, simulated in pairs:
        if max(measured) > CLEARLY * min(measured):
            yield (measured[0] < measured[1]) == (simulated[0] < simulated[1])
