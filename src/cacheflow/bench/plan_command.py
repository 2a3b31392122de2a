"""``cacheflow plan``: predict, explain and draw a restoration on hardware you do not have."""

from __future__ import annotations

import argparse
import math
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from cacheflow.bench.hardware import GPUS, MODEL_SHAPES, find_gpu, find_model
from cacheflow.bench.plan_report import PlanReport, guard_line, prediction_table, split_grid
from cacheflow.bench.rehearsal import rehearse
from cacheflow.bench.timeline import Timeline, draw_timelines
from cacheflow.errors import ConfigError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.roofline import GpuPeaks, Roofline, problem_from_roofline
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.types import ModelShape

MAX_CHUNKS = 4096
PICTURE = "plan.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cacheflow plan``."""
    parser.add_argument(
        "--model", required=True, metavar="SHAPE", help=f"{', '.join(MODEL_SHAPES)}, or a .json file of a shape"
    )
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
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"draw {PICTURE} into this folder")


def run(args: argparse.Namespace) -> int:
    """Print the prediction, and draw it when a folder is given.

    Raises:
        ConfigError: A value is out of range, or a model, GPU or policy is unknown.
    """
    make_policy(args.policy)
    report = predict(
        find_model(args.model),
        find_gpu(args.gpu),
        bandwidth_gbps=args.bandwidth_gbps,
        grid_tokens=_checked_tokens(args.tokens, args.suffix, args.chunk),
        chosen=args.policy,
    )
    console = Console(highlight=False, markup=False)
    console.print(prediction_table(report))
    console.print(guard_line(report), soft_wrap=True)
    console.print(split_grid(report))
    console.print("\nPredicted from published peaks, not measured; `cacheflow calibrate` measures.", style="dim")
    if args.out is not None:
        console.print(_draw(report, args.out), soft_wrap=True)
    return 0


def predict(
    shape: ModelShape, gpu: GpuPeaks, *, bandwidth_gbps: float, grid_tokens: tuple[int, int, int], chosen: str
) -> PlanReport:
    """Rehearse every policy on costs from peaks.

    Args:
        shape: The model.
        gpu: What computes; its host link caps the bandwidth.
        bandwidth_gbps: Link in Gbit/s.
        grid_tokens: Tokens of the prefix, of the suffix, and of a chunk.
        chosen: Policy to show in full.

    Raises:
        ConfigError: The bandwidth is not above 0 and finite, or the KV cache does not fit the GPU.
    """
    if not (math.isfinite(bandwidth_gbps) and bandwidth_gbps > 0):
        raise ConfigError(f"--bandwidth-gbps is {bandwidth_gbps:g}, must be above 0 and finite")
    num_tokens, suffix_tokens, chunk_tokens = grid_tokens
    kv_bytes = (num_tokens + suffix_tokens) * shape.kv_bytes_per_token
    if kv_bytes > gpu.memory_bytes:
        raise ConfigError(
            f"the KV cache of {num_tokens + suffix_tokens:,} tokens takes {kv_bytes / 1e9:.0f} GB, "
            f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB: give fewer --tokens"
        )
    link = LinkCost(bytes_per_s=min(bandwidth_gbps * 1e9 / 8, gpu.pcie_bytes_per_s))
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, num_blocks=shape.num_layers, suffix_tokens=suffix_tokens
    )
    problem = problem_from_roofline(Roofline(shape=shape, gpu=gpu), grid, link=link)
    return PlanReport(
        title=_title(shape, gpu, link, problem),
        problem=problem,
        bound=bound(problem),
        rehearsals=tuple(rehearse(problem, make_policy(name).plan(problem)) for name in RESTORE_POLICIES),
        chosen=chosen,
    )


def _checked_tokens(num_tokens: int, suffix_tokens: int, chunk_tokens: int) -> tuple[int, int, int]:
    for key, value, least in (
        ("--tokens", num_tokens, 1),
        ("--suffix", suffix_tokens, 0),
        ("--chunk", chunk_tokens, 1),
    ):
        if value < least:
            raise ConfigError(f"{key} is {value}, must be at least {least}")
    if num_tokens > MAX_CHUNKS * chunk_tokens:
        raise ConfigError(
            f"--tokens {num_tokens} in chunks of {chunk_tokens} exceed {MAX_CHUNKS} chunks: give a larger --chunk"
        )
    return num_tokens, suffix_tokens, chunk_tokens


def _title(shape: ModelShape, gpu: GpuPeaks, link: LinkCost, problem: RestoreProblem) -> str:
    return (
        f"{shape.name} on {gpu.name}, link {link.bytes_per_s * 8 / 1e9:.4g} Gbit/s: "
        f"{problem.grid.num_tokens:,} cached + {problem.grid.suffix_tokens:,} new tokens"
    )


def _draw(report: PlanReport, out: Path) -> str:
    """Draw the timelines of all policies; returns the line that tells the user."""
    if find_spec("matplotlib") is None:
        return "No picture: matplotlib is missing. pip install 'cacheflow-kv[plots]'"
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
    try:
        path = draw_timelines(timelines, out / PICTURE, title=f"{report.title} (predicted)")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    return f"Picture: {path}"
