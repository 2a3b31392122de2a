"""Pipeline stages: which layers each holds, what restoring them costs, and the least time all of them need.

Stage ``s > 0`` recomputes a chunk from its boundary states: in vLLM ``hidden_states`` and ``residual`` of each token,
so ``2 * hidden_size * dtype`` bytes. Read from the store they are part of the stage's load; handed over by the stage
below they cost the link nothing and make the stage wait.
Shapes: ``S`` stages, ``K`` chunks.
"""

from __future__ import annotations

from cacheflow.errors import ConfigError
from cacheflow.plan.bound import Bound, bound
from cacheflow.plan.boundaries import BoundarySource
from cacheflow.plan.problem import RestoreProblem
from cacheflow.types import DTYPE_BYTES, ModelShape

BOUNDARY_TENSORS = 2
"""vLLM hands a later stage the hidden states and the residual."""


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


def boundary_bytes_per_token(shape: ModelShape) -> int:
    """Bytes of the boundary states of one token at one boundary."""
    return BOUNDARY_TENSORS * shape.hidden_size * DTYPE_BYTES[shape.dtype]


def stage_bound(problem: RestoreProblem, source: BoundarySource) -> Bound:
    """The least times of one stage for itself; of one whose activations are handed over, as if it never waited."""
    if source is BoundarySource.NONE:
        return Bound(restore_s=problem.load_s, ttft_s=problem.load_s + problem.suffix_s)
    return bound(problem)
