"""The figure of ``bench vllm``: time to first token over the load/compute ratio, with the bound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cacheflow.bench.chart import BOUND_COLOUR, new_figure, policy_names, policy_style, save_figure
from cacheflow.bench.summary import OURS, SettingSummary, summarise
from cacheflow.bench.vllm.record import ITL_SLO_MS, VllmRecord

STYLES = {
    "vllm": ("#999999", "s"),
    "vllm_offloading": ("#0072B2", "v"),
    "lmcache": ("#CC79A7", "P"),
}
"""Of policies that only run inside vLLM. Source of the colours: Okabe and Ito (2008), as in ``plots``."""


def draw_vllm(records: Sequence[VllmRecord], out_dir: Path) -> list[Path]:
    """Draw one figure per model, length and neighbour; returns the files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    sweeps: dict[str, list[SettingSummary]] = {}
    for summary in summarise(records):
        setting = summary.setting
        slo_ms = json.loads(setting.perturbation).get(ITL_SLO_MS)
        beside = "" if setting.perturbation == "{}" else "-neighbour" + (f"-slo{slo_ms:g}" if slo_ms else "")
        name = f"vllm-{setting.model}-{setting.num_tokens}-{setting.suffix_tokens}{beside}".replace("/", "-")
        sweeps.setdefault(name, []).append(summary)
    return [_draw(sweep, out_dir / f"{name}.png") for name, sweep in sweeps.items()]


def _draw(sweep: Sequence[SettingSummary], path: Path) -> Path:
    figure, (axes,) = new_figure(num_panels=1, num_columns=1, panel_size=(6.4, 4.4))
    for name in policy_names(sweep):
        points = [
            (summary.setting.load_compute_ratio, spread)
            for summary in sweep
            if (policy := summary.of(name)) is not None and (spread := policy.ttft_s) is not None
        ]
        if not points:
            continue  # wrong everywhere: no time of it may be shown
        colour, marker = STYLES.get(name) or policy_style(name)
        ratios, medians = [ratio for ratio, _ in points], [spread.median for _, spread in points]
        errors = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
        width, order = (2.4, 5) if name == OURS else (1.3, 3)
        axes.errorbar(
            ratios, medians, yerr=errors, color=colour, marker=marker, linewidth=width, zorder=order, label=name
        )
    bounds = [(s.setting.load_compute_ratio, s.bound_ttft_s) for s in sweep if s.bound_ttft_s is not None]
    axes.plot(
        [ratio for ratio, _ in bounds], [each for _, each in bounds], color=BOUND_COLOUR, linestyle="--",
        linewidth=1.2, label="lower bound", zorder=2,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [summary.setting.load_compute_ratio for summary in sweep]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    marks = [mark for mark in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= mark <= high]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_xlabel("time to load everything / time vLLM needs to prefill it")
    axes.set_ylabel("time to first token [s]")
    setting = sweep[0].setting
    beside = "" if setting.perturbation == "{}" else ", beside a decoding request"
    axes.set_title(
        f"{setting.model} in vLLM on {setting.device}: {setting.num_tokens:,} cached + {setting.suffix_tokens:,} new "
        f"tokens{beside}",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
