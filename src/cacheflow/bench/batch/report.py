"""What ``bench batch`` shows: policies against the bounds, the simulator against what happened, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.batch.policies import OURS
from cacheflow.bench.batch.summary import (
    CLEARLY,
    Agreement,
    BatchSummary,
    ContenderSummary,
    simulator_agreement,
    starvation_kept,
    summarise_batches,
    ttft_by_request,
)
from cacheflow.bench.chart import (
    INK,
    STYLES,
    UNKNOWN_STYLE,
    Points,
    add_legend,
    draw_bound,
    draw_line,
    label_ratios,
    new_figure,
    save_figure,
)
from cacheflow.bench.records.batch import BatchRecord
from cacheflow.bench.spread import Spread
from cacheflow.bench.table import (
    LOSES,
    NOTHING,
    WRONG,
    Row,
    busy,
    median_ratio,
    median_time,
    not_equal,
    runs,
    seconds,
    text_table,
)

HEADS = ("policy", "mean", "×", "p99", "last", "×", "late", "busy C/IO", "×rival", "equal")
LEGEND = (
    "mean, p99: time to first token; last: the last first token; ×: over its bound;\n"
    "late: requests past their deadline, median; busy C/IO: compute and link until\n"
    "all prefixes were restored; ×rival: what the policy minimises (slo: one more\n"
    "than are late) over the best of those that are not ours; equal: KV and logits\n"
    "equal the reference bit for bit"
)


def batch_tables(records: Sequence[BatchRecord]) -> RenderableType:
    """A table for each setting, then the simulator's, with legends."""
    summaries, agreement = summarise_batches(records), simulator_agreement(records)
    parts: list[RenderableType] = [_table(summary) for summary in summaries]
    if parts:
        parts.append(Text(LEGEND, style="dim"))
    if any(policy.loses for summary in summaries for policy in summary.policies):
        parts.append(Text(f"{LOSES} a rival does better by what the policy minimises", style="dim"))
    if agreement is not None:
        parts.append(_agreement_table(agreement))
    return Group(*parts)


def _agreement_table(agreement: Agreement) -> Table:
    ranked = f"{agreement.num_ranked_alike} of {agreement.num_pairs}" if agreement.num_pairs else NOTHING
    rows: list[Row] = [
        (("TTFT of a request", f"{agreement.median_error:.1%}", f"{agreement.max_error:.1%}"), None),
        (("mean TTFT of a batch", f"{agreement.mean_ttft_error:.1%}"), None),
        (("makespan of a batch", f"{agreement.makespan_error:.1%}"), None),
        ((f"pairs more than {CLEARLY - 1:.0%} apart ranked alike", ranked), None),
    ]
    title = f"simulator against reality, {agreement.num_requests} requests"
    return text_table(title, ("what", "median error", "greatest error"), rows)


def _table(summary: BatchSummary) -> Table:
    setting = summary.setting
    due = f"due after {setting.slo_factor:g} × alone, " if setting.slo_factor else ""
    arrivals = f"{setting.arrival_gap_s:g} s apart" if setting.arrival_gap_s else "together"
    title = (
        f"{setting.model} {setting.dtype} on {setting.device}: {len(setting.lengths)} requests {arrivals}, "
        f"{sum(setting.lengths):,} cached + {setting.suffix_tokens} new tokens each, "
        f"load/compute {setting.load_compute_ratio:g}, "
        f"{due}{runs(max(policy.num_runs for policy in summary.policies))}"
    )
    starved = setting.starvation_s != float("inf")
    rows: list[Row] = [
        (_cells(policy, starved=starved), "bold" if policy.policy in OURS else None) for policy in summary.policies
    ]
    bound = ("lower bound", seconds(summary.bound_mean_ttft_s), "1.00", "", seconds(summary.bound_makespan_s), "1.00")
    return text_table(title, (*HEADS, "starved") if starved else HEADS, rows, last=bound)


def _cells(policy: ContenderSummary, *, starved: bool) -> list[str]:
    late = policy["num_late"]
    if policy.num_wrong:
        row = [policy.policy, *[WRONG] * 6, NOTHING, NOTHING, not_equal(policy.num_wrong, policy.num_runs)]
    else:
        row = [
            policy.policy,
            median_time(policy["mean_ttft_s"]),
            median_ratio(policy["mean_over_bound"]),
            median_time(policy["p99_ttft_s"]),
            median_time(policy["makespan_s"]),
            median_ratio(policy["makespan_over_bound"]),
            NOTHING if late is None else f"{late.median:g}",
            busy(policy),
            median_ratio(policy.over_rival) + LOSES * policy.loses,
            "yes",
        ]
    kept = {True: "kept", False: "[red]broken[/red]", None: NOTHING}
    return [*row, kept[starvation_kept(policy)]] if starved else row


def draw_batches(records: Sequence[BatchRecord], out: Path) -> list[Path]:
    """One figure for all ratios of a study; wrong policies are left out.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    studies: dict[object, list[BatchSummary]] = {}
    for summary in summarise_batches(records):
        studies.setdefault(replace(summary.setting, load_compute_ratio=0.0), []).append(summary)
    names = ["batch.png"] if len(studies) == 1 else [f"batch-{number}.png" for number in range(1, len(studies) + 1)]
    return [_draw(study, out / name) for study, name in zip(studies.values(), names, strict=True)]


def _draw(summaries: Sequence[BatchSummary], path: Path) -> Path:
    """Mean TTFT and makespan over the load/compute ratio, and the TTFT of each request."""
    figure, panels = new_figure(num_panels=3, num_columns=3, panel_size=(4.6, 3.9))
    ratios = [summary.setting.load_compute_ratio for summary in summaries]
    for axes, label, lines, bounds_s in (
        (panels[0], "mean time to first token [s]", _lines(summaries, "mean_ttft_s"),
         [each.bound_mean_ttft_s for each in summaries]),
        (panels[1], "last first token [s]", _lines(summaries, "makespan_s"),
         [each.bound_makespan_s for each in summaries]),
    ):  # fmt: skip
        for policy, points in lines.items():
            draw_line(axes, policy, points)
        draw_bound(axes, list(zip(ratios, bounds_s, strict=True)))
        label_ratios(axes, ratios, x_label="load time / recompute time of all prefixes", y_label=label)
        axes.set_ylim(bottom=0.0)
    middle = min(summaries, key=lambda each: abs(each.setting.load_compute_ratio - 1.0))
    setting, requests = middle.setting, panels[2]
    order = sorted(range(len(setting.lengths)), key=lambda index: setting.lengths[index])
    for each in middle.policies:
        if each.exact:
            colour, marker = STYLES.get(each.policy, UNKNOWN_STYLE)
            by_request_s = ttft_by_request(each)
            times_s = [by_request_s[index] for index in order]
            requests.plot(range(len(times_s)), times_s, color=colour, marker=marker, linewidth=0.8, markersize=5)
    requests.set_xticks(range(len(order)), [f"{length:,}" for length in sorted(setting.lengths)], rotation=45)
    requests.set_ylim(bottom=0.0)
    requests.set_xlabel("cached tokens of the request")
    requests.set_ylabel("time to first token [s]")
    requests.set_title(f"load/compute {setting.load_compute_ratio:g}", fontsize=9, color=INK)
    add_legend(figure, panels[:1], most_columns=9)
    title = (
        f"{setting.model}, {setting.dtype}, {setting.device}: {len(setting.lengths)} requests, "
        f"{sum(setting.lengths):,} cached + {setting.suffix_tokens} new tokens each"
    )
    return save_figure(figure, path, title=title)


def _lines(summaries: Sequence[BatchSummary], measure: str) -> dict[str, Points]:
    """By policy, what was measured at each ratio."""
    lines: dict[str, list[tuple[float, Spread]]] = {}
    for summary in summaries:
        for each in summary.policies:
            if (spread := each[measure]) is not None:
                lines.setdefault(each.policy, []).append((summary.setting.load_compute_ratio, spread))
    return dict(lines)
