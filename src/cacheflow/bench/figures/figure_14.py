"""Figure 14: where ours is behind a rival."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.runs import alone
from cacheflow.bench.figures.setting import Setting, with_ratio

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 32_768)
RATIOS = tuple(2.0**power for power in range(-3, 5))
SUFFIXES = (0, 16, 256, 2048)
PLACES = (("Qwen3-8B", "H100"), ("Qwen3-8B", "L40S"), ("Qwen3-30B-A3B", "H100"))
"""All in chunks of 512 tokens, the mixture of experts too: that is the default."""


def records(fast: bool) -> Iterator[FigureRecord]:
    """One at a time, every length with every ratio and every number of new tokens."""
    for model, gpu in PLACES[:1] if fast else PLACES:
        setting = Setting(model=model, gpu=gpu)
        for suffix_tokens in SUFFIXES[::3] if fast else SUFFIXES:
            for num_tokens in LENGTHS[2:6:3] if fast else LENGTHS:
                problem = setting.problem(num_tokens=num_tokens, suffix_tokens=suffix_tokens)
                for ratio in RATIOS[::4] if fast else RATIOS:
                    yield from alone(FIGURE.suite, setting, with_ratio(problem, ratio))


FIGURE = Figure(
    number=14,
    title="Ours over the best rival of each cell; ×: behind by more than 2 % + 5 ms",
    published="",
    charts=(
        Chart(
            kind=ChartKind.MAP, x="load_compute_ratio", y="num_tokens", panel=("model", "gpu", "suffix_tokens"),
            x_label="load / compute", y_label="tokens of the prefix",
        ),
    ),
    records=records,
)  # fmt: skip
