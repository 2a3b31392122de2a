"""A worker's model, opened for recomputation: ``open_model`` checks everything that recomputation relies on."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cacheflow.errors import UnsupportedModelError
from cacheflow.stores.keys import Shard
from cacheflow.vllm.compat import RunnerKind, is_compiled, require_runner, runner_kind
from cacheflow.vllm.models.boundary_states import BoundaryShape
from cacheflow.vllm.models.drafter import Drafter, drafter_names, find_drafter
from cacheflow.vllm.models.inputs import TextInputs
from cacheflow.vllm.models.kv_groups import KvGroups
from cacheflow.vllm.models.layers import ModelLayers, find_layers, owning_names
from cacheflow.vllm.models.refusals import configured_refusals, load_refusals, require_loadable, require_recomputable
from cacheflow.vllm.models.workers import worker_of


@dataclass(frozen=True, slots=True, eq=False)
class ModelHandle:
    """The worker's model as recomputation needs it.

    Attributes:
        runner: vLLM's model runner.
        model: The whole model, ``runner.model``.
        layers: Its layers; None where recomputation is refused.
        inputs: How it is given text.
        drafter: The last row, on top of the layers; None without a drafter that keeps keys and values of its own.
        refusal: Why this model cannot be recomputed with (loads work); empty when it can.
        vllm_config: vLLM's configuration.
        runner_kind: First or second generation of the runner.
        compiled: Whether the engine runs the model through ``torch.compile``: then only whole passes are bit-exact.
        start_layer: First layer of this pipeline stage, counted from the model's bottom.
        layer_names: vLLM's name of the attention of each layer with a KV cache, bottom first, a drafter's last.
        num_drafter_layers: How many of them are a drafter's.
        states_R: vLLM's names of the recurrent layers of each row, in order; a row is a layer with a KV cache and the
            recurrent ones below it.
        groups: Which of vLLM's KV cache groups holds what.
        shard: Tensor-parallel rank and pipeline stage.
        num_blocks: KV blocks of this worker.
        device: Where the model is.
        dtype: Its activations' dtype.
        hidden_size: Width of the residual stream.
        boundary: What this stage is handed by the one below; without parts on the first.
    """

    runner: Any
    model: Any
    layers: ModelLayers | None
    inputs: TextInputs
    drafter: Drafter | None
    refusal: str
    vllm_config: Any
    runner_kind: RunnerKind
    compiled: bool
    start_layer: int
    layer_names: tuple[str, ...]
    num_drafter_layers: int
    states_R: tuple[tuple[str, ...], ...]
    groups: KvGroups
    shard: Shard
    num_blocks: int
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    boundary: BoundaryShape

    @property
    def num_layers(self) -> int:
        """Layers of this stage with a KV cache."""
        return len(self.layer_names)

    @property
    def block_size(self) -> int:
        """Tokens of one KV block."""
        return self.groups.block_size

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
    context = vllm_config.compilation_config.static_forward_context
    draft_model = runner.get_draft_model()
    groups = KvGroups.of(kv_cache_config)
    every = sorted(owning_names(context, groups.attention_names), key=layer_number)
    states = sorted(itertools.chain(*groups.state_names), key=layer_number)
    drafters = drafter_names(draft_model, context, every)
    names = [name for name in every if name not in drafters]
    reasons, layers, drafter = list(configured_refusals(vllm_config)), None, None
    if not reasons:
        try:
            layers = find_layers(runner.get_model(), context, names, states)
            drafter = find_drafter(runner, context, drafters)
        except UnsupportedModelError as error:
            reasons.append(str(error))
            layers = None
    require_recomputable(reasons, load_only=load_only)
    shard = shard_of(vllm_config)
    number = layer_number(names[0])
    model, device, dtype = runner.get_model(), torch.device(runner.device), vllm_config.model_config.dtype
    return ModelHandle(
        runner=runner,
        model=model,
        layers=layers,
        inputs=TextInputs.of_model(model, embedded=shard.pp_rank == 0 and bool(runner.supports_mm_inputs)),
        drafter=drafter,
        refusal="; ".join(reasons),
        vllm_config=vllm_config,
        runner_kind=runner_kind(runner),
        compiled=is_compiled(vllm_config),
        start_layer=layers.first_number if layers is not None else number[0] if number else 0,
        layer_names=(*(names if layers is None else layers.name_R), *drafters),
        num_drafter_layers=len(drafters),
        states_R=_states_by_number(names, states) if layers is None else layers.states_R,
        groups=groups,
        shard=shard,
        num_blocks=int(kv_cache_config.num_blocks),
        device=device,
        dtype=dtype,
        hidden_size=int(vllm_config.model_config.get_hidden_size()),
        boundary=BoundaryShape.of(model, dtype=dtype, device=device) if shard.pp_rank else BoundaryShape(),
    )


def _states_by_number(names: Sequence[str], states: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The recurrent layers of each row by the numbers in their names, for a model that is only loaded."""
    tops = [layer_number(name) for name in names]
    rows = [min(bisect_left(tops, layer_number(each)), len(tops) - 1) for each in states]
    return tuple(tuple(each for each, of in zip(states, rows, strict=True) if of == row) for row in range(len(tops)))


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
