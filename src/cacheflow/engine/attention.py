"""The attention function the decoder layers call: a chunk of queries over everything before it.

Shapes: ``n`` query tokens, ``T`` key tokens (the queries are the last ``n`` of them), ``Hq`` query heads, ``H`` key
and value heads, ``G = Hq / H``, ``D`` head_dim. Batch is always 1.

Registered with transformers as ``"cacheflow"``, and with FlashAttention-3 as ``"cacheflow-flash3"``. The kernels taken
depend on ``(n, T, window, dtype, device)`` alone, never on where keys and values came from: that is what makes a
restored prefix bit-equal to a recomputed one. Those of a CUDA device are in ``cuda_attention``.

Why not plain SDPA on CPU: with a lower-right causal mask it materialises the mask and expands keys and values to
``Hq`` heads. An unmasked part over the keys before the chunk (the ``G`` query heads of a group folded into the query
length, so nothing is expanded) merged by log-sum-exp with a causal part over the chunk itself took, for 512 queries,
9/3 heads of 64, on two EPYC cores, in milliseconds (median of 7; merged / masked SDPA):

====================  =======  =======  =======  =======
tokens before         512      2,048    3,584    7,680
====================  =======  =======  =======  =======
bf16                  10 / 11  23 / 27  39 / 46  72 / 102
fp32                  10 / 11  25 / 27  34 / 42  62 / 86
====================  =======  =======  =======  =======
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from cacheflow.engine.cuda_attention import AttentionKernel, default_kernel, flash2, flash3, masked, seen_by
from cacheflow.errors import UnsupportedModelError

ATTENTION_NAME = "cacheflow"
FLASH3_ATTENTION_NAME = "cacheflow-flash3"

# Arguments layers pass along that cannot change the result for one unpadded sequence.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"})

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 -- the only op that returns the log-sum-exp on CPU


def chunk_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: AttentionKernel | None = None,
    **arguments: Any,  # noqa: ANN401 -- the transformers interface passes anything
) -> tuple[torch.Tensor, None]:
    """Attend a chunk ``query [1, Hq, n, D]`` over ``key, value [1, H, T, D]``; the chunk is the last ``n`` of ``T``.

    Args:
        module: The calling attention layer (unused: all it could add comes as an argument).
        query: ``[1, Hq, n, D]``, any strides.
        key: ``[1, H, T, D]``, a strided view of the KV buffer.
        value: Like ``key``.
        attention_mask: Must be None; causality and windows are exact here.
        kernel: None for the device's default; of FlashAttention-3 see ``require_flash3``.
        **arguments: ``scaling``, ``sliding_window`` and ``dropout`` (must be 0) are honoured; those that cannot matter
            are ignored.

    Returns:
        ``[1, n, Hq, D]`` contiguous, and None for the attention weights.

    Raises:
        UnsupportedModelError: The layer asks for something this function does not compute (a mask, attention sinks,
            a soft cap, dropout, a batch).
    """
    kernel = kernel or default_kernel(query.device.type, query.dtype, query.shape[-1])
    scaling = arguments.pop("scaling", None)
    window = arguments.pop("sliding_window", None)
    _refuse_unknown(query, attention_mask, arguments)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if kernel is not AttentionKernel.MERGED:
        out = _ON_CUDA[kernel](query, key, value, scale, window)
    elif window is not None and key.shape[2] > window:
        out = _windowed(query, key, value, scale, window)
    else:
        out = _merged_cpu(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


_ON_CUDA = {AttentionKernel.FLASH2: flash2, AttentionKernel.FLASH3: flash3, AttentionKernel.MASKED: masked}


def _refuse_unknown(query: torch.Tensor, mask: torch.Tensor | None, arguments: dict[str, Any]) -> None:
    unknown = sorted(
        name for name, value in arguments.items() if value is not None and name not in _HARMLESS and name != "dropout"
    )
    if unknown or mask is not None or arguments.get("dropout") or query.shape[0] != 1:
        raise UnsupportedModelError(
            f"attention was called with batch {query.shape[0]}, mask {'given' if mask is not None else None}, dropout "
            f"{arguments.get('dropout')}, unknown arguments {unknown}; allowed are batch 1, scaling, sliding_window"
        )


def _merged_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Unmasked part over the tokens before the chunk, causal part over the chunk, merged by log-sum-exp."""
    _, num_q_heads, n, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    offset, group = num_keys - n, num_q_heads // num_kv_heads
    if n == 1:
        folded = query.reshape(1, num_kv_heads, group, head_dim)
        out: torch.Tensor = _flash_cpu(folded, key, value, 0.0, False, scale=scale)[0]
        return out.reshape(1, num_q_heads, 1, head_dim)
    own_key, own_value = (
        x[:, :, offset:].repeat_interleave(group, 1) if group > 1 else x[:, :, offset:] for x in (key, value)
    )
    own: torch.Tensor
    own, own_lse = _flash_cpu(query, own_key, own_value, 0.0, True, scale=scale)
    if offset == 0:
        return own
    folded = query.reshape(1, num_kv_heads, group * n, head_dim)
    before, before_lse = _flash_cpu(folded, key[:, :, :offset], value[:, :, :offset], 0.0, False, scale=scale)
    weight = torch.sigmoid(before_lse.reshape(1, num_q_heads, n) - own_lse).unsqueeze(-1)
    before = before.reshape(1, num_q_heads, n, head_dim)
    return torch.lerp(own.float(), before.float(), weight).to(query.dtype)


def _windowed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Exact masking of a sliding window that cuts in; a token sees itself and ``window - 1`` before it."""
    n, num_keys = query.shape[2], key.shape[2]
    first = max(0, num_keys - n - window + 1)
    mask = _window_mask(n, num_keys - first, window, str(query.device))
    return F.scaled_dot_product_attention(
        query, key[:, :, first:], value[:, :, first:], attn_mask=mask, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


@lru_cache(maxsize=8)
def _window_mask(n: int, num_keys: int, window: int, device: str) -> torch.Tensor:
    """``seen_by``, kept."""
    # Kept across calls, and calls may run inside inference_mode: an inference tensor must not leak out of it.
    with torch.inference_mode(False):
        return seen_by(n, num_keys, window, device)


AttentionInterface.register(ATTENTION_NAME, chunk_attention)
AttentionInterface.register(FLASH3_ATTENTION_NAME, partial(chunk_attention, kernel=AttentionKernel.FLASH3))
