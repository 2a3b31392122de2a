"""A digest that tells two sets of weights apart, for store keys."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch

FULL_LIMIT_BYTES = 2 << 30
"""Models up to this size are hashed whole (0.2 to 0.6 s a GB), larger ones by samples of every weight."""

_SAMPLE_BYTES = 1 << 12
_SAMPLES = 256
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "architectures"}


def weights_fingerprint(module: torch.nn.Module, config: Mapping[str, Any], *, full: bool | None = None) -> str:
    """SHA-256 over configuration, and name, shape, dtype and bytes of every parameter and buffer; 64 hex digits.

    Args:
        module: Any torch module; weights may lie on any device.
        config: Its configuration as a dict; names that start with ``_`` and those that change with the library that
            wrote them are left out.
        full: Hash every byte; False hashes 256 evenly spaced pieces of 4 KiB of each larger weight (a fine-tuned or
            merged matrix differs in all of them; a change to a few rows may be missed). None decides by size.
    """
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    total = sum(weight.nbytes for weight in weights.values())
    whole = total <= FULL_LIMIT_BYTES if full is None else full
    digest = hashlib.sha256(b"full" if whole else b"sampled")
    digest.update(json.dumps(_stable(config), sort_keys=True, default=str).encode())
    for name in sorted(weights):
        weight = weights[name].detach()
        digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}".encode())
        digest.update(_bytes(weight, whole=whole))
    return digest.hexdigest()


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _VOLATILE}


def _bytes(weight: torch.Tensor, *, whole: bool) -> memoryview:
    flat = weight.contiguous().view(-1).view(torch.uint8)
    if not whole and flat.numel() > _SAMPLE_BYTES * _SAMPLES:
        starts = torch.linspace(0, flat.numel() - _SAMPLE_BYTES, _SAMPLES, dtype=torch.float64).long()
        # Made where it is used: 2 KiB go to a device, not the 8 MiB of the whole index.
        index = starts.to(flat.device).unsqueeze(1) + torch.arange(_SAMPLE_BYTES, device=flat.device)
        flat = flat[index].view(-1)
    return flat.cpu().numpy().data


def kernel_identity(device: torch.device, *, library: str) -> tuple[tuple[str, str], ...]:
    """What besides weights and tokens decides the bits of a forward on this machine; for ``Namespace.extra``.

    A prefix saved by another torch or on another processor is close, not equal: it must be a miss. The number of
    threads is the caller's to add: a float32 product of a few rows rounds differently when more threads share it.

    Args:
        device: Where the forward runs.
        library: Module whose ``__version__`` decides too, since it holds the model's code: ``transformers``, ``vllm``.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return (
        ("device", f"{device.type}:{name}"),
        ("torch", torch.__version__),
        (library, str(importlib.import_module(library).__version__)),
    )
