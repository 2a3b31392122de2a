"""A digest that tells two sets of weights apart, for store keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

FULL_LIMIT_BYTES = 2 << 30
"""Models up to this size are hashed whole (0.2 to 0.6 s a GB), larger ones by samples of every weight."""

_SAMPLE_BYTES = 1 << 12
_SAMPLES = 256
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "architectures"}


def weights_fingerprint(module: Any, *, full: bool | None = None) -> str:  # noqa: ANN401 -- a torch module with config
    """SHA-256 over configuration, and name, shape, dtype and bytes of every parameter and buffer; 64 hex digits.

    Args:
        module: A transformers model; weights may lie on any device.
        full: Hash every byte; False hashes 256 evenly spaced pieces of 4 KiB of each larger weight (a fine-tuned or
            merged matrix differs in all of them; a change to a few rows may be missed). None decides by size.
    """
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    total = sum(weight.nbytes for weight in weights.values())
    whole = total <= FULL_LIMIT_BYTES if full is None else full
    digest = hashlib.sha256(b"full" if whole else b"sampled")
    digest.update(json.dumps(_stable_config(module.config), sort_keys=True, default=str).encode())
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}".encode())
        digest.update(_bytes(weight, whole=whole))
    return digest.hexdigest()


def _stable_config(config: Any) -> dict[str, Any]:  # noqa: ANN401 -- a transformers config
    values: dict[str, Any] = config.to_dict()
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in _VOLATILE}


def _bytes(weight: torch.Tensor, *, whole: bool) -> memoryview:
    flat = weight.contiguous().view(-1).view(torch.uint8)
    if not whole and flat.numel() > _SAMPLE_BYTES * _SAMPLES:
        starts = torch.linspace(0, flat.numel() - _SAMPLE_BYTES, _SAMPLES, dtype=torch.float64).long()
        index = starts.unsqueeze(1) + torch.arange(_SAMPLE_BYTES)
        flat = flat[index.to(flat.device)].view(-1)
    return flat.cpu().numpy().data


def kernel_identity(device: torch.device) -> tuple[tuple[str, str], ...]:
    """What besides weights and tokens decides the bits of a forward on this machine; for ``Namespace.extra``.

    A prefix saved by another torch or on another processor is close, not equal: it must be a miss. The number of
    threads is the caller's to add: a float32 product of a few rows rounds differently when more threads share it.
    """
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return (
        ("device", f"{device.type}:{name}"),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
    )
