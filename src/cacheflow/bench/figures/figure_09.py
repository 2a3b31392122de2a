"""Figure 9: other GPUs, a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.runs import alone
from cacheflow.bench.figures.setting import Setting

GPUS = ("L40S", "A100", "H100")
LENGTHS = (8192, 16_384, 30_720)
CHUNKS = (512, 2048)
"""Short chunks share the work finely, long ones read the experts' weights less often; each policy gets its better."""
SUFFIX_TOKENS = 256


def records(fast: bool) -> Iterator[FigureRecord]:
    """One at a time; one GPU each, where the paper used two L40S or A100."""
    for gpu in GPUS:
        for num_tokens in LENGTHS[:1] if fast else LENGTHS:
            for chunk_tokens in CHUNKS:
                setting = Setting(model="Qwen3-30B-A3B", gpu=gpu, chunk_tokens=chunk_tokens)
                problem = setting.problem(num_tokens=num_tokens, suffix_tokens=SUFFIX_TOKENS)
                yield from alone(FIGURE.suite, setting, problem)


FIGURE = Figure(
    number=9,
    title="Qwen3-30B-A3B on other GPUs, one each (10 Gbit/s, 256 new tokens, one at a time)",
    published="1.6x on two L40S, 1.5x on two A100 over the best existing",
    charts=(Chart(kind=ChartKind.BARS, x="gpu", panel=("num_tokens", "chunk_tokens")),),
    records=records,
)
