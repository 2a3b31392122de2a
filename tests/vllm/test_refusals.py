"""Everything that cannot be reproduced is refused, with the reason; needs vLLM for its KV cache specs, no engine."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.vllm


def specs(kind="FullAttentionSpec", groups=1, **arguments):
    import torch
    from vllm.v1 import kv_cache_interface

    spec = getattr(kv_cache_interface, kind)(
        block_size=128, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, **arguments
    )
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups)


def config(**changes):
    """A plain engine; ``a__b=value`` changes one of its attributes."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(is_encoder_decoder=False, is_multimodal_model=False, uses_mrope=False),
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False, kv_sharing_fast_prefill=False),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, data_parallel_size=1, is_moe_model=False,
            enable_eplb=False, use_ubatching=False, pipeline_parallel_size=1,
        ),
        speculative_config=None,
        lora_config=None,
    )  # fmt: skip
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner = made
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return made


def test_a_plain_engine_is_accepted():
    from cacheflow.vllm.models.refusals import configured_refusals, load_refusals

    assert load_refusals(config(), specs()) == []
    assert list(configured_refusals(config())) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"cache_config__calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"parallel_config__prefill_context_parallel_size": 4}, "prefill_context_parallel_size is 4"),
    ],
)
def test_what_cannot_even_be_loaded(changes, reason):
    from cacheflow.vllm.models.refusals import load_refusals

    (found,) = load_refusals(config(**changes), specs())
    assert reason in found


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_drafts_from_the_tokens_alone_are_welcome(method):
    from cacheflow.vllm.models.refusals import configured_refusals, load_refusals

    drafting = config(speculative_config=SimpleNamespace(method=method))
    assert load_refusals(drafting, specs()) == []
    assert list(configured_refusals(drafting)) == []


@pytest.mark.parametrize("method", ["draft_model", "dflash", "dspark", "medusa", "ngram_gpu", "custom_class"])
def test_drafters_that_were_never_tried_are_refused_by_name(method):
    from cacheflow.vllm.models.refusals import load_refusals

    (found,) = load_refusals(config(speculative_config=SimpleNamespace(method=method)), specs())
    assert f"drafts by {method!r}" in found
    assert "never tried" in found
    assert "ngram, suffix, eagle, eagle3 and mtp work" in found


@pytest.mark.parametrize(
    ("caches", "reason"),
    [
        ({"groups": 2}, "2 groups"),
        ({"kind": "SlidingWindowSpec", "sliding_window": 64}, "SlidingWindowSpec"),
        ({"kind": "SlidingWindowMLASpec", "sliding_window": 64}, "SlidingWindowMLASpec"),
    ],
)
def test_kv_caches_of_other_kinds(caches, reason):
    from cacheflow.vllm.models.refusals import load_refusals

    assert any(reason in each for each in load_refusals(config(), specs(**caches)))


def several(kinds):
    """One group of layers of so many heads each, as vLLM makes it where the hybrid KV cache manager is off."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    made = {f"layer.{index}": specs(*each).kv_cache_groups[0].kv_cache_spec for index, each in enumerate(kinds)}
    spec = UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs=made)
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])


def test_layers_of_one_group_are_looked_at_one_by_one():
    from cacheflow.vllm.models.refusals import load_refusals

    assert load_refusals(config(), several([("FullAttentionSpec",), ("MLAAttentionSpec",)])) == []
    (found,) = load_refusals(config(), several([("FullAttentionSpec",), ("HiddenStateCacheSpec",)]))
    assert "its KV cache is of kind HiddenStateCacheSpec" in found


def hybrid(kind, *, mode="align"):
    """A group of running states of this kind, and one of keys and values."""
    import torch
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.kv_cache_interface import MambaSpec

    states = MambaSpec(
        block_size=128, shapes=((3, 8), (2, 4, 4)), dtypes=(torch.bfloat16, torch.float32), mamba_cache_mode=mode,
        mamba_type=MambaAttentionBackendEnum[kind],
    )  # fmt: skip
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=states), *specs().kv_cache_groups])


@pytest.mark.parametrize("kind", ["GDN_ATTN", "MAMBA2"])
def test_states_of_these_kinds_are_welcome_where_they_are_kept_at_blocks_ends(kind):
    from cacheflow.vllm.models.refusals import load_refusals

    assert load_refusals(config(), hybrid(kind)) == []
    (found,) = load_refusals(config(), hybrid(kind, mode="none"))
    assert "leave vLLM's prefix caching on" in found


@pytest.mark.parametrize("kind", ["MAMBA1", "SHORT_CONV", "LINEAR"])
def test_states_of_other_kinds_are_refused_by_name(kind):
    from cacheflow.vllm.models.refusals import load_refusals

    (found,) = load_refusals(config(), hybrid(kind))
    assert f"(of kind {kind}); of those GDN_ATTN and MAMBA2 are supported" in found


@pytest.mark.parametrize(
    "architecture",
    ["KimiLinearForCausalLM", "KimiK3ForConditionalGeneration", "BailingMoeV3ForCausalLM", "Glm5NextForCausalLM"],
)
def test_kimi_delta_attention_is_told_from_gated_delta_nets(architecture):
    """VLLM gives the states of both one name."""
    from cacheflow.vllm.models.refusals import load_refusals

    (found,) = load_refusals(config(model_config__architecture=architecture), hybrid("GDN_ATTN"))
    assert "Kimi Delta Attention (KDA)" in found
    assert "GPUs alone, where restoring them was never tried" in found
    assert load_refusals(config(model_config__architecture="Qwen3NextForCausalLM"), hybrid("GDN_ATTN")) == []


def test_a_latent_of_every_token_and_quantised_keys_are_welcome():
    from cacheflow.vllm.models.refusals import configured_refusals, load_refusals

    assert load_refusals(config(), specs("MLAAttentionSpec")) == []
    assert list(configured_refusals(config(cache_config__cache_dtype="fp8"))) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_config__enable_eplb": True}, "expert load balancing"),
        ({"parallel_config__use_ubatching": True}, "dual-batch"),
        ({"parallel_config__data_parallel_size": 2, "parallel_config__is_moe_model": True}, "data parallelism"),
    ],
)
def test_engines_that_only_load(changes, reason):
    from cacheflow.vllm.models.refusals import configured_refusals, load_refusals

    assert load_refusals(config(**changes), specs()) == []
    (found,) = configured_refusals(config(**changes))
    assert reason in found


def test_dense_replicas_and_pipeline_stages_may_recompute():
    from cacheflow.vllm.models.refusals import configured_refusals

    assert list(configured_refusals(config(parallel_config__pipeline_parallel_size=2))) == []
    assert list(configured_refusals(config(parallel_config__data_parallel_size=2))) == []


def test_the_user_is_told_all_reasons_and_the_way_out():
    from cacheflow.errors import UnsupportedModelError
    from cacheflow.vllm.models.refusals import load_refusals, require_loadable

    bad = config(model_config__is_encoder_decoder=True, speculative_config=SimpleNamespace(method="medusa"))
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder.*; speculative"):
        require_loadable(load_refusals(bad, specs()))


def test_a_vllm_that_lacks_something_is_named():
    from cacheflow.errors import ConfigError
    from cacheflow.vllm.compat import require_runner, runner_kind

    with pytest.raises(ConfigError, match="SimpleNamespace lacks attn_groups, device"):
        require_runner(SimpleNamespace(model=None))
    with pytest.raises(ConfigError, match="no model runner CacheFlow knows"):
        runner_kind(object())
