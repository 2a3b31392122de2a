"""Records of ``bench ranks`` as a table and a figure: how much faster more ranks restore, and how near their bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheflow.bench.chart import PALETTE, draw_bound, draw_line, label_ratios, new_figure, save_figure
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.spread import Spread
from cacheflow.bench.table import NOTHING, WRONG, Row, markdown_table, median_of, not_equal, seconds, text_table

ONE_RANK = "1 rank"
LEGEND = (
    "load/compute is that of one rank with one such link; each rank has a core and a link of its own. faster: one\n"
    "rank's restoration time over this one's, same prompt; over bound: the engine's own, of its slowest stage"
)


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
    rows: list[Row] = [
        ([split, *_cells([record for record in runs if record.split == split], runs)], None)
        for split in dict.fromkeys(record.split for record in runs)
    ]
    return text_table(title, ("ranks", "restored in", "over bound", "faster", "TTFT", "own prefill", "equal"), rows)


def _cells(own: Sequence[RanksRecord], runs: Sequence[RanksRecord]) -> list[str]:
    if not all(record.correct for record in own):
        return [*[WRONG] * 5, not_equal(sum(not record.correct for record in own), len(own))]
    return [
        median_of((record.restore_s for record in own), seconds),
        median_of((record.over_bound for record in own), "{:.2f}".format),
        median_of((gain(record, runs) for record in own), "{:.2f}×".format),
        median_of((record.ttft_s for record in own), seconds),
        median_of((record.recompute_s for record in own), seconds),
        "yes",
    ]


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
    """A table and its caption for a page: time, over the bound, and how much faster than one rank."""
    ratios = sorted({record.load_compute_ratio for record in records})
    rows = [
        [split, *(_markdown_cell([r for r in records if r.split == split], records, ratio) for ratio in ratios)]
        for split in dict.fromkeys(record.split for record in records)
    ]
    table = markdown_table(["load time / compute time of one rank", *(f"{ratio:g}" for ratio in ratios)], rows)
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
    return f"{table}\n\n{caption}"


def _markdown_cell(own: Sequence[RanksRecord], runs: Sequence[RanksRecord], ratio: float) -> str:
    own = [record for record in own if record.load_compute_ratio == ratio]
    if not own or not all(record.correct for record in own):
        return WRONG if own else NOTHING
    times = "{:.2f}×".format
    cell = f"{median_of((r.restore_s for r in own), seconds)} ({median_of((r.over_bound for r in own), times)})"
    if own[0].split == ONE_RANK:
        return cell
    return f"{cell}, **{median_of((gain(record, runs) for record in own), times)}**"


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
    for split, colour in zip(dict.fromkeys(record.split for record in records), PALETTE * 3, strict=False):
        own = [record for record in records if record.split == split and record.timed]
        draw_line(left, split, _points(own, lambda record: record.restore_s), colour=colour)
        bounds = _points(own, lambda record: record.bound_restore_s)
        draw_bound(left, [(ratio, spread.median) for ratio, spread in bounds], colour=colour)
        draw_line(right, split, _points(own, lambda record: gain(record, records)), colour=colour)
    for axes, label in ((left, "restored in [s] (dashed: bound)"), (right, "times faster than one rank")):
        label_ratios(axes, ratios, x_label="one rank: time to load everything / time to prefill it", y_label=label)
        axes.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    first = records[0]
    title = f"{first.model} in vLLM, {first.num_tokens:,} cached tokens, a core and a link a rank"
    return save_figure(figure, path, title=title)


def _points(records: Sequence[RanksRecord], value: Callable[[RanksRecord], float | None]) -> list[tuple[float, Spread]]:
    """What was measured at each ratio, over the repeats."""
    ratios = sorted({record.load_compute_ratio for record in records})
    found = [(ratio, Spread.of(value(r) for r in records if r.load_compute_ratio == ratio)) for ratio in ratios]
    return [(ratio, spread) for ratio, spread in found if spread is not None]
