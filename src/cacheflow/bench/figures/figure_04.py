"""Figure 4: distribution of the time to first token, three models by three workloads."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.requested import session_crowd
from cacheflow.bench.figures.runs import CROWD, IN_ORDER, crowded
from cacheflow.bench.figures.setting import Setting

MODELS = (("Qwen3-8B", 512), ("Llama-3.1-8B", 512), ("Qwen3-30B-A3B", 2048))
"""With the chunk: experts need long chunks to keep the GPU busy."""
SESSIONS = {"lmsys-chat": 120, "wildchat": 80, "swe-bench": 8}
LOAD = 0.6


def records(fast: bool) -> Iterator[FigureRecord]:
    """Turns of sessions at a load of 0.6."""
    for model, chunk_tokens in MODELS[:1] if fast else MODELS:
        setting = Setting(model=model, chunk_tokens=chunk_tokens)
        for workload, num_sessions in SESSIONS.items():
            crowd = session_crowd(
                setting, workload, num_sessions=max(1, num_sessions // 12) if fast else num_sessions, load=LOAD
            )
            yield from crowded(FIGURE.suite, setting, crowd, contenders=(*CROWD, IN_ORDER))


FIGURE = Figure(
    number=4,
    title="Time to first token, three models by three workloads (H100, 10 Gbit/s, load 0.6)",
    published="10 to 62 % lower than the best existing (1.1 to 1.7x), most in the tail",
    charts=(
        Chart(
            kind=ChartKind.DISTRIBUTION, panel=("model", "workload"), log_x=True,
            x_label="time to first token [s]", y_label="share of requests",
        ),
    ),
    records=records,
)  # fmt: skip
