"""What a worker does at start: open the model, prove that restoration is exact, and know what it costs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from cacheflow.errors import ConfigError, ProfileError, UnsupportedModelError
from cacheflow.hybrid_shape import DELTA_CHUNK
from cacheflow.model_shape import ModelShape
from cacheflow.plan.cell_sizes import layers_of_object
from cacheflow.plan.costs import CostTable
from cacheflow.plan.problem import LinkCost
from cacheflow.stores.base import Store
from cacheflow.stores.probe import measure_link, stored_share
from cacheflow.tensors.copy_lane import lane_of
from cacheflow.vllm.compat import vllm_version
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.models.kv_groups import MAMBA2
from cacheflow.vllm.models.layers import is_latent
from cacheflow.vllm.models.model_access import ModelHandle, open_model
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.models.refusals import layer_specs, require_recomputable
from cacheflow.vllm.options import ServingOptions
from cacheflow.vllm.startup.agreement import of_all_ranks
from cacheflow.vllm.startup.calibration import Lengths, calibrate
from cacheflow.vllm.startup.cost_profile import load_costs, profile_path, save_costs
from cacheflow.vllm.startup.identity import cost_identity, digest_of, stage_weights, worker_namespace
from cacheflow.vllm.startup.selftest import self_test
from cacheflow.vllm.worker.boundary import make_receive_buffer, stores_boundaries
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.side import FoundEngine
from cacheflow.vllm.worker.stage_link import can_link
from cacheflow.vllm.worker.state_blocks import StateBlocks

logger = logging.getLogger(__name__)

_COSTLY_CHUNK = 0.2
"""Share of a chunk's cost that a long pass saves, from which on longer chunks are advised."""

_PROBES_SHARE = 1 / 8
"""Of what the store has room for, the most that measuring it at start may take: objects of a compiled engine are large,
and what others keep in a full store makes room for them."""


def find_engine(
    options: ServingOptions,
    store: Store,
    vllm_config: Any,  # noqa: ANN401 -- vLLM's types
    kv_cache_config: Any,  # noqa: ANN401
    kv_caches: dict[str, torch.Tensor],
) -> FoundEngine:
    """Open, test and measure.

    Raises:
        UnsupportedModelError: The model cannot be recomputed and ``unsupported_models`` is ``refuse``.
        SelfTestError: Restored KV differs from the engine's own.
        ConfigError: The KV cache is laid out in a way CacheFlow does not know, or an option contradicts the engine.
        ProfileError: There is no profile for this engine and ``calibrate`` is off.
    """
    handle = open_model(vllm_config, kv_cache_config, load_only=options.unsupported_models == "load_only")
    lane = lane_of(handle.device)
    layout = BlockLayout.from_kv_caches(kv_caches, kv_cache_config, layer_names=handle.layer_names, lane=lane)
    states = StateBlocks.of(handle, kv_caches, kv_cache_config, lane=lane)
    if states is not None:
        _advise_blocks(options, handle)
    options.require_room_for_chunk(layout.num_bytes(0, layout.num_layers, options.chunk_tokens // layout.block_size))
    make_receive_buffer(handle)
    shape = _shape(handle, layout, vllm_config)
    layers_per_block = _layers_per_block(options, handle, shape)
    if not options.self_test and not vllm_version().known:
        raise ConfigError(
            f"self_test is off, but CacheFlow does not know vLLM {vllm_version().text}: leave it on, it takes a second"
        )
    if options.self_test:
        handle = _tested(options, handle, layout, states, layers_per_block)
    else:
        logger.warning("self_test is off: nothing proves that restored KV equals the engine's own")
    if handle.refusal:
        logger.warning(
            "%s. Prefixes are restored by loading alone: no sooner than the store can bring them, and what it lost is "
            "left to vLLM's prefill", handle.refusal,
        )  # fmt: skip
    forward = PartialForward(handle, lane) if handle.can_recompute else None
    namespace = worker_namespace(
        handle, layout, states, chunk_tokens=options.chunk_tokens, codec=store.codec_identity()
    )
    weights = stage_weights(handle, layout, states)
    costs = None if forward is None else _costs(options, handle, layout, states, forward, digest_of(weights))
    object_bytes = layout.largest_object_bytes(chunk_tokens=options.chunk_tokens, layers_per_block=layers_per_block)
    link = _link(options, store, object_bytes=object_bytes, dtype=str(layout.dtype).removeprefix("torch."))
    facts = EngineFacts(
        shard=handle.shard,
        namespace=namespace.digest,
        shape=shape,
        layers_per_block=layers_per_block,
        block_size=layout.block_size,
        costs=costs,
        load_only_reason=handle.refusal,
        link=link,
        tier_rates=store.tier_rates(),
        first_layer=handle.start_layer,
        weights=weights,
        linked=can_link(handle),
        replicated=all(is_latent(vllm_config.compilation_config.static_forward_context[n]) for n in handle.layer_names),
        row_state_bytes=(
            () if states is None else tuple(states.num_bytes(row, row + 1) for row in range(states.num_rows))
        ),
        identity=tuple(sorted(namespace.parts().items())),
        boundary_token_bytes=handle.boundary.token_bytes if stores_boundaries(options, handle) else 0,
        adapters_leak=_adapters_leak(handle),
    )
    _log_stage(facts)
    return FoundEngine(handle, layout, states, forward, facts)


def _advise_blocks(options: ServingOptions, handle: ModelHandle) -> None:
    """Say when running states depend on where passes end, and passes of a prefill end elsewhere than chunks."""
    size = handle.block_size
    is_mamba2 = handle.groups.state_kind == MAMBA2
    step = int(handle.vllm_config.model_config.get_mamba_chunk_size()) if is_mamba2 else DELTA_CHUNK
    if size % step:
        logger.warning(
            "KV blocks hold %d tokens, no multiple of the %d that a recurrent layer takes at once: running states then "
            "depend in the last bits on where passes end. Give vLLM --block-size %d",
            size, step, -(-size // step) * step,
        )  # fmt: skip
    pass_tokens = int(handle.vllm_config.scheduler_config.max_num_batched_tokens)
    if handle.groups.kept_within_passes and handle.device.type == "cpu" and pass_tokens > size:
        logger.warning(
            "vLLM 0.32 fails with an IndexError on the CPU where a pass of a Mamba-2 model crosses the end of a block: "
            "%d tokens. Give it --max-num-batched-tokens %d", size, size,
        )  # fmt: skip
    if pass_tokens < options.chunk_tokens:
        logger.warning(
            "vLLM prefills %d tokens in a pass, fewer than the %d of a chunk: what is recomputed then differs in its "
            "last bits from what was saved. Give vLLM --max-num-batched-tokens %d",
            pass_tokens, options.chunk_tokens, options.chunk_tokens,
        )  # fmt: skip


def _tested(
    options: ServingOptions,
    handle: ModelHandle,
    layout: BlockLayout,
    states: StateBlocks | None,
    layers_per_block: int,
) -> ModelHandle:
    """The handle after the self-test: of an engine that only loads where recomputation is not exact.

    Raises:
        SelfTestError: Copies of KV blocks are not equal.
        UnsupportedModelError: Recomputation is not exact, and ``unsupported_models`` is ``refuse``.
    """
    forward, refusal = PartialForward(handle, layout.lane) if handle.can_recompute else None, ""
    try:
        result = self_test(
            layout, forward, states, chunk_tokens=options.chunk_tokens, layers_per_block=layers_per_block
        )
    except UnsupportedModelError as error:
        refusal = str(error)
    else:
        refusal = "" if result.difference is None else f"recomputed KV is not the engine's own: {result.difference}"
        logger.info("self-test %s: %s, %.1f s", "failed" if refusal else "passed", refusal or result, result.elapsed_s)
    # On all or on none: a stage of which one rank cannot recompute could not be told from one that can.
    said = [each for each in of_all_ranks(refusal) if each]
    if not said:
        return handle
    reason = f"{type(handle.model).__name__}: {said[0]}"
    require_recomputable([reason], load_only=options.unsupported_models == "load_only")
    return replace(handle, layers=None, refusal=reason)


def _log_stage(facts: EngineFacts) -> None:
    shard = facts.shard
    if not shard.pp_rank or shard.tp_rank:
        return
    if facts.boundary_token_bytes:
        how = f"starts from stored boundary states, {facts.boundary_token_bytes} bytes a token"
    else:
        how = "is handed what the stage below recomputed, in order" if facts.linked else "restores by loading alone"
    logger.info("pipeline stage %d of %d %s", shard.pp_rank, shard.pp_size, how)


def _layers_per_block(options: ServingOptions, handle: ModelHandle, shape: ModelShape) -> int:
    """Layers of an object: the same on all ranks, whatever part of the model each holds."""
    if not handle.compiled:
        own = layers_of_object(
            shape,
            device_type=handle.device.type,
            chunk_tokens=options.chunk_tokens,
            asked=options.layers_per_block,
        )
        return min(of_all_ranks(own))
    if options.layers_per_block not in (None, handle.num_layers):
        raise ConfigError(
            f"layers_per_block is {options.layers_per_block}, but this engine runs a compiled model, which is "
            "bit-exact only in whole passes: leave it out, or run with --enforce-eager to restore by layers"
        )
    return handle.num_layers


def _costs(
    options: ServingOptions,
    handle: ModelHandle,
    layout: BlockLayout,
    states: StateBlocks | None,
    forward: PartialForward,
    fingerprint: str,
) -> CostTable:
    identity = cost_identity(handle, fingerprint=fingerprint)
    pass_tokens = int(handle.vllm_config.scheduler_config.max_num_batched_tokens)
    path = profile_path(options.profile_path, identity, chunk_tokens=options.chunk_tokens, pass_tokens=pass_tokens)
    try:
        return load_costs(path, identity)
    except (ProfileError, OSError) as error:
        if not options.calibrate:
            raise ProfileError(
                f"no cost profile for this engine in {options.profile_path} ({error}); leave calibrate on"
            ) from error
    logger.info("measuring what recomputation costs in this engine, about %.0f s", options.calibrate_budget_s)
    max_tokens = int(handle.vllm_config.model_config.max_model_len)
    costs = calibrate(
        forward,
        layout,
        states,
        identity=identity,
        lengths=Lengths(
            chunk_tokens=options.chunk_tokens,
            pass_tokens=pass_tokens,
            max_tokens=max_tokens,
        ),
        budget_s=options.calibrate_budget_s,
    )
    _advise_chunk(costs, block_size=handle.block_size, max_tokens=max_tokens)
    try:
        save_costs(costs, path)
    except OSError as error:
        logger.warning("the cost profile could not be kept in %s, it is measured again next time: %s", path, error)
    return costs


def _advise_chunk(costs: CostTable, *, block_size: int, max_tokens: int) -> None:
    """Say when chunks of the save cost much more than the engine's own passes, as with a mixture of experts."""
    own = costs.engine_pass
    if own is None:
        return
    chunk_s = sum(costs.kinds[kind].full_s(own.chunk_tokens, 0) for kind in costs.layer_kinds)
    longest = own.longest_chunk(block_size, max_tokens=max_tokens)
    if own.saved_s > _COSTLY_CHUNK * chunk_s and longest > own.chunk_tokens:
        logger.warning(
            "recomputing in chunks of %d tokens costs %.0f %% more than in this engine's passes of %d: restoration "
            "will seldom pay; set chunk_tokens to %d (prefixes saved so far are then saved anew)",
            own.chunk_tokens, own.saved_s / max(chunk_s - own.saved_s, 1e-9) * 100, own.pass_tokens, longest,
        )  # fmt: skip


def _adapters_leak(handle: ModelHandle) -> bool:
    """Whether vLLM computes a request of the base model with an adapter where a step has both.

    LoRA kernels of vLLM 0.32 for the CPU take the number that stands for no adapter, -1, for that of the last slot.
    """
    if handle.device.type != "cpu" or getattr(handle.runner, "lora_manager", None) is None:
        return False
    try:
        from vllm.lora.ops.torch_ops import bgmv_shrink
    except ImportError:  # another vLLM's, of which that is not known
        return True
    out = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 1), torch.ones(1, 1, 1), out, torch.tensor([-1]))
    return bool(out.any())


def _link(options: ServingOptions, store: Store, *, object_bytes: int, dtype: str) -> LinkCost:
    if options.throttle_bytes_per_s is not None:
        # The throttle is the link; probing it would take long and say the same. It carries what a codec leaves.
        share = stored_share(store, object_bytes=object_bytes, dtype=dtype) if options.has_codec else 1.0
        return LinkCost(bytes_per_s=options.throttle_bytes_per_s / share, latency_s=options.throttle_latency_s)
    link = measure_link(store, object_bytes=object_bytes, dtype=dtype, most_share=_PROBES_SHARE)
    return replace(link, latency_s=max(link.latency_s, options.throttle_latency_s))


def _shape(handle: ModelHandle, layout: BlockLayout, vllm_config: Any) -> ModelShape:  # noqa: ANN401
    spec = layer_specs(handle.groups.spec)[0]
    model = vllm_config.model_config
    for name, block_bytes in zip(layout.layer_names, layout.block_bytes_L, strict=True):
        if block_bytes % layout.block_size:
            raise ConfigError(
                f"a KV block holds {block_bytes} bytes of {name}, which are no whole bytes for each of its "
                f"{layout.block_size} tokens: this KV cache is not supported"
            )
    token_bytes_L = tuple(block_bytes // layout.block_size for block_bytes in layout.block_bytes_L)
    return ModelShape(
        name=str(model.model),
        num_layers=handle.num_layers,
        hidden_size=handle.hidden_size,
        num_q_heads=max(spec.num_kv_heads, model.get_num_attention_heads(vllm_config.parallel_config)),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        intermediate_size=int(getattr(model.hf_text_config, "intermediate_size", None) or 1),
        vocab_size=int(model.get_vocab_size()),
        dtype=str(handle.dtype).removeprefix("torch."),
        kv_token_bytes=token_bytes_L if len(set(token_bytes_L)) > 1 else token_bytes_L[0],
    )
