"""The attention kernels of a CUDA device: one family for every shape, so that no shape is planned anew.

Shapes: as in ``attention``; the queries are the last ``n`` of ``T`` tokens, causality is aligned to the last key.

Why not torch's own choice: it prefers cuDNN on recent devices, which makes a plan for every exact ``(n, T)``, and so
for every decoded token; and it takes the math kernel, which writes all scores out, for windows and for masks.
"""

from __future__ import annotations

import importlib
import importlib.util
from enum import StrEnum, unique
from typing import Any

import torch
import torch.nn.functional as F

from cacheflow.errors import ConfigError

FLASH3_MODULE = "fa3_fwd_interface"
"""Of the package ``fa3-fwd``: FlashAttention-3's forward pass."""
_HALF = (torch.bfloat16, torch.float16)
_FLASH_HEAD_DIMS = range(8, 257, 8)


@unique
class AttentionKernel(StrEnum):
    """What computes attention; it decides the bits, so it is part of what costs and saved KV are known by."""

    MERGED = "merged"
    """CPU: an unmasked and a causal part, see ``attention``."""
    FLASH2 = "flash2"
    """CUDA, half precision: FlashAttention-2, as torch brings it."""
    FLASH3 = "flash3"
    """CUDA, half precision, on request: FlashAttention-3 of the package ``fa3-fwd``."""
    MASKED = "masked"
    """CUDA otherwise: every head expanded, the mask written out. Exact, and slow."""


def default_kernel(device_type: str, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """The kernel that such models are run with unless another is asked for."""
    if device_type == "cpu":
        return AttentionKernel.MERGED
    takes_flash = dtype in _HALF and head_dim in _FLASH_HEAD_DIMS
    return AttentionKernel.FLASH2 if takes_flash else AttentionKernel.MASKED


def require_flash3(device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    """Pass if FlashAttention-3 can be had for such models.

    Raises:
        ConfigError: It cannot; says why.
    """
    if default_kernel(device_type, dtype, head_dim) is not AttentionKernel.FLASH2:
        raise ConfigError(
            f"attention flash3 is of CUDA devices in half precision with a head_dim of whole eights up to 256; this is "
            f"{device_type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}: leave it out"
        )
    if importlib.util.find_spec(FLASH3_MODULE) is None:
        raise ConfigError(
            "attention flash3 needs the package fa3-fwd, which is not installed: install it or leave it out"
        )


def flash2(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """``[1, Hq, n, D]`` by FlashAttention-2; a token sees itself and ``window - 1`` before it."""
    n, num_keys = query.shape[2], key.shape[2]
    if window is None or num_keys <= window:
        # Of this op causal means aligned to the last key, and key and value may have fewer heads.
        whole = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 -- torch has no public name for it
        out: torch.Tensor = whole(query, key, value, 0.0, n > 1, False, scale=scale)[0]
        return out
    cut = torch.ops.aten._flash_attention_forward  # noqa: SLF001 -- the only way to its windows
    token_major = (each.transpose(1, 2) for each in (query, key, value))
    found: torch.Tensor = cut(
        *token_major, None, None, n, num_keys, 0.0, True, False,
        scale=scale, window_size_left=window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return found.transpose(1, 2)


def flash3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """The same by FlashAttention-3."""
    module: Any = importlib.import_module(FLASH3_MODULE)
    left = -1 if window is None or key.shape[2] <= window else window - 1
    out = module.flash_attn_func(
        *(each.transpose(1, 2) for each in (query, key, value)),
        softmax_scale=scale, causal=True, window_size=(left, 0 if left >= 0 else -1),
    )  # fmt: skip
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found.transpose(1, 2)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """The same in any dtype, with every head expanded and the mask written out."""
    n, num_keys, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    first = 0 if window is None else max(0, num_keys - n - window + 1)
    key, value = (each[:, :, first:].repeat_interleave(group, 1) for each in (key, value))
    seen = seen_by(n, num_keys - first, window, query.device) if n > 1 or window is not None else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def seen_by(n: int, num_keys: int, window: int | None, device: str | torch.device) -> torch.Tensor:
    """``[n, num_keys]`` True where query ``i`` (key position ``num_keys - n + i``) may look."""
    query_at = torch.arange(num_keys - n, num_keys, device=device).unsqueeze(1)
    key_at = torch.arange(num_keys, device=device).unsqueeze(0)
    causal = key_at <= query_at
    return causal if window is None else causal & (key_at > query_at - window)
