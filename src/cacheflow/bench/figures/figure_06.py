"""Figure 6: time to first token over the length of the prefix."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.runs import alone
from cacheflow.bench.figures.setting import Setting

GPUS = ("L40S", "A100", "H100")
LENGTHS = tuple(range(6144, 30_721, 6144))
SUFFIX_TOKENS = 256


def records(fast: bool) -> Iterator[FigureRecord]:
    """One restoration with nothing beside it, on each GPU."""
    for gpu in GPUS[2:] if fast else GPUS:
        setting = Setting(gpu=gpu)
        for num_tokens in LENGTHS[::4] if fast else LENGTHS:
            problem = setting.problem(num_tokens=num_tokens, suffix_tokens=SUFFIX_TOKENS)
            yield from alone(FIGURE.suite, setting, problem)


FIGURE = Figure(
    number=6,
    title="Time to first token over prefix length (Qwen3-8B, 10 Gbit/s, 256 new tokens, one at a time)",
    published="1.1x at 6K to 1.7x at 30K tokens over the best existing",
    charts=(Chart(kind=ChartKind.LINES, x="num_tokens", x_label="tokens of the prefix"),),
    records=records,
)
