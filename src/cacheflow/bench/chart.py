"""Figures from a results file: time over the bound across load/compute ratios, and time to first token per policy.

matplotlib is imported when a figure is drawn, here and in ``timeline`` only, and without a display (Agg).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheflow.bench.record import read_records
from cacheflow.bench.summary import OURS, Metric, SettingSummary, summarise
from cacheflow.errors import ConfigError
from cacheflow.sim.policies import EMBEDDED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
MAX_COLUMNS = 3
INK = "#222222"
FAINT = "#8a8a8a"
BOUND_COLOUR = "#000000"

POLICY_STYLES: dict[str, tuple[str, str]] = {
    "recompute": ("#999999", "s"),
    "load": ("#56B4E9", "D"),
    "layerwise_load": ("#0072B2", "v"),
    "cake": ("#E69F00", "^"),
    "cacheflow_v1": ("#CC79A7", "P"),
    "cacheflow_v2": ("#009E73", "X"),
    "cacheflow": ("#D55E00", "o"),
}
"""Colour and marker by policy. Source: the colour-blind-safe palette of Okabe and Ito (2008)."""

RATIO_LABELS: dict[Metric, str] = {
    "restore": "restoration time / lower bound",
    "ttft": "time to first token / lower bound",
}


def draw_results(results: Path, out_dir: Path) -> list[Path]:
    """Draw every figure that a results file supports; returns the files written, one set a study.

    Raises:
        ConfigError: The file is malformed or holds no run that may be shown, or matplotlib is not installed.
    """
    summaries = summarise(read_records(results))
    if not any(policy.exact for summary in summaries for policy in summary.policies):
        raise ConfigError(f"{results} holds no run whose result was checked and right; nothing to draw")
    written: list[Path] = []
    for name, sweeps in studies(summaries).items():
        if any(len(sweep) > 1 for sweep in sweeps):
            written.append(draw_over_bound(sweeps, out_dir / f"{name}-over-bound.png"))
        written += [draw_time_bars(sweep, out_dir / f"{name}-{_bars_name(sweep[0])}.png") for sweep in sweeps]
    return written


def draw_over_bound(sweeps: Sequence[Sequence[SettingSummary]], path: Path) -> Path:
    """Time over the bound against the load/compute ratio, one panel a sweep, the bound as the line at 1.

    A sweep without new tokens shows restoration, one with new tokens the time to the first of them.

    The vertical axis is logarithmic in the distance to the bound, because that is where good policies differ. Lines
    are medians, bands reach from the least to the greatest repeat; a wrong policy is left out.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, panels = new_figure(num_panels=len(sweeps), num_columns=len(sweeps), panel_size=(5.2, 4.1))
    for axes, sweep in zip(panels, sweeps, strict=True):
        metric = sweep[0].metric
        for policy in policy_names(sweep):
            _draw_ratio_line(axes, sweep, policy, metric)
        axes.axhline(1.0, color=BOUND_COLOUR, linewidth=1.2, linestyle="--", zorder=1)
        axes.set_xscale("log", base=2)
        ticks = [summary.setting.load_compute_ratio for summary in sweep]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _stretch_near_bound(axes)
        axes.set_xlabel("time to load everything / time to recompute everything")
        axes.set_ylabel(RATIO_LABELS[metric])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    figure.suptitle(_title(sweeps[-1][0]), fontsize=10, color=INK)
    return save_figure(figure, path)


def draw_time_bars(sweep: Sequence[SettingSummary], path: Path) -> Path:
    """Time to first token (or of restoration, without a suffix) per policy, a panel a ratio, the bound as a line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    num_columns = min(len(sweep), MAX_COLUMNS)
    panel_size = (6.5, 3.2) if num_columns == 1 else (10.4 / num_columns, 2.8)
    figure, panels = new_figure(num_panels=len(sweep), num_columns=num_columns, panel_size=panel_size)
    metric = sweep[0].metric
    names = policy_names(sweep)
    for index, (axes, summary) in enumerate(zip(panels, sweep, strict=True)):
        _draw_bars(axes, summary, names, metric)
        axes.set_title(f"load/compute {summary.setting.load_compute_ratio:g}", fontsize=9, color=INK)
        axes.set_yticks(range(len(names)), names if index % num_columns == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.9)
        axes.set_xlabel("time to first token [s]" if metric == "ttft" else "restoration time [s]", fontsize=8)
    figure.suptitle(_title(sweep[0]), fontsize=10, color=INK)
    return save_figure(figure, path)


def new_figure(*, num_panels: int, num_columns: int, panel_size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of panels of ``panel_size`` inches, row by row, in our style; it never opens a window.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    num_rows = math.ceil(num_panels / num_columns)
    figure = empty_figure(width=panel_size[0] * num_columns, height=panel_size[1] * num_rows)
    panels = [figure.add_subplot(num_rows, num_columns, index + 1) for index in range(num_panels)]
    for axes in panels:
        plain(axes)
    return figure, panels


def empty_figure(*, width: float, height: float) -> Figure:
    """A figure without panels, of a size in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return _figure_class()(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def plain(axes: Axes) -> None:
    """Our axes: no box, a faint grid behind, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure in the format of the path's ending, creating its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": "cacheflow"})
    return path


def policy_names(sweep: Sequence[SettingSummary]) -> list[str]:
    """Every policy of a sweep, in a fixed order that does not depend on which ran first; ours last."""
    ran = dict.fromkeys(policy.policy for summary in sweep for policy in summary.policies)
    known = [name for name in POLICY_STYLES if name in ran]
    return [*(name for name in ran if name not in POLICY_STYLES), *known]


def policy_style(name: str) -> tuple[str, str]:
    """Colour and marker of a policy; policies we do not know share one."""
    return POLICY_STYLES.get(name, ("#F0E442", "*"))


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("figures need matplotlib: pip install 'cacheflow-kv[plots]'") from error

    class AggFigure(Figure):
        """A figure bound to the Agg canvas, whatever the user's matplotlib settings say."""

        canvas_class = FigureCanvasAgg

    return AggFigure


def studies(summaries: Sequence[SettingSummary]) -> dict[str, list[list[SettingSummary]]]:
    """By file name: the sweeps over ratios of one study, fewest new tokens first (restoration alone leads)."""
    found: dict[str, dict[int, list[SettingSummary]]] = {}
    others: dict[str, set[str]] = {}  # weights by the name of their model
    for summary in summaries:
        others.setdefault(summary.setting.model, set()).add(summary.setting.fingerprint)
    for summary in summaries:
        setting = summary.setting
        perturbed = "".join(c if c.isalnum() or c == "." else "-" for c in setting.perturbation).strip("-")
        words = [setting.suite, setting.model, setting.device, setting.dtype, perturbed]
        words += [str(setting.num_tokens), f"c{setting.chunk_tokens}"]
        words += [f"b{setting.layers_per_block}"] if setting.layers_per_block > 1 else []
        words += [setting.store] if setting.store != "memory" else []
        if number := sorted(others[setting.model]).index(setting.fingerprint):
            words.append(f"w{number + 1}")
        name = "-".join(word.replace("/", "-").replace(" ", "-") for word in words if word)
        found.setdefault(name, {}).setdefault(setting.suffix_tokens, []).append(summary)
    return {name: [sweeps[key] for key in sorted(sweeps)] for name, sweeps in found.items()}


def _bars_name(summary: SettingSummary) -> str:
    return f"ttft-{summary.setting.suffix_tokens}" if summary.metric == "ttft" else "restore"


def _title(summary: SettingSummary) -> str:
    setting = summary.setting
    return (
        f"{setting.model}, {setting.dtype}, {setting.device}: "
        f"{setting.num_tokens:,} cached + {setting.suffix_tokens:,} new tokens"
    )


def _draw_ratio_line(axes: Axes, sweep: Sequence[SettingSummary], name: str, metric: Metric) -> None:
    points = [
        (summary.setting.load_compute_ratio, spread)
        for summary in sweep
        if (policy := summary.of(name)) is not None and (spread := policy.over_bound(metric)) is not None
    ]
    if not points:
        return
    colour, marker = policy_style(name)
    ours = name == OURS
    ratios = [ratio for ratio, _ in points]
    order = 5 if ours else 3
    axes.fill_between(
        ratios, [s.low for _, s in points], [s.high for _, s in points], color=colour, alpha=0.15, linewidth=0
    )
    axes.plot(
        ratios,
        [s.median for _, s in points],
        color=colour,
        marker=marker,
        markersize=6 if ours else 4.5,
        linewidth=2.4 if ours else 1.3,
        label=name,
        zorder=order,
    )


def _stretch_near_bound(axes: Axes) -> None:
    import numpy as np

    origin = 0.88  # the axis is logarithmic in ratio - origin; ratios at or under it cannot be drawn
    axes.set_yscale(
        "function", functions=(lambda y: np.log(np.maximum(y, origin + 0.01) - origin), lambda z: np.exp(z) + origin)
    )
    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set_ylim(max(min(low - 0.01, 0.98), origin + 0.02), max(1.05 * high, 1.1))
    ticks = [tick for tick in (0.95, 1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20) if low - 0.02 <= tick <= 1.05 * high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _draw_bars(axes: Axes, summary: SettingSummary, names: Sequence[str], metric: Metric) -> None:
    bound_s = summary.bound_ttft_s if metric == "ttft" else summary.bound_restore_s
    longest = max((s.high for p in summary.policies if (s := p.time_s(metric)) is not None), default=1.0)
    for row, name in enumerate(names):
        policy = summary.of(name)
        spread = policy.time_s(metric) if policy else None
        if spread is None:
            text = "wrong" if policy and not policy.exact else "not run"
            axes.text(0.02 * longest, row, text, va="center", fontsize=8, color=FAINT)
            continue
        errors = [[spread.median - spread.low], [spread.high - spread.median]]
        axes.barh(row, spread.median, color=policy_style(name)[0], height=0.68, xerr=errors, ecolor=INK, zorder=2)
        label = f" {spread.median:.2f}" if longest >= 1 else f" {spread.median:.3f}"
        weight = "bold" if name == OURS else "normal"
        hidden = bound_s is not None and spread.high <= bound_s < spread.high + 0.14 * longest
        label_s = bound_s if hidden and bound_s is not None else spread.high
        axes.text(label_s, row, label, va="center", fontsize=8, color=INK, fontweight=weight)
    axes.set_xlim(0, 1.22 * longest)
    axes.grid(visible=False, axis="y")
    if bound_s is not None:
        axes.axvline(bound_s, color=BOUND_COLOUR, linewidth=1.2, linestyle="--", zorder=4)
        axes.text(bound_s, -0.62, " bound", fontsize=7, color=BOUND_COLOUR, ha="left", va="center")


def draw_ttft_cdf(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Distribution of the time to first token of simulations, one of each policy, all of one setting.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    same_style = {"vllm": "recompute", "lmcache": "load", "hicache": "layerwise_load", EMBEDDED: OURS}
    figure, [axes] = new_figure(num_panels=1, num_columns=1, panel_size=(6.5, 4.1))
    for each in records:
        name = each["policy"]
        points = sorted((float(percent), ttft_s) for percent, ttft_s in each["ttft_percentiles_s"].items())
        colour, _ = policy_style(same_style.get(name, name))
        width = 2.4 if name == OURS else 1.3
        dashes = "--" if name == EMBEDDED else "-"
        # Steps: a percentile is the least value that so many do not exceed.
        ttfts_s, percents = [s for _, s in points], [p for p, _ in points]
        axes.step(ttfts_s, percents, where="post", color=colour, linewidth=width, linestyle=dashes, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("time to first token [s]")
    axes.set_ylabel("requests [%]")
    axes.legend(frameon=False, fontsize=8)
    first = records[0]
    figure.suptitle(f"{first['workload']}: {first['model']}, costs {first['costs']}", fontsize=10, color=INK)
    return save_figure(figure, path)
