"""Figure 10: batches of requests that come at once."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.requested import mixed_lengths, request_of
from cacheflow.bench.figures.runs import CROWD, IN_ORDER, Crowd, crowded
from cacheflow.bench.figures.setting import Setting

BATCHES = (1, 2, 4, 8, 16)
NUM_TOKENS = 16_384
SUFFIX_TOKENS = 256
GPUS = ("H100", "A100")
CONTENDERS = (*CROWD, IN_ORDER)


def records(fast: bool) -> Iterator[FigureRecord]:
    """Equal requests, and requests of many lengths."""
    for gpu in GPUS[:1] if fast else GPUS:
        setting = Setting(gpu=gpu)
        for size in BATCHES[:2] if fast else BATCHES:
            batches = {"equal": [(NUM_TOKENS, SUFFIX_TOKENS)] * size, "mixed": mixed_lengths(setting, size)}
            for workload, lengths in batches.items():
                crowd = Crowd(requests=tuple(request_of(setting, each) for each in lengths), workload=workload)
                yield from crowded(FIGURE.suite, setting, crowd, contenders=CONTENDERS)


FIGURE = Figure(
    number=10,
    title="Batches of requests that come at once (Qwen3-8B, 10 Gbit/s)",
    published="1.6x to 2.6x over the best existing at batch 2, 4, 8",
    charts=(
        Chart(
            kind=ChartKind.LINES, x="num_requests", panel=("gpu", "workload"), log_x=True, log_y=True,
            x_label="requests", y_label="mean time to first token [s]",
        ),
    ),
    records=records,
)  # fmt: skip
