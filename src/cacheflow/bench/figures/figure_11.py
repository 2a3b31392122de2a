"""Figure 11: time to first token over the bound, for every ratio of load to compute."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.runs import alone
from cacheflow.bench.figures.setting import Setting, with_ratio

RATIOS = tuple(2.0**power for power in range(-4, 5))
CASES = ((4096, 256), (4096, 1024), (32_768, 256), (32_768, 4096))
"""Tokens of the prefix, and new ones."""


def records(fast: bool) -> Iterator[FigureRecord]:
    """Costs of Qwen3-8B on an H100 over links of every speed."""
    setting = Setting()
    for num_tokens, suffix_tokens in CASES[:1] if fast else CASES:
        problem = setting.problem(num_tokens=num_tokens, suffix_tokens=suffix_tokens)
        for ratio in RATIOS[::4] if fast else RATIOS:
            yield from alone(FIGURE.suite, setting, with_ratio(problem, ratio))


FIGURE = Figure(
    number=11,
    title="Time to first token over the bound (Qwen3-8B, H100, links of every speed, one at a time)",
    published="",
    charts=(
        Chart(
            kind=ChartKind.LINES, x="load_compute_ratio", y="ttft_over_bound", bound="", log_x=True, log_y=True,
            panel=("num_tokens", "suffix_tokens"), x_label="time to load everything / time to recompute everything",
            y_label="time to first token / lower bound",
        ),
    ),
    records=records,
)  # fmt: skip
