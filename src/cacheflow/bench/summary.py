"""Restorations summarised: medians and spreads of ratios, each ratio taken between runs of the same repeat.

Policies alternate within a repeat, so that drift of the machine (heat, neighbours) hits both sides of a ratio alike;
the median is over repeats of ratios, never a ratio of medians of runs that were not side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.record import Environment, RestoreRecord
from cacheflow.bench.spread import Spread, best_rival, by_setting, median_or_none
from cacheflow.bench.table import (
    BREAKS,
    DISTURBED,
    LOSES,
    NOTHING,
    WRONG,
    Row,
    markdown_table,
    median_ratio,
    median_time,
    not_equal,
    percent,
    runs,
    seconds,
    size,
    text_table,
)

OURS = "cacheflow"
"""The policy whose losses are flagged."""
PROMISE_FACTOR = 1.02
"""A policy of ours may be this much slower than its best rival, plus ``PROMISE_S``."""
PROMISE_S = 0.005
IMPOSSIBLE = 0.95
"""A ratio to the lower bound under this comes from a bound and a run measured at different speeds of the machine."""
MAX_UNEVEN = 1.33
"""Slowest over fastest pure recomputation of one setting, above which the machine counts as disturbed."""
LEGEND = (
    "×: over the lower bound; ×rival: over the best other policy; busy C/IO: compute and link while restoring;\n"
    "equal: KV cache, logits and tokens equal the reference bit for bit, in every run"
)
_CHECKED = "the KV cache and the tokens of the reference, bit for bit"
_CHECKED_BY_CLIENT = "the tokens of stock vLLM"

Metric = Literal["restore", "ttft"]


@dataclass(frozen=True, slots=True, order=True)
class RunSetting:
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
    def of(cls, record: RestoreRecord) -> RunSetting:
        """The setting of a record; the ratio is rounded to three digits so that repeats fall together."""
        same = ("suite", "model", "device", "dtype", "num_tokens", "suffix_tokens", "chunk_tokens", "layers_per_block",
                "store", "fingerprint")  # fmt: skip
        return cls(
            **{name: getattr(record, name) for name in same},
            perturbation=json.dumps(dict(record.perturbation), sort_keys=True),
            load_compute_ratio=float(f"{record.load_compute_ratio:.3g}"),
        )

    @property
    def metric(self) -> Metric:
        """What counts here: time to first token, or restoration when there is no suffix."""
        return "ttft" if self.suffix_tokens else "restore"

    @property
    def lengths(self) -> str:
        """The lengths, for people."""
        return f"{self.num_tokens:,} cached + {self.suffix_tokens:,} new tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySummary:
    """One policy in one setting, over all its repeats.

    Times and ratios are None when a run of the policy was wrong (nothing of it is shown then) or had no suffix.

    Attributes:
        num_wrong: Repeats whose check failed or was not made.
        rival: The other policy with the least median time (to first token, without a suffix of restoration).
        over_rival: That time over the rival's in the same repeat.
        breaks_promise: Whether the median is over ``PROMISE_FACTOR`` times the rival's plus ``PROMISE_S``.
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

    @property
    def flag(self) -> str:
        """The mark of a policy of ours that lost to its best rival; empty for rivals and where ours won."""
        if self.policy != OURS or self.over_rival is None:
            return ""
        if self.breaks_promise:
            return BREAKS
        return LOSES if self.over_rival.median > 1.0 else ""


@dataclass(frozen=True, slots=True)
class SettingSummary:
    """Every policy in one setting, in the order they first ran, with the medians of the two bounds."""

    setting: RunSetting
    policies: tuple[PolicySummary, ...]
    bound_restore_s: float | None
    bound_ttft_s: float | None

    @property
    def metric(self) -> Metric:
        """What counts here."""
        return self.setting.metric

    @property
    def bound_s(self) -> float | None:
        """The bound on what counts here."""
        return self.bound_ttft_s if self.metric == "ttft" else self.bound_restore_s

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

    def of(self, policy: str) -> PolicySummary | None:
        """The summary of one policy; None when it did not run here."""
        return next((p for p in self.policies if p.policy == policy), None)


def summarise(records: Sequence[RestoreRecord]) -> list[SettingSummary]:
    """Group records by setting and summarise each policy; settings ascend, policies keep their order."""
    return [_summarise_setting(*pair) for pair in sorted(by_setting(records, RunSetting.of).items())]


Runs = Mapping[int, RestoreRecord]


def _summarise_setting(setting: RunSetting, by_policy: Mapping[str, Runs]) -> SettingSummary:
    every = [run for group in by_policy.values() for run in group.values()]
    return SettingSummary(
        setting=setting,
        policies=tuple(_summarise_policy(policy, by_policy, setting.metric) for policy in by_policy),
        bound_restore_s=median_or_none(run.bound_restore_s for run in every),
        bound_ttft_s=median_or_none(run.bound_ttft_s for run in every),
    )


def _summarise_policy(policy: str, by_policy: Mapping[str, Runs], metric: Metric) -> PolicySummary:
    listed = list(by_policy[policy].values())
    num_wrong = sum(not run.timed for run in listed)
    failed_loads = sum(run.failed_loads for run in listed)
    if num_wrong:
        return PolicySummary(policy=policy, num_runs=len(listed), num_wrong=num_wrong, failed_loads=failed_loads)
    others = {name: group for name, group in by_policy.items() if name != policy}
    rival = best_rival(others, lambda run: _time_s(run, metric), lambda run: run.timed)
    over_rival, breaks_promise = _against(by_policy[policy], by_policy[rival], metric) if rival else (None, False)
    cells = [run.recomputed_cells + run.loaded_cells for run in listed]
    return PolicySummary(
        policy=policy,
        num_runs=len(listed),
        num_wrong=0,
        restore_s=Spread.of(run.restore_s for run in listed),
        ttft_s=Spread.of(run.ttft_s for run in listed),
        restore_over_bound=Spread.of(_ratio(run.restore_s, run.bound_restore_s) for run in listed),
        ttft_over_bound=Spread.of(_ratio(run.ttft_s, run.bound_ttft_s) for run in listed),
        rival=rival,
        over_rival=over_rival,
        breaks_promise=breaks_promise,
        compute_busy=median_or_none(run.compute_busy for run in listed),
        io_busy=median_or_none(run.io_busy for run in listed),
        loaded_bytes=median_or_none(run.loaded_bytes for run in listed),
        recomputed_share=median_or_none(run.recomputed_cells / n for run, n in zip(listed, cells, strict=True) if n),
        failed_loads=failed_loads,
    )


def _against(mine: Runs, theirs: Runs, metric: Metric) -> tuple[Spread | None, bool]:
    """Ratios to the rival within each shared repeat, and whether the median difference breaks the promise."""
    pairs = [
        (mine_s, theirs_s)
        for repeat, run in mine.items()
        if repeat in theirs
        and (mine_s := _time_s(run, metric)) is not None
        and (theirs_s := _time_s(theirs[repeat], metric)) is not None
    ]
    excess = Spread.of(mine_s - PROMISE_FACTOR * theirs_s for mine_s, theirs_s in pairs)
    return Spread.of(_ratio(*pair) for pair in pairs), excess is not None and excess.median > PROMISE_S


def _time_s(run: RestoreRecord, metric: Metric) -> float | None:
    return run.ttft_s if metric == "ttft" else run.restore_s


def _ratio(time_s: float | None, base_s: float | None) -> float | None:
    return time_s / base_s if time_s is not None and base_s else None


def console_tables(summaries: Sequence[SettingSummary]) -> RenderableType:
    """One table a setting, with a legend when something in them needs one."""
    parts: list[RenderableType] = [_console_table(summary) for summary in summaries]
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(summary.disturbed for summary in summaries):
        parts.append(Text(DISTURBED, style="yellow"))
    if any(policy.flag for summary in summaries for policy in summary.policies):
        parts.append(Text(f"{LOSES} behind the best rival   {BREAKS} by more than 2 % + 5 ms", style="dim"))
    return Group(*parts)


def _console_table(summary: SettingSummary) -> Table:
    setting = summary.setting
    num_runs = max((policy.num_runs for policy in summary.policies), default=0)
    details = [
        f"{setting.model} {setting.dtype} on {setting.device}: {setting.lengths}",
        f"load/compute {setting.load_compute_ratio:g}",
        setting.perturbation if setting.perturbation != "{}" else "",
        f"{setting.layers_per_block} layers a block" if setting.layers_per_block > 1 else "",
        f"{setting.store} store" if setting.store != "memory" else "",
        f"{runs(num_runs)}{' ~' if summary.disturbed else ''}",
    ]
    # Columns that would say nothing are left out, so that most tables fit 80 characters.
    times = ["restore", "restore ×", "TTFT", "TTFT ×"] if summary.metric == "ttft" else ["restore", "restore ×"]
    heads = ["policy", *times, *(["spread"] if num_runs > 2 else []), "×rival", "busy C/IO", "loaded", "equal"]
    rows: list[Row] = []
    for policy in summary.policies:
        cells = _console_cells(policy, summary.metric)
        rows.append(([cells[head] for head in heads], "bold" if policy.policy == OURS else None))
    bounds = {"restore": summary.bound_restore_s, "TTFT": summary.bound_ttft_s}
    shown = {head: seconds(bound_s) for head, bound_s in bounds.items() if bound_s is not None}
    bound = {"policy": "lower bound", **shown, **{f"{head} ×": "1.00" for head in shown}}
    return text_table(", ".join(filter(None, details)), heads, rows, last=[bound.get(head, "") for head in heads])


def _console_cells(policy: PolicySummary, metric: Metric) -> dict[str, str]:
    """Cells by head."""
    if not policy.exact:
        heads = ("restore", "restore ×", "TTFT", "TTFT ×", "spread", "×rival")
        blank = {**dict.fromkeys(heads, WRONG), "busy C/IO": NOTHING, "loaded": NOTHING}
        return {"policy": policy.policy, **blank, "equal": not_equal(policy.num_wrong, policy.num_runs)}
    spread = policy.over_bound(metric)
    return {
        "policy": policy.policy,
        "restore": median_time(policy.restore_s),
        "restore ×": median_ratio(policy.restore_over_bound),
        "TTFT": median_time(policy.ttft_s),
        "TTFT ×": median_ratio(policy.ttft_over_bound),
        "spread": NOTHING if spread is None else f"{spread.low:.2f}–{spread.high:.2f}",
        "×rival": median_ratio(policy.over_rival) + policy.flag,
        "busy C/IO": f"{percent(policy.compute_busy)}/{percent(policy.io_busy)}",
        "loaded": NOTHING if policy.loaded_bytes is None else size(policy.loaded_bytes),
        "equal": "yes",
    }


def sweep_markdown(summaries: Sequence[SettingSummary]) -> str:
    """One Markdown table: a row a policy, a column a load/compute ratio, the bound below.

    Raises:
        ValueError: No settings, or two with the same ratio: they must differ in the ratio alone.
    """
    ratios = [summary.setting.load_compute_ratio for summary in summaries]
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"one setting for each load/compute ratio is needed, got ratios {ratios}")
    names = list(dict.fromkeys(policy.policy for summary in summaries for policy in summary.policies))
    rows = [_markdown_row(name, [(each.of(name), each.metric) for each in summaries]) for name in names]
    bounds = [NOTHING if each.bound_s is None else f"*{seconds(each.bound_s)}*" for each in summaries]
    heads = ["load time / compute time", *(f"{ratio:g}" for ratio in ratios)]
    return markdown_table(heads, [*rows, ["*lower bound*", *bounds]])


def _markdown_row(name: str, cells: Sequence[tuple[PolicySummary | None, Metric]]) -> list[str]:
    shown = [_markdown_cell(policy, metric) for policy, metric in cells]
    if name != OURS:
        return [name, *shown]
    return [f"**{name}**", *(f"**{cell}**" if cell != NOTHING else cell for cell in shown)]


def _markdown_cell(policy: PolicySummary | None, metric: Metric) -> str:
    if policy is None:
        return NOTHING
    if not policy.exact:
        return f"{WRONG} ({policy.num_wrong} of {policy.num_runs})"
    time_s, ratio = policy.time_s(metric), policy.over_bound(metric)
    if time_s is None:
        return NOTHING
    bracket = f" ({ratio.median:.2f}×)" if ratio else ""
    return f"{seconds(time_s.median)}{bracket} {policy.flag}".rstrip()


def sweep_caption(summaries: Sequence[SettingSummary], environment: Environment) -> str:
    """What such a table shows and where it was measured, in one paragraph."""
    setting = summaries[0].setting
    counts = [policy.num_runs for summary in summaries for policy in summary.policies]
    what = "Time to first token" if setting.metric == "ttft" else "Restoration time"
    repeats = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    flags = {policy.flag for summary in summaries for policy in summary.policies}
    marks = {LOSES: "behind its best rival", BREAKS: "behind it by more than 2 % + 5 ms"}
    legend = "".join(f" {mark}: {text}." for mark, text in marks.items() if mark in flags)
    device = str(environment.get("accelerator") or environment.get("cpu") or setting.device)
    threads = f" ({environment['num_threads']} threads)" if environment.get("num_threads") else ""
    packages = ("torch", "vllm" if environment.get("vllm") else "transformers")
    versions = ", ".join(f"{name} {environment.get(name)}" for name in packages)
    return (
        f"{what}, median of {repeats} alternating runs, and in brackets its ratio to the lower bound. "
        f"{setting.model}, {setting.dtype}, {setting.num_tokens:,} cached and {setting.suffix_tokens:,} new tokens, "
        f"on {device}{threads}, {versions}. Every run shown gave "
        f"{_CHECKED_BY_CLIENT if environment.get('vllm') else _CHECKED}.{legend}"
    )
