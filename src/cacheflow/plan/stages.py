"""Pipeline stages and tensor-parallel ranks: which layers each stage holds, and what restoring them costs a rank.

Stage ``s > 0`` recomputes a chunk from its boundary states: in vLLM ``hidden_states`` and ``residual`` of each token,
so ``2 * hidden_size * dtype`` bytes, whole on every tensor-parallel rank. Read from the store they are part of the
stage's load; handed over by the stage below they cost the link nothing and make the stage wait.
Shapes: ``S`` stages, ``K`` chunks, ``B`` layer blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import HybridShape, Mamba2Shape
from cacheflow.model_shape import DTYPE_BYTES, ModelShape
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import BoundarySource, RestoreProblem

BOUNDARY_TENSORS = 2
"""vLLM hands a later stage the hidden states and the residual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """How many ranks share a model, and how they are connected to the store.

    Attributes:
        pipeline_parallel_size: Stages, each with its part of the layers.
        tensor_parallel_size: Ranks of a stage, each with its part of every layer.
        link_per_rank: Every rank has a link like the given one; otherwise all ranks share that one.
    """

    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    link_per_rank: bool = True

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ConfigError: One is below 1.
        """
        for name in ("pipeline_parallel_size", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.pipeline_parallel_size * self.tensor_parallel_size

    def kv_parts(self, shape: ModelShape) -> int:
        """Into how many parts the keys and values of a layer fall: heads are copied once there are more ranks.

        Raises:
            ConfigError: The ranks cannot share the model's heads evenly, or there are more stages than layers.
        """
        size = self.tensor_parallel_size
        parts = min(size, shape.num_kv_heads)
        if shape.num_q_heads % size or shape.num_kv_heads % parts or size % parts:
            raise ConfigError(
                f"{shape.num_q_heads} query heads and {shape.num_kv_heads} key/value heads of {shape.name} cannot be "
                f"shared by tensor_parallel_size {size}"
            )
        if isinstance(shape, HybridShape) and shape.num_state_k_heads % size:
            raise ConfigError(
                f"{shape.num_state_k_heads} key heads of the recurrent layers of {shape.name} cannot be shared by "
                f"tensor_parallel_size {size}"
            )
        if isinstance(shape, Mamba2Shape) and shape.num_state_groups % size:
            raise ConfigError(
                f"{shape.num_state_groups} groups of heads of the recurrent layers of {shape.name} cannot be shared by "
                f"tensor_parallel_size {size}"
            )
        split_rows(shape, self.pipeline_parallel_size)
        return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProblem:
    """What one rank of a stage has to restore.

    Attributes:
        problem: Its layers, without a suffix, over its link or its share of one.
        source: Where the activations below them come from.
        suffix_s: Seconds the new tokens take in this stage, the head with the last one.
    """

    problem: RestoreProblem
    source: BoundarySource
    suffix_s: float = 0.0


def split_layers(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Layers ``[lo, hi)`` of each stage: equal parts, what is left over to the last but one, then to those before it.

    Source: vLLM 0.32, ``distributed/utils.py``, ``get_pp_indices`` without ``VLLM_PP_LAYER_PARTITION``.

    Raises:
        ConfigError: There are fewer layers than stages, or no stage.
    """
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"{num_layers} layers cannot be split into {num_stages} pipeline stages")
    parts = [num_layers // num_stages] * num_stages
    for index in range(2, num_layers % num_stages + 2):
        parts[-index] += 1
    ends = [sum(parts[: stage + 1]) for stage in range(num_stages)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def split_rows(shape: ModelShape, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Rows ``[lo, hi)`` of each stage, a row being the smallest block that can be restored by itself.

    Raises:
        ConfigError: There are fewer layers than stages, or no stage; or a stage would begin within a row.
    """
    if isinstance(shape, Mamba2Shape) and num_stages > 1:
        raise ConfigError(f"pipeline stages of {shape.name} would begin within its rows, which differ in length")
    layers = split_layers(shape.num_layers, num_stages)
    if any(lo % shape.row_layers for lo, _ in layers):
        raise ConfigError(
            f"{num_stages} pipeline stages of {shape.name} would begin at layers "
            f"{', '.join(str(lo) for lo, _ in layers)}, within a row of {shape.row_layers}: choose another number"
        )
    return tuple((lo // shape.row_layers, hi // shape.row_layers) for lo, hi in layers)


def boundary_bytes_per_token(shape: ModelShape) -> int:
    """Bytes of the boundary states of one token at one boundary."""
    return BOUNDARY_TENSORS * shape.hidden_size * DTYPE_BYTES[shape.dtype]


def stage_problems(
    problem: RestoreProblem, shape: ModelShape, layout: RankLayout, later: BoundarySource = BoundarySource.STORED
) -> tuple[StageProblem, ...]:
    """Cut the problem of a whole model on one GPU into the problems of the ranks that share it.

    Compute is shared evenly by the ranks of a stage: what they lose to their collectives is not counted.

    Args:
        problem: Of one row a block: of one layer, but for a hybrid model.
        shape: The model.
        layout: Stages, ranks, links.
        later: Where the later stages take their activations from.

    Raises:
        ConfigError: The grid's blocks are not the model's layers, or the layout does not fit the model.
    """
    if problem.grid.num_blocks != shape.num_rows:
        raise ConfigError(
            f"a grid of {problem.grid.num_blocks} blocks cannot be cut at the {shape.num_rows} rows of {shape.name}"
        )
    problem = rank_problem(problem, shape, layout)
    grid = problem.grid
    ranges = [grid.chunk_range(chunk) for chunk in range(grid.num_chunks)]
    tokens_K = np.array([end - start for start, end in ranges], dtype=np.int64)
    stages = []
    for stage, (lo, hi) in enumerate(split_rows(shape, layout.pipeline_parallel_size)):
        source = BoundarySource.FIRST_STAGE if stage == 0 else later
        stored = source is BoundarySource.STORED
        own = RestoreProblem(
            grid=Grid(grid.chunk_ends, hi - lo, start=grid.start),
            compute_KB=problem.compute_KB[:, lo:hi],
            kv_only_KB=problem.kv_only_KB[:, lo:hi],
            load_bytes_KB=problem.load_bytes_KB[:, lo:hi],
            link=problem.link,
            boundary_bytes_K=tokens_K * (boundary_bytes_per_token(shape) if stored else 0),
            recurrent_B=problem.recurrent_B[lo:hi],
        )
        suffix_s = float(problem.suffix_B[lo:hi].sum()) + (problem.head_s if hi == shape.num_rows else 0.0)
        stages.append(StageProblem(problem=own, source=source, suffix_s=suffix_s))
    return tuple(stages)


def rank_problem(problem: RestoreProblem, shape: ModelShape, layout: RankLayout) -> RestoreProblem:
    """A rank's part of every layer, over its link or its share of one: what tensor parallelism leaves of a problem.

    Args:
        problem: Of one row a block.
        shape: The model.
        layout: Ranks, links.

    Raises:
        ConfigError: The layout does not fit the model.
    """
    kv_parts, tp = layout.kv_parts(shape), layout.tensor_parallel_size
    sharing = 1 if layout.link_per_rank else layout.num_ranks
    # Running states fall into as many parts as there are ranks; keys and values into no more than there are heads.
    states_KB = np.zeros_like(problem.load_bytes_KB)
    states_KB[-1:] = np.array(shape.state_bytes_B(shape.row_layers), dtype=np.int64)
    return replace(
        problem,
        compute_KB=problem.compute_KB / tp,
        kv_only_KB=problem.kv_only_KB / tp,
        load_bytes_KB=(problem.load_bytes_KB - states_KB) // kv_parts + states_KB // tp,
        link=replace(problem.link, bytes_per_s=problem.link.bytes_per_s / sharing),
        suffix_B=problem.suffix_B / tp,
        head_s=problem.head_s / tp,
    )


def suffix_through_s(stages: tuple[StageProblem, ...], num_suffix_chunks: int) -> float:
    """Seconds the new tokens take through all stages, chunk after chunk, each stage one chunk at a time.

    Chunks count as equally long; the slowest stage works without a pause, the others once around it.
    """
    if num_suffix_chunks == 0:
        return 0.0
    slowest_s = max(stage.suffix_s for stage in stages)
    once_s = sum(stage.suffix_s for stage in stages) / num_suffix_chunks
    return once_s + slowest_s * (num_suffix_chunks - 1) / num_suffix_chunks
