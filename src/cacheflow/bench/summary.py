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

from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.spread import (
    Measure,
    PolicySummary,
    Spread,
    by_setting,
    median_or_none,
    ratio,
    summarise_policies,
)
from cacheflow.bench.table import (
    BREAKS,
    DISTURBED,
    LOSES,
    NOTHING,
    WRONG,
    Row,
    busy,
    markdown_table,
    median_ratio,
    median_time,
    not_equal,
    runs,
    seconds,
    size,
    text_table,
)
from cacheflow.errors import ConfigError

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


MEASURES: Mapping[str, Measure[RestoreRecord]] = {
    "restore_s": lambda run: run.restore_s,
    "ttft_s": lambda run: run.ttft_s,
    "restore_over_bound": lambda run: ratio(run.restore_s, run.bound_restore_s),
    "ttft_over_bound": lambda run: ratio(run.ttft_s, run.bound_ttft_s),
    "compute_busy": lambda run: run.compute_busy,
    "io_busy": lambda run: run.io_busy,
    "loaded_bytes": lambda run: run.loaded_bytes,
}
"""What is summarised; of a time to first token nothing is known without a suffix."""
RestoreSummary = PolicySummary[RestoreRecord]


def breaks_promise(policy: RestoreSummary) -> bool:
    """Whether the median is over ``PROMISE_FACTOR`` times the rival's plus ``PROMISE_S``."""
    excess_s = Spread.of(mine_s - PROMISE_FACTOR * theirs_s for mine_s, theirs_s in policy.pairs)
    return excess_s is not None and excess_s.median > PROMISE_S


def flag(policy: RestoreSummary) -> str:
    """The mark of a policy of ours that lost to its best rival; empty for rivals and where ours won."""
    if policy.policy != OURS:
        return ""
    return BREAKS if breaks_promise(policy) else LOSES if policy.loses else ""


@dataclass(frozen=True, slots=True)
class SettingSummary:
    """Every policy in one setting, in the order they first ran, with the medians of the two bounds."""

    setting: RunSetting
    policies: tuple[RestoreSummary, ...]
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
        times = recompute["restore_s"] if recompute else None
        uneven = times is not None and times.high > MAX_UNEVEN * times.low
        ratios = [policy[f"{self.metric}_over_bound"] for policy in self.policies]
        return uneven or any(each.median < IMPOSSIBLE for each in ratios if each is not None)

    def of(self, policy: str) -> RestoreSummary | None:
        """The summary of one policy; None when it did not run here."""
        return next((p for p in self.policies if p.policy == policy), None)


def summarise(records: Sequence[RestoreRecord]) -> list[SettingSummary]:
    """Group records by setting and summarise each policy; settings ascend, policies keep their order."""
    return [_summarise_setting(*pair) for pair in sorted(by_setting(records, RunSetting.of).items())]


def _summarise_setting(setting: RunSetting, by_policy: Mapping[str, Mapping[int, RestoreRecord]]) -> SettingSummary:
    every = [run for group in by_policy.values() for run in group.values()]
    policies = summarise_policies(
        by_policy,
        MEASURES,
        counts=lambda policy: MEASURES[f"{setting.metric}_s"],
        is_rival=lambda policy, other: policy != other,
        is_good=lambda run: run.timed,
    )
    return SettingSummary(
        setting=setting,
        policies=policies,
        bound_restore_s=median_or_none(run.bound_restore_s for run in every),
        bound_ttft_s=median_or_none(run.bound_ttft_s for run in every),
    )


def console_tables(summaries: Sequence[SettingSummary]) -> RenderableType:
    """One table a setting, with a legend when something in them needs one."""
    parts: list[RenderableType] = [_console_table(summary) for summary in summaries]
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(summary.disturbed for summary in summaries):
        parts.append(Text(DISTURBED, style="yellow"))
    if any(flag(policy) for summary in summaries for policy in summary.policies):
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


def _console_cells(policy: RestoreSummary, metric: Metric) -> dict[str, str]:
    """Cells by head."""
    if not policy.exact:
        heads = ("restore", "restore ×", "TTFT", "TTFT ×", "spread", "×rival")
        blank = {**dict.fromkeys(heads, WRONG), "busy C/IO": NOTHING, "loaded": NOTHING}
        return {"policy": policy.policy, **blank, "equal": not_equal(policy.num_wrong, policy.num_runs)}
    spread, loaded = policy[f"{metric}_over_bound"], policy["loaded_bytes"]
    return {
        "policy": policy.policy,
        "restore": median_time(policy["restore_s"]),
        "restore ×": median_ratio(policy["restore_over_bound"]),
        "TTFT": median_time(policy["ttft_s"]),
        "TTFT ×": median_ratio(policy["ttft_over_bound"]),
        "spread": NOTHING if spread is None else f"{spread.low:.2f}–{spread.high:.2f}",
        "×rival": median_ratio(policy.over_rival) + flag(policy),
        "busy C/IO": busy(policy),
        "loaded": NOTHING if loaded is None else size(loaded.median),
        "equal": "yes",
    }


def sweep_markdown(summaries: Sequence[SettingSummary], *, policies: Sequence[str] | None = None) -> str:
    """One Markdown table: a row a policy, a column a load/compute ratio, the bound below.

    Args:
        summaries: Settings that differ in the ratio alone.
        policies: The rows; None: every policy that ran.

    Raises:
        ValueError: No settings, or two with the same ratio: they must differ in the ratio alone.
    """
    ratios = [summary.setting.load_compute_ratio for summary in summaries]
    if not ratios or len(set(ratios)) != len(ratios):
        raise ValueError(f"one setting for each load/compute ratio is needed, got ratios {ratios}")
    names = policies or list(dict.fromkeys(policy.policy for summary in summaries for policy in summary.policies))
    rows = [_markdown_row(name, [(each.of(name), each.metric) for each in summaries]) for name in names]
    bounds = [NOTHING if each.bound_s is None else f"*{seconds(each.bound_s)}*" for each in summaries]
    heads = ["load time / compute time", *(f"{ratio:g}" for ratio in ratios)]
    return markdown_table(heads, [*rows, ["*lower bound*", *bounds]])


def by_store_markdown(summaries: Sequence[SettingSummary], *, policies: Sequence[str] | None = None) -> str:
    """One Markdown table: a row a store, a column a policy, the bound at the right.

    Args:
        summaries: Settings that differ in the store, and in the load/compute ratio that it gives.
        policies: The columns; None: every policy that ran.

    Raises:
        ConfigError: Two settings have the same store.
    """
    stores = [summary.setting.store for summary in summaries]
    if twice := sorted({each for each in stores if stores.count(each) > 1}):
        raise ConfigError(f"runs of several links to one store, {', '.join(twice)}: keep them in files apart")
    names = policies or list(dict.fromkeys(policy.policy for summary in summaries for policy in summary.policies))
    rows = []
    for each in sorted(summaries, key=lambda summary: summary.setting.load_compute_ratio):
        cells = [_markdown_row(name, [(each.of(name), each.metric)])[1] for name in names]
        bound = NOTHING if each.bound_s is None else f"*{seconds(each.bound_s)}*"
        rows.append([each.setting.store, f"{each.setting.load_compute_ratio:g}", *cells, bound])
    return markdown_table(["store", "load time / compute time", *names, "*lower bound*"], rows)


def _markdown_row(name: str, cells: Sequence[tuple[RestoreSummary | None, Metric]]) -> list[str]:
    shown = [_markdown_cell(policy, metric) for policy, metric in cells]
    if name != OURS:
        return [name, *shown]
    return [f"**{name}**", *(f"**{cell}**" if cell != NOTHING else cell for cell in shown)]


def _markdown_cell(policy: RestoreSummary | None, metric: Metric) -> str:
    if policy is None:
        return NOTHING
    if not policy.exact:
        return f"{WRONG} ({policy.num_wrong} of {policy.num_runs})"
    time_s, over = policy[f"{metric}_s"], policy[f"{metric}_over_bound"]
    if time_s is None:
        return NOTHING
    bracket = f" ({over.median:.2f}×)" if over else ""
    return f"{seconds(time_s.median)}{bracket} {flag(policy)}".rstrip()


def sweep_caption(summaries: Sequence[SettingSummary], environment: Environment) -> str:
    """What such a table shows and where it was measured, in one paragraph."""
    setting = summaries[0].setting
    counts = [policy.num_runs for summary in summaries for policy in summary.policies]
    what = "Time to first token" if setting.metric == "ttft" else "Restoration time"
    repeats = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    flags = {flag(policy) for summary in summaries for policy in summary.policies}
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
