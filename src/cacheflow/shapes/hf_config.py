"""A model's shape from its Hugging Face ``config.json``: plain attention, dense or with experts, or a hybrid.

A hybrid has Gated DeltaNet layers below each attention layer (Qwen3-Next, Qwen3.5, Qwen3.6), or layers that do one
thing each: attention, Mamba-2 or an MLP (Nemotron-H). Pure: takes the parsed JSON. What a shape cannot say (latent
caches, other recurrent layers, layers that differ) is refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import HybridShape, Mamba2Shape
from cacheflow.model_shape import DTYPE_BYTES, ModelShape

Config = Mapping[str, Any]
"""A parsed ``config.json``, or its ``text_config``."""

SIGNS = ("architectures", "model_type", "text_config", "num_hidden_layers")
"""A Hugging Face configuration has at least one of these keys."""

KEYS = {
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_active_experts": "num_experts_per_tok",
}
"""What Hugging Face calls a field of ``ModelShape``, where it has another name."""

HYBRID_KEYS = {
    **KEYS,
    "num_state_k_heads": "linear_num_key_heads",
    "num_state_v_heads": "linear_num_value_heads",
    "state_k_dim": "linear_key_head_dim",
    "state_v_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
    "state_dtype": "mamba_ssm_dtype",
    "shared_intermediate_size": "shared_expert_intermediate_size",
}
"""The same for ``HybridShape``."""

MAMBA2_KEYS = {
    **KEYS,
    "num_layers": "hybrid_override_pattern",
    "pattern": "hybrid_override_pattern",
    "num_state_heads": "mamba_num_heads",
    "state_head_dim": "mamba_head_dim",
    "state_dim": "ssm_state_size",
    "num_state_groups": "n_groups",
    "state_dtype": "mamba_ssm_cache_dtype",
    "shared_intermediate_size": "moe_shared_expert_intermediate_size",
}
"""The same for ``Mamba2Shape``."""

_FULL = ("full_attention", "attention")
_DELTA_NET = "linear_attention"
_DELTA_NET_TYPES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
"""Model types whose ``linear_attention`` layers are Gated DeltaNet ones, and whose attention has an output gate."""
_ROW_KEY, _ROW_LAYERS = "full_attention_interval", 4
"""Where these types name no layer, each so many layers end in one of full attention; 4 is what their code assumes."""
_MAMBA2_TYPES = ("falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")
"""Model types whose recurrent layers are Mamba-2 ones."""
_WITH_STATES, _WITH_TOKENS = {_DELTA_NET, "mamba", "hybrid", "M"}, {*_FULL, "hybrid", "*"}
"""What these types call their layers: "hybrid" has both, the letters are those of ``hybrid_override_pattern``."""
_SINGLE_TYPES = ("nemotron_h",)
"""Those of which each layer does one thing, an MLP or its mixing of tokens."""
_LETTERS = {
    "mamba": "M", _DELTA_NET: "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
"""Of ``hybrid_override_pattern``, where the layers are listed by name instead, in one of two ways."""
_WINDOWED = ("sliding_attention", "chunked_attention")
_RECURRENT_KEYS = (
    "attn_layer_period", "full_attention_interval", "hybrid_override_pattern", "linear_conv_kernel_dim",
    "mamba_d_state", "mamba_num_heads", "rwkv_hidden_size", "ssm_cfg", "state_size",
)  # fmt: skip
_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern", "attention_chunk_size")
_ALIKE = ("mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")
"""Model types whose ``sliding_window``, where it is on, holds for all layers, or from ``max_window_layers`` on."""


class CacheKind(Enum):
    """What the layers of a model keep of the tokens they have seen."""

    FULL = "keys and values of every token"
    WINDOW = "a sliding window of tokens in every layer"
    MIXED = "a sliding window of tokens in some layers and every token in others"
    LATENT = "a compressed latent (MLA) instead of keys and values"
    DELTA_NET = "the state of a gated delta rule in some layers and every token in others"
    MAMBA2 = "the state of a Mamba-2 layer in some layers and every token in others"
    KIMI_DELTA = "the state of Kimi Delta Attention (KDA) in some layers"
    RECURRENT = "a recurrent state in some layers instead of keys and values"

    @property
    def has_states(self) -> bool:
        """Whether a prefix is restored with running states besides keys and values."""
        return self in (CacheKind.DELTA_NET, CacheKind.MAMBA2)


def is_hf_config(values: object) -> bool:
    """Whether a parsed JSON file is a Hugging Face configuration."""
    return isinstance(values, Mapping) and any(key in values for key in SIGNS)


def text_config(config: Config) -> Config:
    """The part that describes the language model: nested in multimodal models, else the whole."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def cache_kind(text: Config) -> CacheKind:
    """What the layers keep, as far as the configuration says it.

    Args:
        text: Of the language model, see ``text_config``.
    """
    if text.get("linear_attn_config"):  # Kimi's name for it; the other layers keep a latent
        return CacheKind.KIMI_DELTA
    if text.get("kv_lora_rank"):
        return CacheKind.LATENT
    if _is_mamba2(text):
        return CacheKind.MAMBA2
    if text.get("model_type") in _DELTA_NET_TYPES and {*_layer_types(text)} <= {_DELTA_NET, *_FULL}:
        return CacheKind.DELTA_NET
    listed = _layer_types(text)
    if listed:
        kinds = {*listed}
        if kinds - {*_FULL, *_WINDOWED}:
            return CacheKind.RECURRENT
        if not kinds & {*_WINDOWED}:
            return CacheKind.FULL
        return CacheKind.MIXED if len(kinds) > 1 else CacheKind.WINDOW
    if any(text.get(key) is not None for key in _RECURRENT_KEYS):
        return CacheKind.RECURRENT
    return _window_kind(text)


def _is_mamba2(text: Config) -> bool:
    if text.get("model_type") not in _MAMBA2_TYPES:
        return False
    kinds = {*(_layer_types(text) or text.get("hybrid_override_pattern") or ())}
    return not kinds or bool(kinds & _WITH_STATES and kinds & _WITH_TOKENS)


def _window_kind(text: Config) -> CacheKind:
    if any(text.get(key) is not None for key in _PATTERN_KEYS):
        return CacheKind.MIXED
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return CacheKind.FULL
    if text.get("model_type") not in _ALIKE:
        return CacheKind.MIXED  # Gemma 2, for one, alternates and does not say so
    full_layers = text.get("max_window_layers") if "use_sliding_window" in text else None
    if not full_layers:
        return CacheKind.WINDOW
    return CacheKind.FULL if full_layers >= text.get("num_hidden_layers", 0) else CacheKind.MIXED


def shape_of(config: Config, *, name: str) -> ModelShape:
    """The shape that a ``config.json`` describes.

    Args:
        config: The parsed file.
        name: For people.

    Raises:
        ConfigError: A key is missing or no whole number, or the model is of a kind that a shape cannot describe; names
            the key, not the file.
    """
    text = text_config(config)
    kind = cache_kind(text)
    if kind is CacheKind.MAMBA2:
        return _mamba2(config, text, name=name)
    if kind not in (CacheKind.FULL, CacheKind.WINDOW, CacheKind.DELTA_NET):
        raise ConfigError(f"not supported: the model keeps {kind.value}")
    if config.get("is_encoder_decoder"):
        raise ConfigError("not supported: is_encoder_decoder is true; only decoder-only models are")
    _require_unquantised(config, text)
    num_q_heads = _count(text, "num_attention_heads")
    hidden_size = _count(text, "hidden_size")
    experts = _experts(text, shared=kind is CacheKind.DELTA_NET)
    of_any: dict[str, Any] = {
        "name": name,
        "num_layers": _count(text, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_q_heads": num_q_heads,
        "num_kv_heads": _count(text, "num_key_value_heads", default=num_q_heads),
        "head_dim": _count(text, "head_dim", default=hidden_size // max(num_q_heads, 1)),
        "intermediate_size": _count(text, _mlp_key(text, experts)),
        "vocab_size": _count(text, "vocab_size"),
        "num_experts": experts,
        "num_active_experts": _count(text, "num_experts_per_tok") if experts else 0,
        "dtype": _dtype(config, text),
    }
    if kind is CacheKind.DELTA_NET:
        return _hybrid(text, of_any)
    return ModelShape(**of_any, sliding_window=_count(text, "sliding_window") if kind is CacheKind.WINDOW else None)


def _require_unquantised(config: Config, text: Config) -> None:
    if text.get("quantization_config") or config.get("quantization_config"):
        raise ConfigError(
            "not supported: quantization_config; costs are those of unquantised weights: give the config.json of the "
            "model it was made from"
        )


def _mamba2(config: Config, text: Config, *, name: str) -> Mamba2Shape:
    """The shape of a model of which each layer does one thing."""
    if text.get("model_type") not in _SINGLE_TYPES:
        raise ConfigError(
            f"not supported: the model keeps {CacheKind.MAMBA2.value}, and has MLPs in the same layers "
            f"(model_type {text.get('model_type')!r}; {', '.join(_SINGLE_TYPES)} is supported)"
        )
    _require_unquantised(config, text)
    pattern = text.get("hybrid_override_pattern") or "".join(_LETTERS.get(each, each) for each in _layer_types(text))
    if not pattern:
        raise ConfigError("lacks hybrid_override_pattern")
    if "-" in pattern and "E" in pattern:
        raise ConfigError("not supported: some layers are dense and some have experts (hybrid_override_pattern)")
    for key in ("sliding_window", "moe_latent_size"):
        if text.get(key):
            raise ConfigError(f"not supported: {key} is {text[key]!r}")
    experts = _count(text, "n_routed_experts") if "E" in pattern else 0
    num_shared = (text.get("n_shared_experts") or 0) if experts else 0
    num_q_heads, hidden_size = _count(text, "num_attention_heads"), _count(text, "hidden_size")
    return Mamba2Shape(
        name=name,
        num_layers=pattern.count("*"),
        hidden_size=hidden_size,
        num_q_heads=num_q_heads,
        num_kv_heads=_count(text, "num_key_value_heads", default=num_q_heads),
        head_dim=_count(text, "head_dim", default=hidden_size // max(num_q_heads, 1)),
        intermediate_size=_count(text, "moe_intermediate_size" if experts else "intermediate_size"),
        vocab_size=_count(text, "vocab_size"),
        num_experts=experts,
        num_active_experts=_count(text, "num_experts_per_tok") if experts else 0,
        dtype=_dtype(config, text),
        pattern=pattern,
        num_state_heads=_count(text, "mamba_num_heads"),
        state_head_dim=_count(text, "mamba_head_dim"),
        state_dim=_count(text, "ssm_state_size"),
        num_state_groups=_count(text, "n_groups"),
        conv_kernel=_count(text, "conv_kernel"),
        state_dtype=text.get("mamba_ssm_cache_dtype") or "float32",
        shared_intermediate_size=num_shared * _count(text, "moe_shared_expert_intermediate_size") if num_shared else 0,
    )


def _hybrid(text: Config, of_any: Mapping[str, Any]) -> HybridShape:
    state_dtype = text.get("mamba_ssm_dtype") or "float32"
    if state_dtype not in DTYPE_BYTES:
        raise ConfigError(f"mamba_ssm_dtype is {state_dtype!r}, must be one of {', '.join(DTYPE_BYTES)}")
    has_shared = of_any["num_experts"] and text.get("shared_expert_intermediate_size")
    return HybridShape(
        **of_any,
        layers_per_attention=_row_layers(text, of_any["num_layers"]),
        num_state_k_heads=_count(text, "linear_num_key_heads"),
        num_state_v_heads=_count(text, "linear_num_value_heads"),
        state_k_dim=_count(text, "linear_key_head_dim"),
        state_v_dim=_count(text, "linear_value_head_dim"),
        conv_kernel=_count(text, "linear_conv_kernel_dim"),
        state_dtype=state_dtype,
        shared_intermediate_size=_count(text, "shared_expert_intermediate_size") if has_shared else 0,
    )


def _layer_types(text: Config) -> list[str]:
    """Kind of each layer, as listed; empty where the configuration lists none."""
    listed = text.get("layer_types") or text.get("layers_block_type")
    return [str(kind) for kind in listed] if isinstance(listed, list) else []


def _row_layers(text: Config, num_layers: int) -> int:
    """Layers from one attention layer to the next.

    Raises:
        ConfigError: They are not the same all the way up, or the top layer is a recurrent one.
    """
    listed = _layer_types(text)
    if not listed:
        return _count(text, _ROW_KEY, default=_ROW_LAYERS)
    row = next((index + 1 for index, kind in enumerate(listed) if kind in _FULL), 0)
    regular = [_DELTA_NET] * (row - 1) + [listed[row - 1]]
    if len(listed) != num_layers or row < 2 or listed != regular * (num_layers // row):
        raise ConfigError(
            f"not supported: layer_types of {len(listed)} layers for {num_layers}, which are not rows of "
            f"{_DELTA_NET} layers of one length, each with a full_attention layer on top"
        )
    return row


def _experts(text: Config, *, shared: bool) -> int:
    """Experts of every layer; 0 for a dense model. One that every token visits is refused unless ``shared``."""
    key = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), None)
    if key is None:
        return 0
    sparse_step, dense = text.get("decoder_sparse_step"), text.get("mlp_only_layers")
    if sparse_step not in (None, 1) or dense or text.get("first_k_dense_replace"):
        raise ConfigError(
            "not supported: some layers are dense and some have experts (decoder_sparse_step, mlp_only_layers, "
            "first_k_dense_replace)"
        )
    for visited in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        if text.get(visited) and not (shared and visited == "shared_expert_intermediate_size"):
            raise ConfigError(f"not supported: {visited} is {text[visited]!r}, experts that every token visits")
    return _count(text, key)


def _mlp_key(text: Config, experts: int) -> str:
    return "moe_intermediate_size" if experts and text.get("moe_intermediate_size") else "intermediate_size"


def _dtype(config: Config, text: Config) -> str:
    for key in ("dtype", "torch_dtype"):
        value = text.get(key, config.get(key))
        if value is None or value == "auto":
            continue
        name = str(value).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise ConfigError(f"{key} is {value!r}, must be one of {', '.join(DTYPE_BYTES)}")
        return name
    return "bfloat16"


def _count(text: Config, key: str, *, default: int | None = None) -> int:
    value = text.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"lacks {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} is {value!r}, must be a whole number of at least 1")
    return value
