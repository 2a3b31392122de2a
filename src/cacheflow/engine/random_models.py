"""Models with random weights: tiny ones of every family for tests, and real shapes for benchmarks without downloads."""

from __future__ import annotations

from typing import Any

import torch

from cacheflow.engine.attention import ATTENTION_NAME
from cacheflow.engine.families import FAMILIES, parse_dtype
from cacheflow.engine.model import LoadedModel, wrap_module
from cacheflow.errors import UnsupportedModelError
from cacheflow.types import ModelShape

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_TINY_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def tiny_model(
    family: str, *, dtype: str | torch.dtype = "float32", seed: int = 0, device: str = "cpu", **overrides: object
) -> LoadedModel:
    """A random model of 3 layers and hidden size 64 whose attention is far from uniform.

    Args:
        family: One of ``FAMILIES``.
        dtype: Weights are drawn in float32 and rounded, so dtypes of one seed agree.
        seed: Of the weights.
        device: Where it goes.
        **overrides: Configuration values, such as ``sliding_window=24``.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise UnsupportedModelError(f"family {family!r} is not supported; allowed: {', '.join(FAMILIES)}")
    extra = _TINY_MOE if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(family, **{**_TINY, **extra, **overrides})
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    _draw(module, seed)
    for weight in module.parameters():  # not module.to(dtype): it would round the rotary frequencies too
        weight.data = weight.data.to(parse_dtype(dtype))
    return wrap_module(module.to(device=device), name=f"tiny-{family}")


def random_weights(
    shape: ModelShape,
    *,
    device: str,
    dtype: str | torch.dtype = "bfloat16",
    max_tokens: int = 131_072,
    seed: int = 0,
    family: str | None = None,
) -> LoadedModel:
    """A model of a real shape with random weights, built on the device itself; for timing, never for text.

    Args:
        shape: Sizes; experts make it a Qwen3-MoE.
        device: Weights are drawn there.
        dtype: Of weights and KV.
        max_tokens: Longest sequence.
        seed: Of the weights; also the fingerprint, with the shape.
        family: One of ``FAMILIES``; None takes qwen3_moe with experts, qwen3 for names that start with it, else llama.

    Raises:
        UnsupportedModelError: Device, dtype or family is not allowed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = family or _family_of(shape)
    config = AutoConfig.for_model(
        family,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max_tokens,
        sliding_window=shape.sliding_window,
        tie_word_embeddings=False,
        **_experts(shape),
    )
    torch.manual_seed(seed)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=parse_dtype(dtype), attn_implementation=ATTENTION_NAME)
    return wrap_module(module, name=shape.name, fingerprint=f"random-{family}-{seed}-{shape}")


def _family_of(shape: ModelShape) -> str:
    if shape.num_experts:
        return "qwen3_moe"
    if shape.name.lower().startswith("qwen3"):
        return "qwen3"
    return "mistral" if shape.sliding_window is not None else "llama"


def _experts(shape: ModelShape) -> dict[str, Any]:
    if not shape.num_experts:
        return {}
    return {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_active_experts,
        "moe_intermediate_size": shape.intermediate_size,
    }


def _draw(module: Any, seed: int) -> None:  # noqa: ANN401 -- a transformers causal LM
    """Weights large enough that scores spread by several units: near-uniform attention would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.2 * noise if "q_norm" not in name and "k_norm" not in name else 1.6 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                gain = 1.0 if "embed" in name else (1.8 if "q_proj" in name or "k_proj" in name else 1.0)
                fan_in = 1 if "embed" in name else weight.shape[-1]
                weight.copy_(noise * gain / fan_in**0.5)
