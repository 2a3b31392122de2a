"""``cacheflow plan``: predict, explain and draw a restoration on hardware you do not have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from cacheflow.bench.options import Flags, option
from cacheflow.bench.timeline import Timeline, draw_timelines
from cacheflow.commands.plan_report import PlanReport, checkpoint_line, guard_line, prediction_table, split_grid
from cacheflow.commands.plan_stages import axis_line, predict_stages, stage_timelines, stages_table, ways_table
from cacheflow.errors import ConfigError
from cacheflow.model_shape import DTYPE_BYTES, ModelShape
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.stages import RankLayout, rank_problem
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.shapes.hardware import GPUS, MODEL_FILES, MODEL_SHAPES, find_gpu, find_model
from cacheflow.shapes.roofline import GpuPeaks, Roofline, problem_from_roofline
from cacheflow.sim.rehearsal import rehearse

MOST_TOKENS = 10**9
LEAST_GBPS = 1e-6
"""Below it nothing would come to an end."""
MAX_CHUNKS = 4096
PICTURE = "plan.png"
NOT_MEASURED = "\nPredicted from published peaks, not measured; `cacheflow calibrate` measures."


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Flags):
    """The options of ``cacheflow plan``."""

    model: str = option(help=f"{', '.join(MODEL_SHAPES)}, or {MODEL_FILES}", metavar="SHAPE")
    gpu: str = option(help=f"{', '.join(GPUS)}, or a .json file of peaks", metavar="NAME")
    bandwidth_gbps: float = option(help="link, in Gbit/s", metavar="G", above=0, finite=True)
    stored_bits: float | None = option(
        None, "bits in which each number of the KV is stored, 8 by the codecs int8 and fp8; the link carries those "
        "(default: as many as it has)", metavar="B", above=0,
    )  # fmt: skip
    tokens: int = option(help="tokens of the cached prefix", metavar="N", at_least=1)
    suffix: int = option(512, "new tokens after it", metavar="N", at_least=0)
    chunk: int = option(512, "tokens of a chunk", metavar="N", at_least=1)
    policy: str = option("cacheflow", "policy whose guard and split to show", metavar="NAME")
    pipeline_parallel_size: int = option(1, "stages, each with its layers", metavar="S")
    tensor_parallel_size: int = option(1, "ranks that share every layer", metavar="T")
    shared_link: bool = option(False, "all ranks share the link; otherwise each has one like it")
    out: Path | None = option(None, f"draw {PICTURE} into this folder", metavar="DIR")

    def __post_init__(self) -> None:
        """Check each value, and what would take for ever.

        Raises:
            ConfigError: Names the option.
            UnknownPolicyError: There is no such policy.
        """
        make_policy(self.policy)
        super().__post_init__()
        if self.bandwidth_gbps < LEAST_GBPS:
            raise ConfigError(f"--bandwidth-gbps is {self.bandwidth_gbps:g}, must be at least {LEAST_GBPS:g}")
        for name in ("tokens", "suffix", "chunk"):
            if (value := getattr(self, name)) > MOST_TOKENS:
                raise ConfigError(f"--{name} must be at most {MOST_TOKENS:,}, it has {len(str(value))} digits")
        if self.tokens > MAX_CHUNKS * self.chunk:
            raise ConfigError(
                f"--tokens {self.tokens} in chunks of {self.chunk} exceed {MAX_CHUNKS} chunks: give a larger --chunk"
            )


add_arguments = PlanFlags.add_flags


def run(args: argparse.Namespace) -> int:
    """Print the prediction, and draw it when a folder is given.

    Raises:
        ConfigError: A value is out of range, or a model, GPU or policy is unknown.
    """
    flags = PlanFlags.of(args)
    layout = RankLayout(
        pipeline_parallel_size=flags.pipeline_parallel_size,
        tensor_parallel_size=flags.tensor_parallel_size,
        link_per_rank=not flags.shared_link,
    )
    shape, gpu = find_model(flags.model), find_gpu(flags.gpu)
    tokens = (flags.tokens, flags.suffix, flags.chunk)
    bandwidth_gbps, stored = _delivered(flags, shape)
    console = Console(highlight=False, markup=False)
    if layout.pipeline_parallel_size > 1:
        problem = whole_problem(shape, gpu, bandwidth_gbps=bandwidth_gbps, grid_tokens=tokens, layout=layout)
        stages = predict_stages(problem, shape, layout, policy=flags.policy, title=_title(shape, gpu, problem, layout))
        title, timelines = stages.title, stage_timelines(stages)
        console.print(ways_table(stages))
        console.print(axis_line(stages), soft_wrap=True)
        console.print(stages_table(stages))
    else:
        report = predict(
            shape, gpu, bandwidth_gbps=bandwidth_gbps, grid_tokens=tokens, chosen=flags.policy, layout=layout
        )
        title, timelines = report.title, report.timelines()
        console.print(prediction_table(report))
        console.print(guard_line(report), soft_wrap=True)
        console.print(split_grid(report))
    if shape.checkpoint_bytes:
        console.print(checkpoint_line(shape), soft_wrap=True)
    if stored:
        console.print(stored, soft_wrap=True)
    console.print(NOT_MEASURED, style="dim")
    if flags.out is not None:
        console.print(_picture(timelines, flags.out, title=title), soft_wrap=True)
    return 0


def _delivered(flags: PlanFlags, shape: ModelShape) -> tuple[float, str]:
    """Gbit/s of KV that the link delivers, and the line that says why it is not what it carries.

    Raises:
        ConfigError: Something else than keys and values is loaded too, which no lossy codec touches.
    """
    if flags.stored_bits is None:
        return flags.bandwidth_gbps, ""
    bits = 8 * DTYPE_BYTES[shape.dtype]
    if flags.pipeline_parallel_size > 1 or shape.checkpoint_bytes:
        raise ConfigError(
            "--stored-bits is for models on one stage, without recurrent layers: boundary and running states stay as "
            "they are"
        )
    if flags.stored_bits > bits:
        raise ConfigError(f"--stored-bits is {flags.stored_bits:g}, must be at most the {bits} of {shape.dtype}")
    delivered_gbps = flags.bandwidth_gbps * bits / flags.stored_bits
    return delivered_gbps, (
        f"KV in {flags.stored_bits:g} of {bits} bits: a link of {flags.bandwidth_gbps:.4g} Gbit/s delivers "
        f"{delivered_gbps:.4g}. Decoding takes no time here, and what is restored is not exact"
    )


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
        ConfigError: The KV cache does not fit the GPU.
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
        row_lengths=shape.row_lengths,
    )


def whole_problem(
    shape: ModelShape, gpu: GpuPeaks, *, bandwidth_gbps: float, grid_tokens: tuple[int, int, int], layout: RankLayout
) -> RestoreProblem:
    """What restoring costs on one such GPU with memory enough, by its peaks.

    Raises:
        ConfigError: The KV cache does not fit the GPUs.
    """
    num_tokens, suffix_tokens, chunk_tokens = grid_tokens
    parts = layout.kv_parts(shape) * layout.pipeline_parallel_size
    kv_bytes = ((num_tokens + suffix_tokens) * shape.kv_bytes_per_token + shape.checkpoint_bytes) // parts
    if kv_bytes > gpu.memory_bytes:
        raise ConfigError(
            f"the KV cache of {num_tokens + suffix_tokens:,} tokens takes {kv_bytes / 1e9:.0f} GB a rank, "
            f"{gpu.name} has {gpu.memory_bytes / 1e9:.0f} GB: give fewer --tokens"
        )
    link = LinkCost(bytes_per_s=min(bandwidth_gbps * 1e9 / 8, gpu.pcie_bytes_per_s))
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=chunk_tokens, num_blocks=shape.num_rows, suffix_tokens=suffix_tokens
    )
    return problem_from_roofline(Roofline(shape=shape, gpu=gpu), grid, link=link)


def _title(shape: ModelShape, gpu: GpuPeaks, problem: RestoreProblem, layout: RankLayout) -> str:
    gpus, each = gpu.name, ""
    if layout.num_ranks > 1:
        gpus = f"{layout.pipeline_parallel_size} x {layout.tensor_parallel_size} {gpu.name}"
        each = " each" if layout.link_per_rank else " shared"
    return (
        f"{shape.name} on {gpus}, link {problem.link.bytes_per_s * 8 / 1e9:.4g} Gbit/s{each}: "
        f"{problem.grid.num_tokens:,} cached + {problem.grid.suffix_tokens:,} new tokens"
    )


def _picture(timelines: Sequence[Timeline], out: Path, *, title: str) -> str:
    """Draw timelines; returns the line that tells the user."""
    if find_spec("matplotlib") is None:
        return "No picture: matplotlib is missing. pip install 'cacheflow-kv[plots]'"
    try:
        path = draw_timelines(timelines, out / PICTURE, title=f"{title} (predicted)")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    return f"Picture: {path}"
