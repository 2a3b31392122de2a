"""What stored KV and measured costs depend on in a vLLM worker: names that make another engine's bytes a miss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from cacheflow.plan.costs import CostIdentity
from cacheflow.stores.keys import Namespace
from cacheflow.tensors.device import device_name
from cacheflow.tensors.fingerprint import FULL_LIMIT_BYTES, kernel_identity, weights_fingerprint
from cacheflow.vllm.facts import BOTTOM, LayerDigest
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.startup.probe import make_probe, random_states, run_by_engine, scratch_blocks
from cacheflow.vllm.worker.layout import BlockLayout

_BY_LAYER = "by layer"
"""Stands in a rank's namespace for its weights, which ``shared_namespace`` adds layer by layer."""


def worker_namespace(handle: ModelHandle, layout: BlockLayout, *, chunk_tokens: int) -> Namespace:
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
            ("layout", layout.identity),
            ("num_threads", str(_num_threads(handle.device))),
            ("shard", f"tp{shard.tp_rank}of{shard.tp_size}"),
        ),
    )


def stage_weights(handle: ModelHandle, layout: BlockLayout) -> tuple[LayerDigest, ...]:
    """Digest of each of this rank's layers, and on the first stage of what lies below them; in order.

    Call before anything is served, on every rank: it may run short forwards. A model whose layers cannot be run alone
    has one digest for all of the stage, so that another split of it is another model.
    """
    config: Any = handle.vllm_config.model_config.hf_config
    if handle.inner is None:
        return ((handle.start_layer if handle.shard.pp_rank else BOTTOM, _of_whole_stage(handle, layout)),)
    whole = sum(weight.nbytes for weight in handle.model.parameters()) <= FULL_LIMIT_BYTES
    digests = []
    if handle.is_first_stage:
        forward = PartialForward(handle)
        bottom = weights_fingerprint(handle.inner.embed_tokens, config.to_dict(), full=whole)
        embedded = forward.embed(make_probe(handle, num_chunks=1).tokens).hidden
        digests.append((BOTTOM, _digest_of(bottom, embedded)))
    layers = list(handle.inner.layers)[handle.start_layer : handle.end_layer]
    plain = [weights_fingerprint(layer, {}, full=whole) for layer in layers]
    if not all(weight.numel() for weight in handle.model.parameters()):
        plain = _with_probe(handle, layout, plain)
    return (*digests, *((handle.start_layer + index, digest) for index, digest in enumerate(plain)))


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


def _of_whole_stage(handle: ModelHandle, layout: BlockLayout) -> str:
    """Digest of the weights; on the CPU also of what they do to a probe.

    There vLLM packs the weights of linear layers into kernels' own memory and leaves empty parameters.
    """
    config: Any = handle.vllm_config.model_config.hf_config
    digest = weights_fingerprint(handle.model, config.to_dict())
    if all(weight.numel() for weight in handle.model.parameters()):
        return digest
    forward = PartialForward(handle)
    probe = make_probe(handle, num_chunks=1)
    with scratch_blocks(layout, len(probe.tokens)) as block_ids:
        kv = run_by_engine(forward, layout, probe, block_ids)
    return hashlib.sha256(digest.encode() + kv.tobytes()).hexdigest()


def _with_probe(handle: ModelHandle, layout: BlockLayout, digests: list[str]) -> list[str]:
    """Each layer's digest with what it makes of fixed random states: its keys, its values and its output."""
    forward = PartialForward(handle)
    num_tokens = make_probe(handle, num_chunks=1).chunk_tokens
    probed = []
    with scratch_blocks(layout, num_tokens) as block_ids:
        piece = forward.piece(0, num_tokens, block_ids)
        for index, digest in enumerate(digests):
            states = random_states(handle, num_tokens, torch.Generator().manual_seed(13))
            out = forward.run(piece, states, layers=(index, index + 1))
            forward.wait()
            assert out is not None
            assert out.residual is not None
            kv = np.empty(layout.num_bytes(1, len(block_ids)), dtype=np.uint8)
            layout.fence()
            layout.gather(index, index + 1, block_ids, kv)
            own = hashlib.sha256(digest.encode() + kv.tobytes()).hexdigest()
            probed.append(_digest_of(own, out.hidden, out.residual))
    return probed


def _digest_of(text: str, *tensors: torch.Tensor) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _rope(config: Any) -> str:  # noqa: ANN401 -- a transformers config
    return json.dumps(getattr(config, "rope_parameters", None) or {}, sort_keys=True, default=str)


def _backend(handle: ModelHandle) -> str:
    return ",".join(group.backend.get_name() for group in handle.runner.attn_groups[0])


def _num_threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
