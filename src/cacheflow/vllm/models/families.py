"""The model families recomputation knows, by vLLM's class name, and how their layers are called.

All of them share vLLM's decoder layer: ``hidden, residual = layer(positions, hidden, residual)``, norms that add the
residual in place, and ``self_attn`` with a fused QKV projection. They differ in what happens between projection and
attention; ``write_keys_and_values`` does exactly that part and writes keys and values without attending.

Shapes: ``n`` tokens, ``C`` hidden_size, ``Q`` and ``K`` widths of all query and key heads of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `cacheflow serve` asks for the names alone
    import torch

Prepare = Callable[[Any, "torch.Tensor", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]
"""``(attention module, q [n, Q], k [n, K])`` to the same after the family's norms, before the rotary embedding."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of one family are called.

    Attributes:
        name: vLLM's class name.
        layer_class: Class name of its decoder layers.
        prepare: What it does to queries and keys before the rotary embedding.
    """

    name: str
    layer_class: str
    prepare: Prepare


def write_keys_and_values(
    family: Family,
    layer: Any,  # noqa: ANN401 -- a vLLM decoder layer
    positions: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """The part of a layer that its keys and values depend on, bit for bit, without attention and MLP.

    Queries are projected and rotated too: the projection is one product, and a narrower one would round differently.
    Overwrites ``hidden`` and ``residual``.
    """
    from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

    attention = layer.self_attn
    if residual is None:
        hidden = layer.input_layernorm(hidden)
    else:
        hidden, _ = layer.input_layernorm(hidden, residual)
    qkv, _ = attention.qkv_proj(hidden)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    q, k = family.prepare(attention, q, k)
    _, k = attention.rotary_emb(positions, q, k)
    core = attention.attn
    shape = (-1, core.num_kv_heads, core.head_size)
    unified_kv_cache_update(k.view(shape), v.view(shape), core.layer_name)


def can_write_alone(layer: Any) -> bool:  # noqa: ANN401 -- a vLLM decoder layer
    """Whether the backend of this layer's attention writes the KV cache in a call of its own, unquantised."""
    attention = layer.self_attn.attn
    return not attention.attn_backend.forward_includes_kv_cache_update and attention.query_quant is None


def _as_projected(_: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    return q, k


def _qwen2(attention: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    if not attention.qk_norm:
        return q, k
    return _normed_by_head(attention, q, k)


def _normed_by_head(attention: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    heads = (q.shape[0], -1, attention.head_dim)
    return attention.q_norm(q.view(heads)).view(q.shape), attention.k_norm(k.view(heads)).view(k.shape)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("LlamaForCausalLM", "LlamaDecoderLayer", _as_projected),
        Family("MistralForCausalLM", "MistralDecoderLayer", _as_projected),
        Family("Qwen2ForCausalLM", "Qwen2DecoderLayer", _qwen2),
        Family("Qwen3ForCausalLM", "Qwen3DecoderLayer", _normed_by_head),
        Family("Qwen3MoeForCausalLM", "Qwen3MoeDecoderLayer", _normed_by_head),
    )
}
