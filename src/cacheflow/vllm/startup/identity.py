"""What stored KV and measured costs depend on in a vLLM worker: names that make another engine's bytes a miss."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from cacheflow.plan.costs import CostIdentity
from cacheflow.stores.keys import Namespace
from cacheflow.tensors.device import device_name
from cacheflow.tensors.fingerprint import FULL_LIMIT_BYTES, kernel_identity, weights_fingerprint
from cacheflow.vllm.facts import BOTTOM, LayerDigest
from cacheflow.vllm.models.kv_groups import MAMBA2
from cacheflow.vllm.models.layers import Carry, leaves
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.partial_forward import PartialForward, attention_groups
from cacheflow.vllm.startup.agreement import of_all_ranks
from cacheflow.vllm.startup.local_config import local_folder
from cacheflow.vllm.startup.probe import gathered, make_probe, random_like, run_by_engine, scratch_blocks
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.state_blocks import StateBlocks

_WORKSPACE = "chunked_prefill_workspace_size"
_BY_LAYER = "by layer"
"""Stands in a rank's namespace for its weights, which ``shared_namespace`` adds layer by layer."""


def worker_namespace(
    handle: ModelHandle, layout: BlockLayout, states: StateBlocks | None = None, *, chunk_tokens: int
) -> Namespace:
    """What this rank's saves depend on besides weights and adapters: equal on all pipeline stages, however many.

    Tensor-parallel ranks differ: each has heads of its own.
    """
    config, shard = handle.vllm_config, handle.shard
    return Namespace(
        weights_fingerprint=_BY_LAYER,
        dtype=_dtype_name(layout.dtype),
        chunk_tokens=chunk_tokens,
        rope=_rope(config.model_config.hf_text_config),
        quantization=f"{config.model_config.quantization or 'none'}, kv {config.cache_config.cache_dtype}",
        extra=(
            *kernel_identity(handle.device, library="vllm"),
            ("attention", _backend(handle)),
            ("compiled", str(handle.compiled)),
            ("dtype", _dtype_name(handle.dtype)),
            *_latent_workspace(handle),
            ("layout", layout.identity(of_all_ranks(layout.shapes))),
            *_media_processing(handle),
            ("num_threads", str(_num_threads(handle.device))),
            ("shard", f"tp{shard.tp_rank}of{shard.tp_size}"),
            *_states(handle, states),
        ),
    )


def _states(handle: ModelHandle, states: StateBlocks | None) -> Iterator[tuple[str, str]]:
    """How running states stand in their blocks, and what computes them; nothing without any."""
    if states is None:
        return
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    layer = handle.vllm_config.compilation_config.static_forward_context[states.layout.layer_names[0]]
    parts = ", ".join(f"{tuple(each.shape[1:])} of {_dtype_name(each.dtype)}" for each in layer.kv_cache)
    yield "states", f"{parts}, convolution {'DS' if is_conv_state_dim_first() else 'SD'}"
    yield "states_kernel", _mamba2_kernel(handle) if handle.groups.state_kind == MAMBA2 else _delta_kernel(layer)


def _delta_kernel(layer: Any) -> str:  # noqa: ANN401 -- vLLM's recurrent layer
    return str(getattr(layer, "gdn_prefill_backend", ""))


def _mamba2_kernel(handle: ModelHandle) -> str:
    config = handle.vllm_config.mamba_config
    rounding = "at random" if config.enable_stochastic_rounding else "to nearest"
    chunk_tokens = handle.vllm_config.model_config.get_mamba_chunk_size()
    return f"mamba2 in chunks of {chunk_tokens}, {config.backend.name}, rounding {rounding}"


def stage_weights(
    handle: ModelHandle, layout: BlockLayout, states: StateBlocks | None = None
) -> tuple[LayerDigest, ...]:
    """Digest of each of this rank's layers, and on the first stage of what lies below them; in order.

    Call before anything is served, on every rank: it may run short forwards. A model whose layers cannot be run alone
    has one digest for all of the stage, so that another split of it is another model.
    """
    layers = handle.layers
    if layers is None:
        return ((handle.start_layer if handle.shard.pp_rank else BOTTOM, _of_whole_stage(handle, layout, states)),)
    whole = sum(weight.nbytes for weight in handle.model.parameters()) <= FULL_LIMIT_BYTES
    forward, digests = PartialForward(handle, layout.lane), []
    if handle.is_first_stage:
        digests.append((BOTTOM, _of_prelude(forward, layout, states, whole=whole)))
    plain = []
    for row in range(layers.num_rows):
        modules = torch.nn.ModuleList(layers.modules[slice(*layers.span(row, row + 1))])
        plain.append(weights_fingerprint(modules[0] if len(modules) == 1 else modules, {}, full=whole))
    if handle.drafter is not None:
        plain.append(weights_fingerprint(handle.drafter.model, {}, full=whole))
    if not all(weight.numel() for weight in handle.model.parameters()):
        plain = _with_probe(forward, layout, states, plain)
    return (*digests, *((handle.start_layer + row, digest) for row, digest in enumerate(plain)))


def digest_of(weights: Iterable[LayerDigest]) -> str:
    """One digest for a stage's weights."""
    return hashlib.sha256(json.dumps(list(weights)).encode()).hexdigest()


def cost_identity(handle: ModelHandle, *, fingerprint: str) -> CostIdentity:
    """What costs measured in this worker are valid for."""
    import vllm

    mode = "compiled" if handle.compiled else "eager"
    return CostIdentity(
        model=PurePath(str(handle.vllm_config.model_config.model)).name,
        fingerprint=fingerprint,
        num_layers=handle.num_layers,
        device_type=handle.device.type,
        device=device_name(handle.device),
        dtype=_dtype_name(handle.dtype),
        num_threads=_num_threads(handle.device),
        attention=f"vllm {vllm.__version__} {_backend(handle)} {mode} {handle.shard}",
    )


def _of_whole_stage(handle: ModelHandle, layout: BlockLayout, states: StateBlocks | None) -> str:
    """Digest of the weights; on the CPU also of what they do to a probe.

    There vLLM packs the weights of linear layers into kernels' own memory and leaves empty parameters.
    """
    config: Any = handle.vllm_config.model_config.hf_config
    digest = weights_fingerprint(handle.model, config.to_dict())
    if all(weight.numel() for weight in handle.model.parameters()):
        return digest
    probe = make_probe(handle, num_chunks=1)
    with scratch_blocks(layout, len(probe.tokens), states) as scratch:
        run_by_engine(handle, probe, scratch.kv, scratch.states)
        kv = gathered(layout, scratch.kv)
    return hashlib.sha256(digest.encode() + b"".join(each.tobytes() for each in kv)).hexdigest()


def _of_prelude(forward: PartialForward, layout: BlockLayout, states: StateBlocks | None, *, whole: bool) -> str:
    """Digest of what lies below the first layer: the weights of the modules there, and what they make of a probe.

    Where images or sounds are embedded, that is the weights of all that is no layer.
    """
    config: Any = forward.handle.vllm_config.model_config.hf_config
    probe = make_probe(forward.handle, num_chunks=1)
    with scratch_blocks(layout, len(probe.tokens), states) as scratch:
        segment = forward.segment(0, probe.tokens, scratch.kv, state_blocks=scratch.states[0])
        modules, given = forward.prelude(segment)
    handle = forward.handle
    if handle.inputs.embedded and handle.layers is not None:
        modules = list(_without_layers(handle.model, frozenset(handle.layers.modules)))
        given += [out for module in modules for out in _packed_probes(module, handle)]
    weights = (weights_fingerprint(module, config.to_dict(), full=whole) for module in modules)
    return _digest_of("".join(weights), *given)


def _without_layers(module: torch.nn.Module, layers: frozenset[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """The outermost modules that are no layer and hold none, and the weights of those that hold some."""
    own = torch.nn.Module()
    for name, weight in module.named_parameters(recurse=False):
        own.register_parameter(name, weight)
    for name, buffer in module.named_buffers(recurse=False):
        own.register_buffer(name, buffer)
    yield own
    for child in module.children():
        if layers.isdisjoint(child.modules()):
            yield child
        elif child not in layers:
            yield from _without_layers(child, layers)


def _packed_probes(module: torch.nn.Module, handle: ModelHandle) -> Iterator[torch.Tensor]:
    """What linear layers whose weights vLLM has packed out of sight make of fixed random numbers."""
    for each in module.modules():
        weight = getattr(each, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and not weight.numel():
            width: Any = getattr(each, "input_size_per_partition", None) or each.input_size
            probe = torch.randn((1, int(width)), generator=torch.Generator().manual_seed(13))
            with torch.inference_mode():
                yield from leaves(each(probe.to(handle.device, handle.dtype)))


def _with_probe(
    forward: PartialForward, layout: BlockLayout, states: StateBlocks | None, digests: list[str]
) -> list[str]:
    """Each layer's digest with what it makes of fixed random states: its keys, its values and its output.

    The first layer of all is given tokens instead, the first of a later stage random boundary states.
    """
    handle, tokens, probed = forward.handle, make_probe(forward.handle, num_chunks=1).tokens, []
    with scratch_blocks(layout, len(tokens), states) as scratch:
        carry = None
        for row, digest in enumerate(digests):
            generator, boundary = torch.Generator().manual_seed(13), None
            if not handle.is_first_stage:
                boundary = handle.boundary.random(len(tokens), generator, device=handle.device)
            segment = forward.segment(0, tokens, scratch.kv, boundary, state_blocks=scratch.states[0])
            given: Carry | None = None if carry is None else random_like(carry, torch.Generator().manual_seed(13))
            carry = forward.run(segment, given, layers=(row, row + 1))
            kv = np.empty(layout.num_bytes(row, row + 1, len(scratch.kv)), dtype=np.uint8)
            layout.gather(row, row + 1, scratch.kv, kv)
            own = hashlib.sha256(digest.encode() + kv.tobytes()).hexdigest()
            probed.append(_digest_of(own, *leaves(carry)))
    return probed


def _digest_of(text: str, *tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _rope(config: Any) -> str:  # noqa: ANN401 -- a transformers config
    return json.dumps(getattr(config, "rope_parameters", None) or {}, sort_keys=True, default=str)


def _backend(handle: ModelHandle) -> str:
    return ",".join(dict.fromkeys(group.backend.get_name() for _, group in attention_groups(handle)))


def _latent_workspace(handle: ModelHandle) -> tuple[tuple[str, str], ...]:
    """Tokens of context that latent attention (MLA) adds up at once: longer contexts round by it."""
    layer = handle.vllm_config.compilation_config.static_forward_context[handle.layer_names[0]]
    return (("latent_workspace", str(getattr(layer, _WORKSPACE))),) if hasattr(layer, _WORKSPACE) else ()


def _media_processing(handle: ModelHandle) -> tuple[tuple[str, str], ...]:
    """What decides, besides weights, what an engine makes of an image or a sound, whose hash says nothing of it."""
    if not handle.runner.supports_mm_inputs:
        return ()
    model = handle.vllm_config.model_config
    folder = local_folder(str(model.model), revision=model.revision, environment=os.environ)
    if folder is None:  # not known: nobody else may take what is saved here for their own
        return (("media", secrets.token_hex(16)),)
    digest = hashlib.sha256(json.dumps(model.multimodal_config.mm_processor_kwargs, default=str).encode())
    for path in sorted(each for each in folder.iterdir() if "process" in each.name and each.is_file()):
        digest.update(f"{path.name}|{path.stat().st_size}|".encode() + path.read_bytes())
    return (("media", digest.hexdigest()),)


def _num_threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
