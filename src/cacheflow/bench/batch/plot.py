"""The figure of a batch study: mean TTFT and makespan over the load/compute ratio, and the TTFT of each request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cacheflow.bench.batch.policies import OURS
from cacheflow.bench.batch.summary import BatchSummary, ContenderSummary
from cacheflow.bench.chart import BOUND_COLOUR, INK, new_figure, save_figure
from cacheflow.bench.summary import Spread

STYLES = {
    "cake": ("#E69F00", "^"),
    "fcfs": ("#999999", "s"),
    "longest_first": ("#CC79A7", "P"),
    "dp": ("#009E73", "X"),
    "mean_ttft": ("#D55E00", "o"),
    "p99_ttft": ("#0072B2", "v"),
    "makespan": ("#56B4E9", "D"),
    "slo": ("#F0E442", "*"),
}
"""Colour and marker by policy. Source: the colour-blind-safe palette of Okabe and Ito (2008)."""


Points = list[tuple[float, Spread]]


def draw_batches(summaries: Sequence[BatchSummary], path: Path) -> Path:
    """Draw the ratios of one study, which must differ in the ratio alone; wrong policies are left out.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, (mean, makespan, requests) = new_figure(num_panels=3, num_columns=3, panel_size=(4.6, 3.9))
    ratios = [summary.setting.load_compute_ratio for summary in summaries]
    for axes, label, lines, bounds_s in (
        (mean, "mean time to first token [s]", _means(summaries), [each.bound_mean_ttft_s for each in summaries]),
        (makespan, "last first token [s]", _makespans(summaries), [each.bound_makespan_s for each in summaries]),
    ):
        for policy, points in lines.items():
            colour, marker = STYLES.get(policy, (INK, "."))
            known, spreads = [ratio for ratio, _ in points], [spread for _, spread in points]
            low, high = [each.low for each in spreads], [each.high for each in spreads]
            axes.fill_between(known, low, high, color=colour, alpha=0.15, linewidth=0)
            medians, width = [each.median for each in spreads], 2.2 if policy in OURS else 1.3
            axes.plot(known, medians, color=colour, marker=marker, linewidth=width, label=policy)
        axes.plot(ratios, bounds_s, color=BOUND_COLOUR, linewidth=1.2, linestyle="--", marker="_", label="lower bound")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("load time / recompute time of all prefixes")
        axes.set_ylabel(label)
    middle = min(summaries, key=lambda each: abs(each.setting.load_compute_ratio - 1.0))
    lengths = sorted(middle.setting.lengths)
    for policy, times_s in _by_length(middle).items():
        colour, marker = STYLES.get(policy, (INK, "."))
        requests.plot(range(len(times_s)), times_s, color=colour, marker=marker, linewidth=0.8, markersize=5)
    requests.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    requests.set_ylim(bottom=0.0)
    requests.set_xlabel("cached tokens of the request")
    requests.set_ylabel("time to first token [s]")
    requests.set_title(f"load/compute {middle.setting.load_compute_ratio:g}", fontsize=9, color=INK)
    handles, labels = mean.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 9), frameon=False)
    figure.suptitle(_title(middle), fontsize=10, color=INK)
    return save_figure(figure, path)


def _means(summaries: Sequence[BatchSummary]) -> dict[str, Points]:
    return _lines(summaries, lambda each: each.mean_ttft_s)


def _makespans(summaries: Sequence[BatchSummary]) -> dict[str, Points]:
    return _lines(summaries, lambda each: each.makespan_s)


def _lines(
    summaries: Sequence[BatchSummary], measure: Callable[[ContenderSummary], Spread | None]
) -> dict[str, Points]:
    """By policy, what was measured at each ratio."""
    lines: dict[str, Points] = {}
    for summary in summaries:
        for each in summary.policies:
            if (spread := measure(each)) is not None:
                lines.setdefault(each.policy, []).append((summary.setting.load_compute_ratio, spread))
    return lines


def _by_length(summary: BatchSummary) -> dict[str, list[float]]:
    """By policy, the times to first token of all requests, the shortest prefix first."""
    lengths = summary.setting.lengths
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return {
        each.policy: [each.ttft_by_request[index] for index in order]
        for each in summary.policies
        if each.ttft_by_request
    }


def _title(summary: BatchSummary) -> str:
    setting = summary.setting
    return (
        f"{setting.model}, {setting.dtype}, {setting.device}: {len(setting.lengths)} requests, "
        f"{sum(setting.lengths):,} cached + {setting.suffix_tokens} new tokens each"
    )
