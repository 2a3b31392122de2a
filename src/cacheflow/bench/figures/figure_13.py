"""Figure 13: goodput under a limit for the time to first token."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.requested import mixed_lengths, poisson_times_s, request_of
from cacheflow.bench.figures.runs import CROWD, Crowd, crowded
from cacheflow.bench.figures.setting import Setting
from cacheflow.bench.figures.simulate import Contender

NUM_REQUESTS = 80
RATES_PER_S = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
SLO_S = 2.0
CONTENDERS = (*CROWD, Contender(series="cacheflow, slo", policy="cacheflow", batch_policy="slo"))


def records(fast: bool) -> Iterator[FigureRecord]:
    """The same mixed requests at every rate."""
    setting = Setting()
    lengths = mixed_lengths(setting, NUM_REQUESTS // 8 if fast else NUM_REQUESTS)
    for rate_per_s in RATES_PER_S[::3] if fast else RATES_PER_S:
        times_s = poisson_times_s(len(lengths), rate_per_s)
        requests = tuple(
            request_of(setting, each, arrival_s=arrival_s, slo_s=SLO_S)
            for each, arrival_s in zip(lengths, times_s, strict=True)
        )
        crowd = Crowd(requests=requests, workload="mixed", rate_per_s=rate_per_s, slo_s=SLO_S)
        yield from crowded(FIGURE.suite, setting, crowd, contenders=CONTENDERS)


FIGURE = Figure(
    number=13,
    title="Requests a second with their first token within 2 s (Qwen3-8B, H100, 10 Gbit/s, mixed requests)",
    published="",
    charts=(
        Chart(
            kind=ChartKind.LINES, x="rate_per_s", y="goodput_per_s", bound="bound_goodput_per_s", panel=("suite",),
            x_label="arrivals a second", y_label="in time, a second",
        ),
    ),
    records=records,
)  # fmt: skip
