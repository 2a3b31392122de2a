"""Shapes from Hugging Face's ``config.json``, of families as their authors publish them (abridged)."""

import pytest

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.shapes.hf_config import CacheKind, cache_kind, is_hf_config, shape_of, text_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "mlp_only_layers": [],
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 48, "vocab_size": 151936, "dtype": "float16",
}  # fmt: skip

QWEN2 = {"model_type": "qwen2", "sliding_window": 4096}
SPARSE = {"num_experts": 8, "num_experts_per_tok": 2}


def test_a_dense_model_with_defaults():
    assert shape_of(LLAMA, name="x") == ModelShape(
        name="x", num_layers=32, hidden_size=4096, num_q_heads=32, num_kv_heads=8, head_dim=128,
        intermediate_size=14336, vocab_size=128256, dtype="bfloat16",
    )  # fmt: skip
    old = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "torch_dtype")}
    assert shape_of(old, name="x").num_kv_heads == 32
    assert shape_of(old | {"head_dim": None}, name="x").dtype == "bfloat16"
    assert shape_of(LLAMA | {"head_dim": 64}, name="x").head_dim == 64
    assert shape_of(LLAMA | {"torch_dtype": "torch.float32"}, name="x").dtype == "float32"


def test_experts_count_the_width_of_one():
    shape = shape_of(QWEN3_MOE, name="x")
    assert (shape.num_experts, shape.num_active_experts, shape.intermediate_size) == (128, 8, 768)
    assert shape.dtype == "float16"
    assert shape.head_dim == 128
    mixtral = LLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert shape_of(mixtral, name="x").intermediate_size == 14336


def test_the_language_model_may_be_nested():
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": LLAMA, "torch_dtype": "float16"}
    assert shape_of(whole, name="x") == shape_of(LLAMA, name="x")
    assert text_config(whole) is LLAMA


def test_a_window_in_every_layer_is_part_of_the_shape():
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
    assert shape_of(mistral, name="x").sliding_window == 4096
    assert (
        shape_of(LLAMA | {"layer_types": ["full_attention"] * 32, "sliding_window": 4096}, name="x").sliding_window
        is None
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, CacheKind.FULL),
        ({"layer_types": ["full_attention"]}, CacheKind.FULL),
        ({"sliding_window": None}, CacheKind.FULL),
        (QWEN2 | {"use_sliding_window": False}, CacheKind.FULL),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 28}, CacheKind.MIXED),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 32}, CacheKind.FULL),
        ({"model_type": "mistral", "sliding_window": 4096}, CacheKind.WINDOW),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, CacheKind.WINDOW),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, CacheKind.MIXED),
        ({"model_type": "gemma2", "sliding_window": 4096}, CacheKind.MIXED),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6}, CacheKind.MIXED),
        ({"kv_lora_rank": 512}, CacheKind.LATENT),
        ({"layer_types": ["linear_attention", "full_attention"]}, CacheKind.RECURRENT),
        ({"mamba_d_state": 16}, CacheKind.RECURRENT),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"}, CacheKind.MAMBA2),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"]}, CacheKind.MAMBA2),
        ({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "full_attention"]}, CacheKind.MAMBA2),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-"}, CacheKind.RECURRENT),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, CacheKind.MAMBA2),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}, CacheKind.FULL),
        ({"model_type": "falcon_h1", "mamba_d_state": 16}, CacheKind.MAMBA2),
        ({"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]}, CacheKind.MAMBA2),
        ({"model_type": "kimi_linear", "linear_attn_config": {"kda_layers": [1]}, "kv_lora_rank": 512},
         CacheKind.KIMI_DELTA),
    ],
    ids=str,
)  # fmt: skip
def test_what_layers_keep(changes, kind):
    assert cache_kind(LLAMA | changes) is kind


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "compressed latent"),
        ({"mamba_d_state": 16}, "recurrent state"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding window of tokens in some layers"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is true"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (SPARSE | {"decoder_sparse_step": 2}, "some layers are dense"),
        (SPARSE | {"mlp_only_layers": [0]}, "some layers are dense"),
        (SPARSE | {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate"),
        ({"num_experts": 8}, "lacks num_experts_per_tok"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn', must be one of float32"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_shape_cannot_say_is_refused_by_its_key(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        shape_of(LLAMA | changes, name="x")


def test_a_shape_file_is_none():
    assert is_hf_config(LLAMA)
    assert not is_hf_config({"name": "m", "num_layers": 4})
    assert not is_hf_config([])
