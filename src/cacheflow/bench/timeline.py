"""The timeline picture: what compute and I/O did when, and which cell each of them restored.

Spans are plain data, kept beside the results as ``timelines.json`` so that a picture can be drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cacheflow.bench.chart import BOUND, BOUND_COLOUR, FAINT, INK, empty_figure, plain, save_figure
from cacheflow.bench.table import seconds
from cacheflow.errors import ConfigError
from cacheflow.plan.report import Lane, RestoreReport, Span, SpanKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_COLOURS: dict[SpanKind, str] = {
    SpanKind.RECOMPUTE: "#D55E00",
    SpanKind.KV_ONLY: "#F2B48A",
    SpanKind.LOAD: "#0072B2",
    SpanKind.BOUNDARY: "#56B4E9",
    SpanKind.FAILED: "#000000",
    SpanKind.WASTED: "#BBBBBB",
    SpanKind.SUFFIX: "#009E73",
    SpanKind.REPAIR: "#CC79A7",
}
KIND_LABELS: dict[SpanKind, str] = {
    SpanKind.RECOMPUTE: "recomputed",
    SpanKind.KV_ONLY: "recomputed, K/V only",
    SpanKind.LOAD: "loaded",
    SpanKind.BOUNDARY: "boundary states read",
    SpanKind.FAILED: "read failed",
    SpanKind.WASTED: "read for nothing",
    SpanKind.SUFFIX: "new tokens",
    SpanKind.REPAIR: "recomputed after a failed read",
}
MAX_SEAMS = 40
"""With more chunks than this, white seams between them would pale the colour of the grid."""
_RESTORES = (SpanKind.RECOMPUTE, SpanKind.KV_ONLY, SpanKind.LOAD, SpanKind.REPAIR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One restoration to draw.

    Attributes:
        bound_s: The least possible time to first token (to restoration, without a suffix).
    """

    label: str
    spans: tuple[Span, ...]
    num_chunks: int
    num_blocks: int
    restore_s: float
    ttft_s: float | None
    bound_s: float | None

    @classmethod
    def of(cls, report: RestoreReport, *, bound_s: float | None, label: str | None = None) -> Timeline:
        """The timeline of a restoration that ran; labelled with its policy unless given another."""
        return cls(
            label=label or report.plan.policy,
            spans=report.spans,
            num_chunks=len(report.cells_KB),
            num_blocks=len(report.cells_KB[0]) if report.cells_KB else 1,
            restore_s=report.restore_s,
            ttft_s=report.ttft_s,
            bound_s=bound_s,
        )

    @property
    def end_s(self) -> float:
        """When everything that is drawn is over."""
        return max(self.restore_s, self.ttft_s or 0.0, self.bound_s or 0.0, *(s.end_s for s in self.spans), 0.0)

    def outcomes(self) -> dict[tuple[int, int], SpanKind]:
        """How each cell ``(chunk, block)`` was restored in the end; the last span that restored it counts."""
        restored: dict[tuple[int, int], SpanKind] = {}
        for span in sorted(self.spans, key=lambda s: s.end_s):
            if span.kind in _RESTORES:
                restored.update({(span.chunk, block): span.kind for block in range(span.block_lo, span.block_hi)})
        return restored


def write_timelines(path: Path, timelines: Sequence[Timeline]) -> None:
    """Keep timelines as JSON; replaces the file."""
    path.write_bytes(msgspec.json.encode(list(timelines)) + b"\n")


def read_timelines(path: Path) -> list[Timeline]:
    """Read what ``write_timelines`` wrote.

    Raises:
        ConfigError: The file cannot be read or holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Timeline])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"timelines file {path} cannot be read: {error}") from error


def draw_timelines(timelines: Sequence[Timeline], path: Path, *, title: str = "") -> Path:
    """Stack timelines on one time axis, each with its compute and I/O lane and the grid of its cells beside it.

    Dashed line: the bound. Solid line: the first token. Draws thousands of spans as one collection a colour.

    Raises:
        ConfigError: There is nothing to draw, or matplotlib is not installed.
    """
    if not timelines:
        raise ConfigError("no timelines to draw")
    rows = len(timelines)
    figure = empty_figure(width=10.0, height=1.2 * rows + 1.1)
    panels = figure.subplots(rows, 2, squeeze=False, width_ratios=[4.6, 1.0])
    end_s = max(timeline.end_s for timeline in timelines)
    for index, timeline in enumerate(timelines):
        lanes, grid = panels[index]
        _draw_lanes(lanes, timeline, end_s)
        _draw_cells(grid, timeline)
        if index + 1 < rows:
            lanes.set_xticklabels([])
    panels[-1][0].set_xlabel("seconds since the request")
    panels[-1][1].set_xlabel("chunk of the prefix", fontsize=8)
    _draw_legend(panels[0][0], timelines)
    return save_figure(figure, path, title=title)


def _draw_lanes(axes: Axes, timeline: Timeline, end_s: float) -> None:
    plain(axes)
    for kind, colour in KIND_COLOURS.items():
        for lane, bottom in ((Lane.COMPUTE, 1.06), (Lane.IO, 0.06)):
            least_s = 0.003 * end_s if kind is SpanKind.FAILED else 0.0  # a failure is short and must be seen
            bars = [
                (s.start_s, max(s.end_s - s.start_s, least_s))
                for s in timeline.spans
                if s.kind is kind and s.lane is lane
            ]
            if bars:
                mean_s = sum(width for _, width in bars) / len(bars)
                # White seams would pale narrow bars; an edge of their own colour keeps them from vanishing.
                edge, line = ("white", 0.4) if mean_s > end_s / 100 else (colour, 0.3)
                order = 3 if kind is SpanKind.FAILED else 2
                axes.broken_barh(bars, (bottom, 0.88), facecolors=colour, edgecolor=edge, linewidth=line, zorder=order)
    axes.set_xlim(0, 1.06 * end_s)
    axes.set_ylim(0, 2)
    axes.set_yticks([0.5, 1.5], ["I/O", "compute"])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_title(timeline.label, fontsize=9, color=INK, loc="left", pad=3, fontweight="bold")
    if timeline.bound_s is not None:
        axes.axvline(timeline.bound_s, color=BOUND_COLOUR, linewidth=1.2, linestyle="--", zorder=5)
    done_s = timeline.restore_s if timeline.ttft_s is None else timeline.ttft_s
    axes.axvline(done_s, color=INK, linewidth=1.6, zorder=5)
    over = "" if not timeline.bound_s else f" = {done_s / timeline.bound_s:.2f} × bound"
    axes.set_title(f"{seconds(done_s)}{over}", fontsize=9, color=INK, loc="right", pad=3)


def _draw_cells(axes: Axes, timeline: Timeline) -> None:
    """The grid: chunks from left to right, layer blocks from bottom to top, coloured by outcome."""
    from matplotlib.colors import to_rgb

    shape = (timeline.num_blocks, timeline.num_chunks)
    image = [[to_rgb("white")] * shape[1] for _ in range(shape[0])]
    for (chunk, block), kind in timeline.outcomes().items():
        image[block][chunk] = to_rgb(KIND_COLOURS[kind])
    axes.imshow(image, origin="lower", aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel("layer", fontsize=8, color=INK)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    if shape[1] <= MAX_SEAMS:
        axes.vlines([x - 0.5 for x in range(1, shape[1])], -0.5, shape[0] - 0.5, color="white", linewidth=0.4)


def _draw_legend(axes: Axes, timelines: Sequence[Timeline]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {span.kind for timeline in timelines for span in timeline.spans}
    handles: list[Patch | Line2D] = [
        Patch(facecolor=KIND_COLOURS[kind], label=KIND_LABELS[kind]) for kind in KIND_COLOURS if kind in used
    ]
    if any(timeline.bound_s is not None for timeline in timelines):
        handles.append(Line2D([], [], color=BOUND_COLOUR, linestyle="--", linewidth=1.2, label=BOUND))
    handles.append(Line2D([], [], color=INK, linewidth=1.6, label="first token"))
    figure = axes.get_figure()
    assert figure is not None, "axes that were just made belong to a figure"
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
