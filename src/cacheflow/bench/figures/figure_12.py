"""Figure 12: objectives on mixed requests that arrive one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.requested import mixed_lengths, poisson_times_s, request_of
from cacheflow.bench.figures.runs import Crowd, crowded, least_alone
from cacheflow.bench.figures.setting import Setting
from cacheflow.bench.figures.simulate import Contender

NUM_REQUESTS = 80
LOADS = (0.7, 0.95)
"""Least seconds of work, alone, that arrive each second."""
DEADLINE_FACTOR = 4.0
"""A request's deadline, in times of what it could have alone."""
ORDERS = ("fcfs", "longest_first", "mean_ttft", "p99_ttft", "makespan", "slo")
CONTENDERS = (
    *(Contender(series=name, policy="cacheflow", batch_policy=name) for name in ORDERS),
    Contender(series="dp", policy="cacheflow_v2", batch_policy="dp"),
)


def records(fast: bool) -> Iterator[FigureRecord]:
    """The same requests under every order; each restored as ``cacheflow`` does, but for ``dp``, which plans itself."""
    setting = Setting()
    lengths = mixed_lengths(setting, NUM_REQUESTS // 8 if fast else NUM_REQUESTS)
    alone_s = [least_alone(request_of(setting, each)).ttft_s for each in lengths]
    for load in LOADS[1:2] if fast else LOADS:
        rate_per_s = load * len(lengths) / sum(alone_s)
        times_s = poisson_times_s(len(lengths), rate_per_s)
        requests = tuple(
            request_of(setting, each, arrival_s=arrival_s, slo_s=DEADLINE_FACTOR * least_s)
            for each, arrival_s, least_s in zip(lengths, times_s, alone_s, strict=True)
        )
        crowd = Crowd(requests=requests, workload=f"load {load:g}", rate_per_s=rate_per_s)
        yield from crowded(FIGURE.suite, setting, crowd, contenders=CONTENDERS)


FIGURE = Figure(
    number=12,
    title="Orders of requests (Qwen3-8B, H100, 10 Gbit/s, 80 mixed requests)",
    published="",
    charts=(
        Chart(kind=ChartKind.BARS, x="workload", y="ttft_s", panel=("suite",), y_label="mean TTFT [s]"),
        Chart(
            kind=ChartKind.BARS, x="workload", y="p99_ttft_s", bound="bound_p99_ttft_s", panel=("suite",),
            y_label="99th percentile of TTFT [s]",
        ),
        Chart(kind=ChartKind.BARS, x="workload", y="in_time", bound="", panel=("suite",), y_label="share in time"),
    ),
    records=records,
)  # fmt: skip
