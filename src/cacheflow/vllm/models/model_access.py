"""A worker's model, opened for recomputation: ``open_model`` checks everything that recomputation relies on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cacheflow.stores.keys import Shard
from cacheflow.vllm.compat import RunnerKind, is_compiled, require_runner, runner_kind
from cacheflow.vllm.models.families import FAMILIES, Family
from cacheflow.vllm.models.refusals import load_refusals, recompute_refusals, require_loadable, require_recomputable
from cacheflow.vllm.models.workers import worker_of


@dataclass(frozen=True, slots=True, eq=False)
class ModelHandle:
    """The worker's model as recomputation needs it.

    Attributes:
        runner: vLLM's model runner.
        model: The whole model, ``runner.model``.
        inner: Its decoder stack: embedding, layers, norm; None where recomputation is refused.
        family: How its layers are called; None where recomputation is refused.
        refusal: Why this model cannot be recomputed with (loads work); empty when it can.
        vllm_config: vLLM's configuration.
        runner_kind: First or second generation of the runner.
        compiled: Whether the engine runs the model through ``torch.compile``: then only whole passes are bit-exact.
        start_layer: First layer of this pipeline stage, counted from the model's bottom.
        end_layer: One past its last.
        layer_names: vLLM's name of each of these layers' attention, bottom first: keys of the KV caches.
        shard: Tensor-parallel rank and pipeline stage.
        block_size: Tokens of one KV block.
        num_blocks: KV blocks of this worker.
        device: Where the model is.
        dtype: Its activations' dtype.
        hidden_size: Width of the residual stream.
    """

    runner: Any
    model: Any
    inner: Any
    family: Family | None
    refusal: str
    vllm_config: Any
    runner_kind: RunnerKind
    compiled: bool
    start_layer: int
    end_layer: int
    layer_names: tuple[str, ...]
    shard: Shard
    block_size: int
    num_blocks: int
    device: torch.device
    dtype: torch.dtype
    hidden_size: int

    @property
    def num_layers(self) -> int:
        """Layers of this stage."""
        return self.end_layer - self.start_layer

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage starts from tokens; others start from boundary hidden states."""
        return self.shard.pp_rank == 0

    @property
    def can_recompute(self) -> bool:
        """Whether partial forwards are possible."""
        return not self.refusal


def open_model(vllm_config: Any, kv_cache_config: Any, *, load_only: bool = False) -> ModelHandle:  # noqa: ANN401
    """Check the worker's model and describe it; call once KV caches are registered.

    ``load_only`` accepts a model that can be loaded but not recomputed; the handle's ``refusal`` then says why.

    Raises:
        UnsupportedModelError: The model, its attention or its configuration is not supported; lists every reason.
        ConfigError: The plugin did not run, or vLLM's runner lacks something this module relies on.
    """
    require_loadable(load_refusals(vllm_config, kv_cache_config))
    runner = worker_of(vllm_config).model_runner
    require_runner(runner)
    reasons = recompute_refusals(runner, vllm_config)
    require_recomputable(reasons, load_only=load_only)
    return _describe(runner, vllm_config, kv_cache_config, refusal="; ".join(reasons))


def _describe(runner: Any, vllm_config: Any, kv_cache_config: Any, *, refusal: str) -> ModelHandle:  # noqa: ANN401
    model = runner.get_model()
    group = kv_cache_config.kv_cache_groups[0]
    layer_names = tuple(sorted(group.layer_names, key=layer_number))
    family = None if refusal else FAMILIES[type(model).__name__]
    inner = None if family is None else model.model
    number = layer_number(layer_names[0])
    start = int(inner.start_layer) if inner is not None else number[0] if number else 0
    return ModelHandle(
        runner=runner,
        model=model,
        inner=inner,
        family=family,
        refusal=refusal,
        vllm_config=vllm_config,
        runner_kind=runner_kind(runner),
        compiled=is_compiled(vllm_config),
        start_layer=start,
        end_layer=start + len(layer_names) if inner is None else int(inner.end_layer),
        layer_names=layer_names,
        shard=shard_of(vllm_config),
        block_size=int(group.kv_cache_spec.block_size),
        num_blocks=int(kv_cache_config.num_blocks),
        device=torch.device(runner.device),
        dtype=vllm_config.model_config.dtype,
        hidden_size=int(vllm_config.model_config.get_hidden_size()),
    )


def shard_of(vllm_config: Any) -> Shard:  # noqa: ANN401
    """This process's tensor-parallel rank and pipeline stage; call in a worker."""
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

    parallel = vllm_config.parallel_config
    return Shard(
        tp_rank=get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor_parallel_size,
        pp_rank=get_pp_group().rank_in_group,
        pp_size=parallel.pipeline_parallel_size,
    )


def layer_number(name: str) -> tuple[int, ...]:
    """The numbers in a layer's name, to sort by: ``model.layers.12.self_attn.attn`` -> ``(12,)``."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())
