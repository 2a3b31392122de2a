"""Records of ``bench ranks`` as a table and a figure: how much faster more ranks restore, and how near their bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.chart import new_figure, save_figure
from cacheflow.bench.ranks.record import RanksRecord
from cacheflow.bench.table import NOTHING, WRONG, seconds

ONE_RANK = "1 rank"
LEGEND = (
    "load/compute is that of one rank behind one such link; each rank has a core and a link of its own. faster: one\n"
    "rank's restoration time over this one's, same prompt; over bound: the engine's own, of its slowest stage"
)
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#999999")
"""Source: Okabe and Ito (2008), as in ``plots``."""


def ranks_tables(records: Sequence[RanksRecord]) -> RenderableType:
    """One table a load/compute ratio."""
    parts: list[RenderableType] = [
        _table(ratio, [record for record in records if record.load_compute_ratio == ratio])
        for ratio in sorted({record.load_compute_ratio for record in records})
    ]
    return Group(*parts, Text(LEGEND, style="dim"))


def _table(ratio: float, runs: Sequence[RanksRecord]) -> Table:
    first = runs[0]
    title = f"{first.model} in vLLM: {first.num_tokens:,} cached + {first.suffix_tokens:,} new, load/compute {ratio:g}"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("ranks", no_wrap=True)
    for head in ("restored in", "over bound", "faster", "TTFT", "own prefill", "equal"):
        table.add_column(head, justify="right", no_wrap=True)
    for split in dict.fromkeys(record.split for record in runs):
        table.add_row(split, *_cells([record for record in runs if record.split == split], runs))
    return table


def _cells(own: Sequence[RanksRecord], runs: Sequence[RanksRecord]) -> list[str]:
    if not all(record.correct for record in own):
        return [*[WRONG] * 5, f"[red]no, {sum(not record.correct for record in own)} of {len(own)}[/red]"]
    return [
        _median([record.restore_s for record in own], seconds),
        _median([record.over_bound for record in own], "{:.2f}".format),
        _median([gain(record, runs) for record in own], "{:.2f}×".format),
        _median([record.ttft_s for record in own], seconds),
        _median([record.recompute_s for record in own], seconds),
        "yes",
    ]


def _median(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return shown(median(known)) if known else NOTHING


def gain(record: RanksRecord, runs: Sequence[RanksRecord]) -> float | None:
    """One rank's restoration time over this record's, of the same repeat and ratio; None where either is missing."""
    if not record.timed or not record.restore_s:
        return None
    for other in runs:
        same = (other.repeat, other.load_compute_ratio) == (record.repeat, record.load_compute_ratio)
        if same and other.split == ONE_RANK and other.timed and other.restore_s:
            return other.restore_s / record.restore_s
    return None


def ranks_markdown(records: Sequence[RanksRecord]) -> str:
    """A table and its caption for a page: time, over the bound, and how much sooner than one rank.

    Args:
        records: Of one model and length; a wrong run's split shows no time.
    """
    ratios = sorted({record.load_compute_ratio for record in records})
    rows = [
        ["load time / compute time of one rank", *(f"{ratio:g}" for ratio in ratios)],
        ["---", *(["--:"] * len(ratios))],
    ]
    for split in dict.fromkeys(record.split for record in records):
        rows.append(
            [split, *(_markdown_cell([r for r in records if r.split == split], records, ratio) for ratio in ratios)]
        )
    last = records[-1]
    counts = {len({r.repeat for r in records if r.load_compute_ratio == ratio}) for ratio in ratios}
    runs = "one run each" if counts == {1} else f"medians of {min(counts)} to {max(counts)} alternating runs"
    caption = (
        "Restoration time, in brackets its ratio to the engine's own lower bound, and how many times as fast as one "
        f"rank; {runs}. "
        f"{last.model}, {last.dtype}, {last.num_tokens:,} cached and {last.suffix_tokens} new tokens in chunks of "
        f"{last.chunk_tokens:,}, a core and a throttled link a rank, on {last.environment.get('cpu')}, "
        f"vllm {last.environment.get('vllm')}. "
        "Every run shown gave the tokens of stock vLLM."
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{caption}"


def _markdown_cell(own: Sequence[RanksRecord], runs: Sequence[RanksRecord], ratio: float) -> str:
    own = [record for record in own if record.load_compute_ratio == ratio]
    if not own or not all(record.correct for record in own):
        return WRONG if own else NOTHING
    cell = f"{_median([r.restore_s for r in own], seconds)} ({_median([r.over_bound for r in own], '{:.2f}×'.format)})"
    if own[0].split == ONE_RANK:
        return cell
    return f"{cell}, **{_median([gain(record, runs) for record in own], '{:.2f}×'.format)}**"


def draw_ranks(records: Sequence[RanksRecord], out_dir: Path) -> list[Path]:
    """Draw one figure a model and length; returns the files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    names = dict.fromkeys((record.model, record.num_tokens) for record in records)
    return [
        draw_one([r for r in records if (r.model, r.num_tokens) == name], out_dir / f"ranks-{name[0]}-{name[1]}.png")
        for name in names
    ]


def draw_one(records: Sequence[RanksRecord], path: Path) -> Path:
    """Draw restoration times with their bounds, and how many times as fast as one rank, of one model and length.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, (left, right) = new_figure(num_panels=2, num_columns=2, panel_size=(5.2, 4.0))
    ratios = sorted({record.load_compute_ratio for record in records})
    for split, colour in zip(dict.fromkeys(record.split for record in records), COLOURS * 3, strict=False):
        own = [record for record in records if record.split == split and record.timed]
        _line(left, own, ratios, lambda record: record.restore_s, colour, split)
        _line(left, own, ratios, lambda record: record.bound_restore_s, colour, None)
        _line(right, own, ratios, lambda record: gain(record, records), colour, split)
    for axes, label in ((left, "restored in [s] (dashed: bound)"), (right, "times faster than one rank")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axes.minorticks_off()
        axes.set_xlabel("one rank: time to load everything / time to prefill it")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    first = records[0]
    figure.suptitle(f"{first.model} in vLLM, {first.num_tokens:,} cached tokens, a core and a link a rank", fontsize=9)
    return save_figure(figure, path)


def _line(
    axes: object,
    records: Sequence[RanksRecord],
    ratios: Sequence[float],
    value: Callable[[RanksRecord], float | None],
    colour: str,
    label: str | None,
) -> None:
    """Medians over the repeats; without a label dashed and thin."""
    points = []
    for ratio in ratios:
        values = [found for r in records if r.load_compute_ratio == ratio and (found := value(r)) is not None]
        if values:
            points.append((ratio, median(values)))
    style = {"marker": "o", "label": label} if label else {"linestyle": "--", "linewidth": 1.0}
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, **style)  # type: ignore[attr-defined]
