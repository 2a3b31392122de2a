"""Figure 7: pipeline stages. One GPU simulated; more in closed form, because the simulated device has one stage.

Each of ``S`` stages holds ``1 / S`` of the layers, with a GPU and a link of its own. With the GPU axis every stage
loads the hidden states at its lower boundary for the chunks it recomputes and starts at once; without it a chunk comes
up through the stages, so that the last one starts ``S - 1`` chunk times late. Split between compute and link as in
``plan.bound``, work infinitely divisible; the new tokens pass the stages one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cacheflow.bench.figures.chart import Chart, ChartKind, Figure
from cacheflow.bench.figures.record import FigureRecord
from cacheflow.bench.figures.runs import alone
from cacheflow.bench.figures.setting import Setting
from cacheflow.plan.bound import lower_bound_s
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.tradeoff import Tradeoff
from cacheflow.types import DTYPE_BYTES

STAGES = (2, 4)
LENGTHS = (4096, 16_384, 32_768)
SUFFIX_TOKENS = 256


def records(fast: bool) -> Iterator[FigureRecord]:
    """One stage under every policy, then recompute, two axes and three axes on more."""
    setting = Setting()
    for num_tokens in LENGTHS[:1] if fast else LENGTHS:
        problem = setting.problem(num_tokens=num_tokens, suffix_tokens=SUFFIX_TOKENS)
        single = list(alone(FIGURE.suite, setting, problem))
        yield from single
        for num_stages in STAGES:
            yield from _staged(setting, problem, single[0], num_stages)


def _staged(setting: Setting, problem: RestoreProblem, like: FigureRecord, num_stages: int) -> Iterator[FigureRecord]:
    shape = setting.shape
    boundary_bytes = shape.hidden_size * DTYPE_BYTES[shape.dtype]
    fill_s = (num_stages - 1) * float(problem.compute_KB[0].sum()) / num_stages
    times_s = {
        "recompute": float(problem.compute_KB.sum()) / num_stages + fill_s,
        "without GPU axis": staged_restore_s(problem, num_stages=num_stages, fill_s=fill_s),
        "with GPU axis": staged_restore_s(problem, num_stages=num_stages, boundary_bytes_per_token=boundary_bytes),
    }
    least_s = staged_restore_s(problem, num_stages=num_stages)
    # Every stage is restored before the last layer of the new tokens runs.
    least_ttft_s = max(least_s + float(problem.suffix_B[-1]) + problem.head_s, problem.suffix_s)
    for series, restore_s in times_s.items():
        ttft_s = restore_s + problem.suffix_s
        yield replace(
            like, series=series, policy=series, num_stages=num_stages, workload="closed form", restore_s=restore_s,
            ttft_s=ttft_s, compute_busy=None, io_busy=None,
            bound_restore_s=least_s, bound_ttft_s=least_ttft_s,
        )  # fmt: skip


def staged_restore_s(
    problem: RestoreProblem, *, num_stages: int, fill_s: float = 0.0, boundary_bytes_per_token: int = 0
) -> float:
    """The least restoration time of stages that share the layers evenly.

    Args:
        problem: The whole model on one GPU and one link.
        num_stages: Stages, each with a GPU and a link like these.
        fill_s: Seconds before the last stage can begin to recompute.
        boundary_bytes_per_token: Hidden states that a stage loads for each token it recomputes.
    """
    grid, bytes_per_s = problem.grid, problem.link.bytes_per_s
    tokens_K = [grid.chunk_range(chunk)[1] - grid.chunk_range(chunk)[0] for chunk in range(grid.num_chunks)]
    compute_KB = problem.compute_KB / num_stages
    load_KB = problem.load_bytes_KB / (num_stages * bytes_per_s)
    # Recomputing a chunk brings its boundary over the link, so it saves so much less of the load.
    boundary_s = sum(tokens_K) * boundary_bytes_per_token / bytes_per_s
    share = boundary_s / float(load_KB.sum())
    split = Tradeoff(
        compute_KB=compute_KB,
        load_KB=load_KB * (1.0 - share),
        load_bytes_KB=(problem.load_bytes_KB * (1.0 - share) / num_stages).astype(int),
        link=replace(problem.link, latency_s=boundary_s),
        after_compute_s=fill_s,
        after_load_s=0.0,
    )
    return min(lower_bound_s(split), float(load_KB.sum()), float(compute_KB.sum()) + max(fill_s, boundary_s))


FIGURE = Figure(
    number=7,
    title="Pipeline stages (Qwen3-8B, H100, 10 Gbit/s a stage): one simulated, more in closed form",
    published="0.21 s, without the GPU axis 0.29 s; v2: 1.59, 0.96, 0.67 s on 1, 2, 4 GPUs",
    charts=(Chart(kind=ChartKind.BARS, x="num_stages", panel=("num_tokens",), x_label="GPUs in a pipeline"),),
    records=records,
)
