"""``cacheflow plan``: predict, explain and draw a restoration on hardware you do not have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from cacheflow.bench.rehearsal import rehearse
from cacheflow.bench.timeline import Timeline, draw_timelines
from cacheflow.commands.plan_report import PlanReport, guard_line, prediction_table, split_grid
from cacheflow.commands.plan_stages import axis_line, predict_stages, stage_timelines, stages_table, ways_table
from cacheflow.errors import ConfigError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.stages import RankLayout, rank_problem
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.shapes.hardware import GPUS, MODEL_FILES, MODEL_SHAPES, find_gpu, find_model
from cacheflow.shapes.roofline import GpuPeaks, Roofline, problem_from_roofline
from cacheflow.types import ModelShape

MOST_TOKENS = 10**9
LEAST_GBPS = 1e-6
"""Below it nothing would come to an end."""
MAX_CHUNKS = 4096
PICTURE = "plan.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cacheflow plan``."""
    parser.add_argument("--model", required=True, metavar="SHAPE", help=f"{', '.join(MODEL_SHAPES)}, or {MODEL_FILES}")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"{', '.join(GPUS)}, or a .json file of peaks")
    parser.add_argument("--bandwidth-gbps", required=True, type=float, metavar="G", help="link, in Gbit/s")
    parser.add_argument("--tokens", required=True, type=int, metavar="N", help="tokens of the cached prefix")
    parser.add_argument("--suffix", type=int, default=512, metavar="N", help="new tokens behind it (default: 512)")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of a chunk (default: 512)")
    parser.add_argument(
        "--policy",
        default="cacheflow",
        metavar="NAME",
        help="policy whose guard and split to show (default: cacheflow)",
    )
    parser.add_argument(
        "--pipeline-parallel-size", type=int, default=1, metavar="S", help="stages, each with its layers (default: 1)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="T", help="ranks that share every layer (default: 1)"
    )
    parser.add_argument(
        "--shared-link", action="store_true", help="all ranks share the link; otherwise each has one like it"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"draw {PICTURE} into this folder")


def run(args: argparse.Namespace) -> int:
    """Print the prediction, and draw it when a folder is given.

    Raises:
        ConfigError: A value is out of range, or a model, GPU or policy is unknown.
    """
    make_policy(args.policy)
    layout = RankLayout(
        pipeline_parallel_size=args.pipeline_parallel_size,
        tensor_parallel_size=args.tensor_parallel_size,
        link_per_rank=not args.shared_link,
    )
    if layout.pipeline_parallel_size > 1:
        return _run_stages(args, layout)
    report = predict(
        find_model(args.model),
        find_gpu(args.gpu),
        bandwidth_gbps=args.bandwidth_gbps,
        grid_tokens=_checked_tokens(args.tokens, args.suffix, args.chunk),
        chosen=args.policy,
        layout=layout,
    )
    console = Console(highlight=False, markup=False)
    console.print(prediction_table(report))
    console.print(guard_line(report), soft_wrap=True)
    console.print(split_grid(report))
    console.print("\nPredicted from published peaks, not measured; `cacheflow calibrate` measures.", style="dim")
    if args.out is not None:
        console.print(_draw(report, args.out), soft_wrap=True)
    return 0


def _run_stages(args: argparse.Namespace, layout: RankLayout) -> int:
    shape, gpu = find_model(args.model), find_gpu(args.gpu)
    tokens = _checked_tokens(args.tokens, args.suffix, args.chunk)
    problem = whole_problem(shape, gpu, bandwidth_gbps=args.bandwidth_gbps, grid_tokens=tokens, layout=layout)
    report = predict_stages(problem, shape, layout, policy=args.policy, title=_title(shape, gpu, problem, layout))
    console = Console(highlight=False, markup=False)
    console.print(ways_table(report))
    console.print(axis_line(report), soft_wrap=True)
    console.print(stages_table(report))
    console.print("\nPredicted from published peaks, not measured; `cacheflow calibrate` measures.", style="dim")
    if args.out is not None:
        console.print(_picture(stage_timelines(report), args.out, title=report.title), soft_wrap=True)
    return 0


def predict(
    shape: ModelShape,
    gpu: GpuPeaks,
    *,
    bandwidth_gbps: float,
    grid_tokens: tuple[int, int, int],
    chosen: str,
    layout: RankLayout | None = None,
) -> PlanReport:
    """Rehearse every policy on costs from peaks.

    Args:
        shape: The model.
        gpu: What computes; its host link caps the bandwidth.
        bandwidth_gbps: Link in Gbit/s.
        grid_tokens: Tokens of the prefix, of the suffix, and of a chunk.
        chosen: Policy to show in full.
        layout: Tensor-parallel ranks of one stage; one GPU unless given.

    Raises:
        ConfigError: The bandwidth is not above 0 and finite, or the KV cache does not fit the GPU.
    """
    layout = layout or RankLayout()
    problem = whole_problem(shape, gpu, bandwidth_gbps=bandwidth_gbps, grid_tokens=grid_tokens, layout=layout)
    title = _title(shape, gpu, problem, layout)
    problem = rank_problem(problem, shape, layout)
    return PlanReport(
        title=title,
        problem=problem,
        bound=bound(problem),
        rehearsals=tuple(rehearse(problem, make_policy(name).plan(problem)) for name in RESTORE_POLICIES),
        chosen=chosen,
    )


def whole_problem(
    shape: ModelShape, gpu: GpuPeaks, *, bandwidth_gbps: float, grid_tokens: tuple[int, int, int], layout: RankLayout
) -> RestoreProblem:
    """What restoring costs on one such GPU with memory enough, by its peaks.

    Raises:
        ConfigError: The bandwidth is not above 0 and finite, or the KV cache does not fit the GPUs.
    """
    if not (math.isfinite(bandwidth_gbps) and bandwidth_gbps > 0):
        raise ConfigError(f"--bandwidth-gbps is {bandwidth_gbps:g}, must be above 0 and finite")
    if bandwidth_gbps < LEAST_GBPS:
        raise ConfigError(f"--bandwidth-gbps is {bandwidth_gbps:g}, must be at least {LEAST_GBPS:g}")
    num_tokens, suffix_tokens, chunk_tokens = grid_tokens
    parts = layout.kv_parts(shape) * layout.pipeline_parallel_size
    kv_bytes = (num_tokens + suffix_tokens) * shape.kv_bytes_per_token // parts
    if kv_bytes > gpu.memory_bytes:
        raise ConfigError(
            f"the KV cache of {num_tokens + suffix_tokens:,} tokens takes {kv_bytes / 1e9:.0f} GB a rank, "
            f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB: give fewer --tokens"
        )
    link = LinkCost(bytes_per_s=min(bandwidth_gbps * 1e9 / 8, gpu.pcie_bytes_per_s))
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, num_blocks=shape.num_layers, suffix_tokens=suffix_tokens
    )
    return problem_from_roofline(Roofline(shape=shape, gpu=gpu), grid, link=link)


def _checked_tokens(num_tokens: int, suffix_tokens: int, chunk_tokens: int) -> tuple[int, int, int]:
    for key, value, least in (
        ("--tokens", num_tokens, 1),
        ("--suffix", suffix_tokens, 0),
        ("--chunk", chunk_tokens, 1),
    ):
        if value < least:
            raise ConfigError(f"{key} is {value}, must be at least {least}")
        if value > MOST_TOKENS:
            raise ConfigError(f"{key} must be at most {MOST_TOKENS:,}, it has {len(str(value))} digits")
    if num_tokens > MAX_CHUNKS * chunk_tokens:
        raise ConfigError(
            f"--tokens {num_tokens} in chunks of {chunk_tokens} exceed {MAX_CHUNKS} chunks: give a larger --chunk"
        )
    return num_tokens, suffix_tokens, chunk_tokens


def _title(shape: ModelShape, gpu: GpuPeaks, problem: RestoreProblem, layout: RankLayout) -> str:
    gpus, each = gpu.name, ""
    if layout.num_ranks > 1:
        gpus = f"{layout.pipeline_parallel_size} x {layout.tensor_parallel_size} {gpu.name}"
        each = " each" if layout.link_per_rank else " shared"
    return (
        f"{shape.name} on {gpus}, link {problem.link.bytes_per_s * 8 / 1e9:.4g} Gbit/s{each}: "
        f"{problem.grid.num_tokens:,} cached + {problem.grid.suffix_tokens:,} new tokens"
    )


def _draw(report: PlanReport, out: Path) -> str:
    """Draw the timelines of all policies; returns the line that tells the user."""
    has_suffix = report.problem.grid.suffix_tokens > 0
    timelines = [
        Timeline(
            label=rehearsal.plan.policy,
            spans=rehearsal.spans,
            num_chunks=report.problem.grid.num_chunks,
            num_blocks=report.problem.grid.num_blocks,
            restore_s=rehearsal.restore_s,
            ttft_s=rehearsal.ttft_s if has_suffix else None,
            bound_s=report.bound.ttft_s,
        )
        for rehearsal in report.rehearsals
    ]
    return _picture(timelines, out, title=report.title)


def _picture(timelines: Sequence[Timeline], out: Path, *, title: str) -> str:
    """Draw timelines; returns the line that tells the user."""
    if find_spec("matplotlib") is None:
        return "No picture: matplotlib is missing. pip install 'cacheflow-kv[plots]'"
    try:
        path = draw_timelines(timelines, out / PICTURE, title=f"{title} (predicted)")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    return f"Picture: {path}"
