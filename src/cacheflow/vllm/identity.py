"""What stored KV and measured costs depend on in a vLLM worker: names that make another engine's bytes a miss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch

from cacheflow.plan.costs import CostIdentity
from cacheflow.plan.keys import Namespace
from cacheflow.tensors.device import device_name
from cacheflow.tensors.fingerprint import kernel_identity, weights_fingerprint
from cacheflow.vllm.layout import BlockLayout
from cacheflow.vllm.model_access import ModelHandle
from cacheflow.vllm.partial_forward import PartialForward
from cacheflow.vllm.probe import make_probe, run_by_engine
from cacheflow.vllm.scratch import scratch_blocks


def worker_namespace(handle: ModelHandle, layout: BlockLayout, *, chunk_tokens: int) -> Namespace:
    """Namespace of this rank's saves without an adapter. Ranks differ: each hashes its own shard of the weights.

    Call before anything is served, on every rank: it may run a short forward.
    """
    config = handle.vllm_config
    return Namespace(
        weights_fingerprint=_fingerprint(handle, layout),
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
            ("shard", str(handle.shard)),
        ),
    )


def shared_namespace(by_rank: Mapping[int, str]) -> str:
    """One digest for all ranks of an engine, from their ``Namespace.digest``; that of a single rank is itself."""
    if len(by_rank) == 1:
        return next(iter(by_rank.values()))
    return _digest(json.dumps(sorted(by_rank.items())))


def lora_namespace(namespace: str, *, name: str, path: str) -> str:
    """Digest under which an adapter's KV is stored; ``namespace`` is the one without adapter."""
    return _digest(json.dumps(["lora", namespace, name, path]))


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


def _fingerprint(handle: ModelHandle, layout: BlockLayout) -> str:
    """Digest of the weights; on the CPU also of what they do to a probe.

    There vLLM packs the weights of linear layers into kernels' own memory and leaves empty parameters behind.
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


def _rope(config: Any) -> str:  # noqa: ANN401 -- a transformers config
    return json.dumps(getattr(config, "rope_parameters", None) or {}, sort_keys=True, default=str)


def _backend(handle: ModelHandle) -> str:
    return ",".join(group.backend.get_name() for group in handle.runner.attn_groups[0])


def _num_threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
