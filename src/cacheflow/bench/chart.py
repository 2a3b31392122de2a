"""Charts: one style, lines and bars, and the figures of a sweep over load/compute ratios.

matplotlib is imported when a figure is drawn, here and in ``timeline`` only, and without a display (Agg).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.spread import Spread
from cacheflow.bench.summary import OURS, Metric, SettingSummary, summarise
from cacheflow.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
MAX_COLUMNS = 3
INK = "#222222"
FAINT = "#8a8a8a"
BOUND_COLOUR = "#000000"
BOUND = "lower bound"

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
UNKNOWN_STYLE = ("#F0E442", "*")
STYLES: dict[str, tuple[str, str]] = {
    **POLICY_STYLES,
    "vllm": POLICY_STYLES["recompute"],
    "vllm_offloading": POLICY_STYLES["layerwise_load"],
    "lmcache": POLICY_STYLES["cacheflow_v1"],
    "cacheflow, fcfs": ("#8C2D04", "h"),
    "cacheflow, slo": ("#8C2D04", "h"),
    "token-wise": POLICY_STYLES["cake"],
    "layer-wise": POLICY_STYLES["layerwise_load"],
    "layer-wise, one pass": POLICY_STYLES["load"],
    "without GPU axis": POLICY_STYLES["cacheflow_v1"],
    "with GPU axis": POLICY_STYLES["cacheflow"],
    "fcfs": POLICY_STYLES["recompute"],
    "longest_first": POLICY_STYLES["cacheflow_v1"],
    "dp": POLICY_STYLES["cacheflow_v2"],
    "p99_ttft": POLICY_STYLES["layerwise_load"],
    "makespan": POLICY_STYLES["load"],
    "slo": UNKNOWN_STYLE,
    "mean_ttft": POLICY_STYLES["cacheflow"],
}
"""Of policies and of everything else that is a line or a bar, in the order of legends."""
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#999999")
"""For lines that have no style of their own."""
FRONT = (OURS, "mean_ttft", "with GPU axis")
"""Drawn thicker, above the others."""
RATIO_LABELS: dict[Metric, str] = {
    "restore": "restoration time / lower bound",
    "ttft": "time to first token / lower bound",
}

Points = Sequence[tuple[float, Spread]]


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


def save_figure(figure: Figure, path: Path, *, title: str = "") -> Path:
    """Write the figure in the format of the path's ending, creating its folder; returns the path."""
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": "cacheflow"})
    return path


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


def in_order(names: Iterable[str]) -> list[str]:
    """Policies in a fixed order that does not depend on which ran first, those we do not know first; ours last."""
    ran = dict.fromkeys(names)
    return [*(name for name in ran if name not in POLICY_STYLES), *(name for name in POLICY_STYLES if name in ran)]


def draw_line(axes: Axes, name: str, points: Points, *, colour: str = "") -> None:
    """Medians as a line with its marker, and a band from the least to the greatest; nothing without points."""
    if not points:
        return
    own, marker = STYLES.get(name, UNKNOWN_STYLE)
    front = name in FRONT
    xs, spreads = [x for x, _ in points], [spread for _, spread in points]
    lows, highs = [spread.low for spread in spreads], [spread.high for spread in spreads]
    axes.fill_between(xs, lows, highs, color=colour or own, alpha=0.15, linewidth=0)
    axes.plot(
        xs, [spread.median for spread in spreads], color=colour or own, marker="o" if colour else marker, label=name,
        markersize=6 if front else 4.5, linewidth=2.4 if front else 1.3, zorder=5 if front else 3,
    )  # fmt: skip


def draw_bound(axes: Axes, points: Sequence[tuple[float, float | None]], *, colour: str = "") -> None:
    """The lower bound as a dashed line; in a colour of its own it is one of several, and not in the legend."""
    known = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], color=colour or BOUND_COLOUR, linestyle="--",
              linewidth=1.0 if colour else 1.2, label="_" if colour else BOUND, zorder=6)  # fmt: skip


def label_ratios(axes: Axes, ratios: Sequence[float], *, x_label: str, y_label: str) -> None:
    """Load/compute ratios along a logarithmic axis."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def add_legend(figure: Figure, panels: Sequence[Axes], *, most_columns: int) -> None:
    """One legend below the panels, with every label of theirs once."""
    labelled = {}
    for axes in panels:
        labelled.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if labelled:
        figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", frameon=False, fontsize=8,
                      ncols=min(len(labelled), most_columns))  # fmt: skip


def draw_results(records: Sequence[RestoreRecord], out_dir: Path) -> list[Path]:
    """Draw every figure that records support; returns the files written, one set a study.

    Raises:
        ConfigError: No run may be shown, or matplotlib is not installed.
    """
    summaries = summarise(records)
    if not any(policy.exact for summary in summaries for policy in summary.policies):
        raise ConfigError("there is no run whose result was checked and right; nothing to draw")
    written: list[Path] = []
    for name, sweeps in studies(summaries).items():
        if any(len(sweep) > 1 for sweep in sweeps):
            written.append(draw_over_bound(sweeps, out_dir / f"{name}-over-bound.png"))
        for sweep in sweeps:
            bars = f"ttft-{sweep[0].setting.suffix_tokens}" if sweep[0].metric == "ttft" else "restore"
            written.append(draw_time_bars(sweep, out_dir / f"{name}-{bars}.png"))
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
        for name in in_order(policy.policy for summary in sweep for policy in summary.policies):
            draw_line(axes, name, [
                (summary.setting.load_compute_ratio, spread)
                for summary in sweep
                if (policy := summary.of(name)) is not None and (spread := policy[f"{metric}_over_bound"]) is not None
            ])  # fmt: skip
        axes.axhline(1.0, color=BOUND_COLOUR, linewidth=1.2, linestyle="--", zorder=1)
        label_ratios(
            axes, [summary.setting.load_compute_ratio for summary in sweep], y_label=RATIO_LABELS[metric],
            x_label="time to load everything / time to recompute everything",
        )  # fmt: skip
        _stretch_near_bound(axes)
    add_legend(figure, panels[:1], most_columns=7)
    return save_figure(figure, path, title=_title(sweeps[-1][0]))


def draw_time_bars(sweep: Sequence[SettingSummary], path: Path) -> Path:
    """Time to first token (or of restoration, without a suffix) per policy, a panel a ratio, the bound as a line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    num_columns = min(len(sweep), MAX_COLUMNS)
    panel_size = (6.5, 3.2) if num_columns == 1 else (10.4 / num_columns, 2.8)
    figure, panels = new_figure(num_panels=len(sweep), num_columns=num_columns, panel_size=panel_size)
    names = in_order(policy.policy for summary in sweep for policy in summary.policies)
    for index, (axes, summary) in enumerate(zip(panels, sweep, strict=True)):
        _draw_bars(axes, summary, names)
        uneven = " ~ (the machine was busy)" if summary.disturbed else ""
        axes.set_title(f"load/compute {summary.setting.load_compute_ratio:g}{uneven}", fontsize=9, color=INK)
        axes.set_yticks(range(len(names)), names if index % num_columns == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.9)
        axes.set_xlabel("time to first token [s]" if summary.metric == "ttft" else "restoration time [s]", fontsize=8)
    return save_figure(figure, path, title=_title(sweep[0]))


def studies(summaries: Sequence[SettingSummary]) -> dict[str, list[list[SettingSummary]]]:
    """By file name: the sweeps over ratios of one study, fewest new tokens first (restoration alone leads)."""
    others: dict[str, set[str]] = {}
    for summary in summaries:
        others.setdefault(summary.setting.model, set()).add(summary.setting.fingerprint)
    found: dict[str, dict[int, list[SettingSummary]]] = {}
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


def _title(summary: SettingSummary) -> str:
    setting = summary.setting
    return f"{setting.model}, {setting.dtype}, {setting.device}: {setting.lengths}"


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


def _draw_bars(axes: Axes, summary: SettingSummary, names: Sequence[str]) -> None:
    metric, bound_s = summary.metric, summary.bound_s
    longest = max((s.high for p in summary.policies if (s := p[f"{metric}_s"]) is not None), default=1.0)
    for row, name in enumerate(names):
        policy = summary.of(name)
        spread = policy[f"{metric}_s"] if policy else None
        if spread is None:
            text = "wrong" if policy and not policy.exact else "not run"
            axes.text(0.02 * longest, row, text, va="center", fontsize=8, color=FAINT)
            continue
        errors = [[spread.median - spread.low], [spread.high - spread.median]]
        colour, _ = STYLES.get(name, UNKNOWN_STYLE)
        axes.barh(row, spread.median, color=colour, height=0.68, xerr=errors, ecolor=INK, zorder=2)
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


def draw_distributions(
    percentiles_s: Mapping[str, Mapping[str, float]], path: Path, *, title: str, dashed: str
) -> Path:
    """Distributions of the time to first token, one a name, as steps.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    same_style = {"vllm": "recompute", "lmcache": "load", "hicache": "layerwise_load", dashed: OURS}
    figure, [axes] = new_figure(num_panels=1, num_columns=1, panel_size=(6.5, 4.1))
    for name, by_percent in percentiles_s.items():
        points = sorted((float(percent), ttft_s) for percent, ttft_s in by_percent.items())
        colour, _ = STYLES.get(same_style.get(name, name), UNKNOWN_STYLE)
        # Steps: a percentile is the least value that so many do not exceed.
        axes.step(
            [s for _, s in points], [p for p, _ in points], where="post", color=colour, label=name,
            linewidth=2.4 if name == OURS else 1.3, linestyle="--" if name == dashed else "-",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xlabel("time to first token [s]")
    axes.set_ylabel("requests [%]")
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path, title=title)
