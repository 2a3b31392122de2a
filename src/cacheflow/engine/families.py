"""Which models the engine takes: an allow-list, because a wrong forward is silent.

Calling decoder layers directly was right for these families and silently wrong for gpt-oss (attention sinks) and
Gemma-2 (soft cap). A family is added here after the self-test and ``tests/engine`` cover it.
"""

from __future__ import annotations

from typing import Any

import torch

from cacheflow.errors import ConfigError, UnsupportedModelError
from cacheflow.hybrid_shape import DELTA_CHUNK, HybridShape
from cacheflow.model_shape import ModelShape
from cacheflow.shapes import hf_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
HYBRID_FAMILIES = ("qwen3_5_text",)
"""Gated DeltaNet layers below each attention layer; on the CPU, where transformers computes them with torch alone."""

# "dynamic" and "longrope" change the frequencies with the length seen so far: keys of a chunk would depend on what ran
# before it, and a recomputed chunk would not equal the saved one.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
HYBRID_LAYER_TYPES = ("full_attention", "linear_attention")
DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16", "float32")}


def check_supported(config: Any, *, device: str, dtype: torch.dtype) -> None:  # noqa: ANN401 -- transformers config
    """Refuse a model configuration the engine cannot reproduce exactly.

    Raises:
        UnsupportedModelError: Family, rope type, layer type, quantisation, device or dtype is not allowed; the message
            lists what is.
    """
    kind = torch.device(device).type
    hybrid = config.model_type in HYBRID_FAMILIES
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for key, values, allowed in (
        ("model_type", [config.model_type], (*FAMILIES, *HYBRID_FAMILIES)),
        ("rope_type", [rope], ROPE_TYPES),
        ("layer_types", getattr(config, "layer_types", None) or [], HYBRID_LAYER_TYPES if hybrid else LAYER_TYPES),
        ("device", [kind], ("cpu",) if hybrid else tuple(DTYPES)),
        ("dtype", [dtype_name(dtype)], DTYPES.get(kind, ())),
        ("quantization_config", [getattr(config, "quantization_config", None)], (None,)),
    ):
        refused = sorted({str(value) for value in values if value not in allowed})
        if refused:
            raise UnsupportedModelError(
                f"{key} {', '.join(refused)} is not supported; allowed: {', '.join(map(str, allowed))}"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a torch dtype as the rest of the package writes it, such as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def require_chunk_tokens(shape: ModelShape, chunk_tokens: int) -> None:
    """Pass if a model may be saved in chunks of so many tokens.

    Raises:
        ConfigError: It is a hybrid, and they are no multiple of what its recurrent layers take at once.
    """
    if isinstance(shape, HybridShape) and chunk_tokens % DELTA_CHUNK:
        raise ConfigError(
            f"chunk_tokens is {chunk_tokens}, must be a multiple of {DELTA_CHUNK} for {shape.name}: its recurrent "
            "layers round differently where they are cut elsewhere"
        )


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Torch dtype of a name such as ``"bfloat16"``.

    Raises:
        UnsupportedModelError: The name is not an allowed dtype.
    """
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES["cuda"]:
        raise UnsupportedModelError(f"dtype {name!r} is not supported; allowed: {', '.join(DTYPES['cuda'])}")
    return getattr(torch, name)  # type: ignore[no-any-return]


def shape_of(config: Any, *, name: str, dtype: torch.dtype) -> ModelShape:  # noqa: ANN401 -- transformers config
    """Shape of a supported configuration.

    Raises:
        ConfigError: A hybrid's layers are no rows of one length.
    """
    if config.model_type in HYBRID_FAMILIES:
        return hf_config.shape_of({**config.to_dict(), "dtype": dtype_name(dtype)}, name=name)
    num_experts = getattr(config, "num_experts", 0) or 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        window = None
    return ModelShape(
        name=name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.moe_intermediate_size if num_experts else config.intermediate_size,
        vocab_size=config.vocab_size,
        num_experts=num_experts,
        num_active_experts=config.num_experts_per_tok if num_experts else 0,
        sliding_window=window,
        dtype=dtype_name(dtype),
    )
