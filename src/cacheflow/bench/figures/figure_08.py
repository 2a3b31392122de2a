"""Figure 8: faster links."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.requested import session_crowd
from cacheflow.bench.figures.runs import alone, crowded
from cacheflow.bench.figures.setting import Setting

GBPS = (10.0, 40.0, 80.0)
LENGTHS = (4096, 13_312, 32_768)
"""About the median, 90th and 99th percentile of SWE-Bench agents' prompts, the last cut to the longest simulated."""
SUFFIX_TOKENS = 256
LOAD = 0.6


def records(fast: bool) -> Iterator[FigureRecord]:
    """One at a time at three lengths, and sessions at a load of 0.6."""
    for gbps in GBPS:
        setting = Setting(gbps=gbps)
        for num_tokens in LENGTHS[:1] if fast else LENGTHS:
            problem = setting.problem(num_tokens=num_tokens, suffix_tokens=SUFFIX_TOKENS)
            yield from alone(FIGURE.suite, setting, problem)
        crowd = session_crowd(setting, "swe-bench", num_sessions=1 if fast else 8, load=LOAD)
        yield from crowded(FIGURE.suite, setting, crowd)


FIGURE = Figure(
    number=8,
    title="Faster links (Qwen3-8B, H100)",
    published="1.7x at 40 Gbit/s, 1.5x at 80 Gbit/s over the best existing (SWE-Bench)",
    charts=(
        Chart(
            kind=ChartKind.BARS, x="link_gbps", log_y=True, panel=("workload", "num_tokens"), x_label="link [Gbit/s]",
        ),
    ),
    records=records,
)  # fmt: skip
