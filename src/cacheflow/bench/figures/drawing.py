"""Pictures of figures, from records alone; one PNG a figure, a row of panels a chart.

matplotlib is imported when a picture is drawn, and without a display (Agg).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cacheflow.bench.chart import (
    BOUND,
    BOUND_COLOUR,
    FRONT,
    INK,
    STYLES,
    add_legend,
    draw_bound,
    draw_line,
    new_figure,
    save_figure,
)
from cacheflow.bench.figures.gains import gains
from cacheflow.bench.figures.registry import FIGURES, Chart, ChartKind, Figure
from cacheflow.bench.records.figure import PROBABILITIES, FigureRecord
from cacheflow.bench.spread import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_SIZE = (3.9, 3.0)
ONLY_PANEL_SIZE = (8.4, 4.4)
"""Inches; one alone must be as wide as its title and legend."""
MAX_COLUMNS = 4
DARK_RATIO = 1.25
"""A map's colours are dark above it."""
Panel = tuple[Chart, str, list[FigureRecord]]


def draw_figures(records: Sequence[FigureRecord], out_dir: Path) -> list[Path]:
    """Draw every figure that the records hold; returns the files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    written = []
    for figure in FIGURES.values():
        found = [record for record in records if record.suite == figure.suite]
        if found:
            written.append(_draw(figure, found, out_dir / f"{figure.suite}.png"))
    return written


def _draw(figure: Figure, records: Sequence[FigureRecord], path: Path) -> Path:
    panels = [panel for chart in figure.charts for panel in _panels(chart, records)]
    picture, axes_of = new_figure(
        num_panels=len(panels),
        num_columns=min(len(panels), _columns(figure, len(panels))),
        panel_size=PANEL_SIZE if len(panels) > 1 else ONLY_PANEL_SIZE,
    )
    names = [name for name in STYLES if any(record.series == name for record in records)]
    for axes, (chart, title, found) in zip(axes_of, panels, strict=True):
        _DRAW[chart.kind](axes, chart, found, names)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel(chart.x_label, fontsize=8)
        axes.set_ylabel(chart.y_label, fontsize=8)
    add_legend(picture, axes_of, most_columns=5)
    return save_figure(picture, path, title=f"Figure {figure.number}: {figure.title}")


def _columns(figure: Figure, num_panels: int) -> int:
    """A row for each chart where that is not too wide."""
    per_chart = num_panels // len(figure.charts)
    if len(figure.charts) > 1 and per_chart == 1:
        return min(num_panels, MAX_COLUMNS)
    return per_chart if per_chart <= MAX_COLUMNS else 3 if num_panels % 3 == 0 else MAX_COLUMNS


def _panels(chart: Chart, records: Sequence[FigureRecord]) -> list[Panel]:
    found: dict[str, list[FigureRecord]] = {}
    for record in records:
        title = ", ".join(_text(field, getattr(record, field)) for field in chart.panel if field != "suite")
        found.setdefault(title, []).append(record)
    return [(chart, title, members) for title, members in found.items()]


def _text(field: str, value: object) -> str:
    """A value as a title shows it."""
    units = {"num_tokens": "tokens", "suffix_tokens": "new", "chunk_tokens": "a chunk"}
    if field in units and isinstance(value, int | float):
        return f"{value:,.0f} {units[field]}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _lines(axes: Axes, chart: Chart, records: Sequence[FigureRecord], names: Sequence[str]) -> None:
    for name in names:
        points = sorted((getattr(r, chart.x), getattr(r, chart.y)) for r in records if r.series == name)
        draw_line(axes, name, [(x, Spread(y, y, y)) for x, y in points])
    if chart.bound:
        draw_bound(axes, sorted({getattr(r, chart.x): getattr(r, chart.bound) for r in records}.items()))
    else:
        axes.axhline(1.0, color=BOUND_COLOUR, linestyle="--", linewidth=1.2, label=BOUND, zorder=1)
    _scales(axes, chart)


def _scales(axes: Axes, chart: Chart) -> None:
    if chart.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", labelrotation=40)
    _scale_y(axes, chart)


def _scale_y(axes: Axes, chart: Chart) -> None:
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", labelsize=7)


def _bars(axes: Axes, chart: Chart, records: Sequence[FigureRecord], names: Sequence[str]) -> None:
    groups = list(dict.fromkeys(getattr(record, chart.x) for record in records))
    for place, group in enumerate(groups):
        members = {record.series: record for record in records if getattr(record, chart.x) == group}
        shown = [name for name in names if name in members]
        width = 0.84 / len(shown)
        for index, name in enumerate(shown):
            x = place - 0.42 + (index + 0.5) * width
            label = name if place == 0 or len(members) != len(names) else None
            axes.bar(x, getattr(members[name], chart.y), width=width, color=STYLES[name][0], label=label, zorder=2)
            if chart.bound:
                least = getattr(members[name], chart.bound)
                axes.plot(
                    [x - width / 2, x + width / 2], [least, least], color=BOUND_COLOUR, linewidth=1.4, zorder=4,
                    label=BOUND,
                )  # fmt: skip
    _scale_y(axes, chart)
    axes.set_xticks(range(len(groups)), [_text(chart.x, group) for group in groups])
    axes.grid(visible=False, axis="x")


def _distribution(axes: Axes, chart: Chart, records: Sequence[FigureRecord], names: Sequence[str]) -> None:
    for name in names:
        for record in records:
            if record.series == name and record.ttft_quantiles_s:
                front = name in FRONT
                axes.plot(
                    record.ttft_quantiles_s, PROBABILITIES, color=STYLES[name][0], label=name,
                    linewidth=2.2 if front else 1.2, zorder=5 if front else 3,
                )  # fmt: skip
    least = next((record.bound_quantiles_s for record in records if record.bound_quantiles_s), ())
    if least:
        draw_bound(axes, list(zip(least, PROBABILITIES, strict=True)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.tick_params(axis="x", which="both", labelrotation=60, labelsize=7)


def _map(axes: Axes, chart: Chart, records: Sequence[FigureRecord], names: Sequence[str]) -> None:
    del names
    cells = gains(records)
    xs = sorted({getattr(cell.ours, chart.x) for cell in cells}, key=float)
    ys = sorted({getattr(cell.ours, chart.y) for cell in cells}, key=float)
    values = [[math.nan] * len(xs) for _ in ys]
    for cell in cells:
        x, y = xs.index(getattr(cell.ours, chart.x)), ys.index(getattr(cell.ours, chart.y))
        values[y][x] = ratio = 1.0 / cell.over_rival
        axes.text(
            x, y, f"{ratio:.2f}{' ×' if cell.loses else ''}", ha="center", va="center", fontsize=5.5,
            color="white" if ratio > DARK_RATIO else INK, fontweight="bold" if cell.loses else "normal",
        )  # fmt: skip
    axes.imshow(values, cmap="RdYlGn_r", vmin=0.6, vmax=1.4, aspect="auto", origin="lower")
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs], rotation=60)
    axes.set_yticks(range(len(ys)), [f"{y:,.0f}" for y in ys])
    axes.grid(visible=False)


_DRAW: Mapping[ChartKind, Callable[[Axes, Chart, Sequence[FigureRecord], Sequence[str]], None]] = {
    ChartKind.LINES: _lines,
    ChartKind.BARS: _bars,
    ChartKind.DISTRIBUTION: _distribution,
    ChartKind.MAP: _map,
}
