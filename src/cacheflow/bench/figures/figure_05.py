"""Figure 5: how busy compute and the link are while restoring."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.requested import request_of, session_crowd
from cacheflow.bench.figures.runs import Crowd, alone, crowded
from cacheflow.bench.figures.setting import Setting

NUM_TOKENS = 16_384
BATCH = 8
LOAD = 0.6


def records(fast: bool) -> Iterator[FigureRecord]:
    """One restoration without new tokens, a batch of equal ones with some, and sessions at a load of 0.6."""
    setting = Setting()
    yield from alone(FIGURE.suite, setting, setting.problem(num_tokens=NUM_TOKENS, suffix_tokens=0))
    batch = (request_of(setting, (NUM_TOKENS, 256)),) * (2 if fast else BATCH)
    yield from crowded(FIGURE.suite, setting, Crowd(requests=batch, workload=f"batch of {len(batch)}"))
    yield from crowded(
        FIGURE.suite, setting, session_crowd(setting, "swe-bench", num_sessions=1 if fast else 8, load=LOAD)
    )


FIGURE = Figure(
    number=5,
    title="Busy while restoring (Qwen3-8B, H100, 10 Gbit/s)",
    published="GPU 88 %, I/O 78 % (LMCache: GPU 10 %, vLLM: GPU 91 %); v2: 89 and 89 %, its Cake 36 and 90 %",
    charts=(
        Chart(
            kind=ChartKind.BARS, x="workload", y="compute_busy", bound="", panel=("suite",),
            y_label="compute busy, share of time",
        ),
        Chart(
            kind=ChartKind.BARS, x="workload", y="io_busy", bound="", panel=("suite",),
            y_label="link busy, share of time",
        ),
    ),
    records=records,
)  # fmt: skip
