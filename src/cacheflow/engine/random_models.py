"""Models with random weights: tiny ones of every family for tests, and real shapes for benchmarks without downloads."""

from __future__ import annotations

from typing import Any

import torch

from cacheflow.engine.attention import ATTENTION_NAME
from cacheflow.engine.families import FAMILIES, HYBRID_FAMILIES, parse_dtype
from cacheflow.engine.model import LoadedModel, wrap_module
from cacheflow.errors import UnsupportedModelError
from cacheflow.hybrid_shape import HybridShape
from cacheflow.model_shape import ModelShape

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
_TINY_HYBRID = {
    "num_hidden_layers": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SLOWEST_DECAY, FASTEST_DECAY = 0.002, 0.05
"""What a recurrent layer forgets with a token, of random models. transformers draws up to 16, which forgets all of it:
a state that is wrong would then show nowhere."""
_TINY_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def tiny_model(
    family: str,
    *,
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    device: str = "cpu",
    flash3: bool = False,
    **overrides: object,
) -> LoadedModel:
    """A random model of 3 layers (a hybrid of 8) and hidden size 64 whose attention is far from uniform.

    Args:
        family: One of ``FAMILIES`` or ``HYBRID_FAMILIES``.
        dtype: Weights are drawn in float32 and rounded, so dtypes of one seed agree.
        seed: Of the weights.
        device: Where it goes.
        flash3: Compute attention by FlashAttention-3.
        **overrides: Configuration values, such as ``sliding_window=24``.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    from transformers import AutoConfig

    known = (*FAMILIES, *HYBRID_FAMILIES)
    if family not in known:
        raise UnsupportedModelError(f"family {family!r} is not supported; allowed: {', '.join(known)}")
    extra = _TINY_HYBRID if family in HYBRID_FAMILIES else _TINY_MOE if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(family, **{**_TINY, **extra, **overrides})
    module = random_module(config, dtype=dtype, seed=seed)
    return wrap_module(module.to(device=device), name=f"tiny-{family}", flash3=flash3)


def random_module(config: Any, *, dtype: str | torch.dtype, seed: int = 0) -> Any:  # noqa: ANN401 -- transformers'
    """A causal LM of a transformers configuration with random weights, drawn in float32 and rounded."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    _draw(module, seed)
    for weight in module.parameters():  # not module.to(dtype): it would round the rotary frequencies too
        weight.data = weight.data.to(parse_dtype(dtype))
    return module


def random_weights(  # noqa: PLR0913 -- keyword-only
    shape: ModelShape,
    *,
    device: str,
    dtype: str | torch.dtype = "bfloat16",
    max_tokens: int = 131_072,
    seed: int = 0,
    family: str | None = None,
    flash3: bool = False,
) -> LoadedModel:
    """A model of a real shape with random weights, built on the device itself; for timing, never for text.

    Args:
        shape: Sizes; experts make it a Qwen3-MoE, recurrent layers a Qwen3.5.
        device: Weights are drawn there.
        dtype: Of weights and KV.
        max_tokens: Longest sequence.
        seed: Of the weights; also the fingerprint, with the shape.
        family: One of ``FAMILIES``; None takes qwen3_moe with experts, qwen3 for names that start with it, else llama.
        flash3: Compute attention by FlashAttention-3.

    Raises:
        UnsupportedModelError: Device, dtype or family is not allowed, or the shape is a hybrid with experts.
    """
    from transformers import AutoModelForCausalLM

    family = family or _family_of(shape)
    config = config_of(shape, family, max_tokens=max_tokens)
    torch.manual_seed(seed)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=parse_dtype(dtype), attn_implementation=ATTENTION_NAME)
    _slow_decay(module, torch.Generator().manual_seed(seed))
    return wrap_module(module, name=shape.name, fingerprint=f"random-{family}-{seed}-{shape}", flash3=flash3)


def config_of(shape: ModelShape, family: str | None = None, *, max_tokens: int = 131_072) -> Any:  # noqa: ANN401 -- transformers'
    """The transformers configuration of a real shape; see ``random_weights``.

    Raises:
        UnsupportedModelError: The shape is a hybrid with experts.
    """
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family or _family_of(shape),
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
        **_recurrent(shape),
    )


def _family_of(shape: ModelShape) -> str:
    if isinstance(shape, HybridShape):
        if shape.num_experts:
            raise UnsupportedModelError(
                f"{shape.name} has recurrent layers and experts: not supported; allowed: {', '.join(HYBRID_FAMILIES)}"
            )
        return HYBRID_FAMILIES[0]
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


def _recurrent(shape: ModelShape) -> dict[str, Any]:
    if not isinstance(shape, HybridShape):
        return {}
    return {
        "layer_types": [
            "linear_attention" if shape.is_recurrent(layer) else "full_attention" for layer in range(shape.num_layers)
        ],
        "linear_num_key_heads": shape.num_state_k_heads,
        "linear_num_value_heads": shape.num_state_v_heads,
        "linear_key_head_dim": shape.state_k_dim,
        "linear_value_head_dim": shape.state_v_dim,
        "linear_conv_kernel_dim": shape.conv_kernel,
    }


def _slow_decay(module: Any, generator: torch.Generator) -> None:  # noqa: ANN401 -- a transformers causal LM
    """Let recurrent layers remember hundreds of tokens."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("A_log"):
                decay = torch.empty(weight.shape).uniform_(SLOWEST_DECAY, FASTEST_DECAY, generator=generator)
                weight.copy_(decay.log())


def _draw(module: Any, seed: int) -> None:  # noqa: ANN401 -- a transformers causal LM
    """Weights large enough that scores spread by several units: near-uniform attention would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    hybrid = "linear_attention" in (getattr(module.config, "layer_types", None) or ())
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                # Of a hybrid all norms but that of a recurrent layer's output add 1 to their weight.
                mean = -1.0 if hybrid and "linear_attn.norm" not in name else 0.0
                mean += 1.6 if "q_norm" in name or "k_norm" in name else 1.0
                weight.copy_(mean + 0.2 * noise)
            elif name.endswith("dt_bias"):
                weight.fill_(1.0)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                gain = 1.0 if "embed" in name else (1.8 if "q_proj" in name or "k_proj" in name else 1.0)
                fan_in = 1 if "embed" in name else weight.shape[-1]
                weight.copy_(noise * gain / fan_in**0.5)
    _slow_decay(module, generator)
