"""Chunked prefill is the model's own forward, for every family; what is not on the list is refused."""

import pytest
import torch
from transformers import AutoConfig

from cacheflow.engine.families import FAMILIES, check_supported, parse_dtype, shape_of
from cacheflow.engine.random_models import random_weights, tiny_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.selftest import own_forward, relative_error, self_test, tolerance_for
from cacheflow.errors import ConfigError, PromptError, SelfTestError, UnsupportedModelError
from cacheflow.model_shape import ModelShape
from support.engine_cases import WINDOWED, prefilled

pytestmark = pytest.mark.torch

CASES = [(family, False) for family in FAMILIES] + [(family, True) for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "windowed"), CASES)
def test_chunked_prefill_agrees_with_the_models_own_forward(family, windowed, dtype, attention):
    case = prefilled(family, dtype, windowed=windowed)
    own = own_forward(case.runner.model, case.tokens, attention=attention)
    tolerance = tolerance_for(case.runner.model)
    n = len(case.tokens)
    assert relative_error(case.logits, own.logits[0, -1]) < tolerance
    for layer, entry in enumerate(own.past_key_values.layers):
        for index, reference in enumerate((entry.keys, entry.values)):
            assert relative_error(case.saved.kv_L2THD[layer, index, :n].transpose(0, 1), reference[0]) < tolerance


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_ignoring_the_window_would_show(family):
    """Negative control: the same weights with full attention give other logits."""
    with_window = prefilled(family, "float32", windowed=True)
    without = prefilled(family, "float32")
    assert with_window.runner.model.shape.sliding_window == WINDOWED["sliding_window"]
    assert relative_error(with_window.logits, without.logits) > 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_the_tiny_models_is_not_uniform(family, dtype):
    """Negative control: another early token changes the last logits by more than the tolerance hides."""
    case = prefilled(family, dtype)
    changed = [(case.tokens[0] + 1) % 320, *case.tokens[1:]]
    kv = case.runner.new_kv(len(changed))
    logits = case.runner.prefill(changed, (*case.grid.chunk_ends, *case.grid.suffix_ends), kv)
    assert relative_error(logits, case.logits) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_self_test_passes(family):
    report = self_test(tiny_model(family))
    assert report.passed
    assert report.kv_error < 1e-5


def test_self_test_passes_on_a_model_shorter_than_its_prompt():
    assert self_test(tiny_model("llama", max_position_embeddings=60)).passed


def test_self_test_refuses_a_forward_the_runner_does_not_follow():
    """Like a family that scales embeddings in its own forward: only the comparison can notice."""
    model = tiny_model("llama")
    body, own_forward_of_body = model.module.model, model.module.model.forward
    body.forward = lambda *args, **kwargs: own_forward_of_body(
        inputs_embeds=2.0 * body.embed_tokens(args[0] if args else kwargs.pop("input_ids")),
        **{key: value for key, value in kwargs.items() if key not in ("input_ids", "inputs_embeds")},
    )
    with pytest.raises(SelfTestError, match="staircase bit-equal True"):
        self_test(model)


def test_other_families_are_refused_with_the_list():
    with pytest.raises(UnsupportedModelError, match=r"model_type gemma2 .* llama, mistral, qwen2, qwen3, qwen3_moe"):
        check_supported(AutoConfig.for_model("gemma2"), device="cpu", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="phi"):
        tiny_model("phi")


def test_rope_that_depends_on_the_length_is_refused():
    config = AutoConfig.for_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="rope_type dynamic"):
        check_supported(config, device="cpu", dtype=torch.float32)


def test_dtypes_and_devices_are_checked():
    config = AutoConfig.for_model("llama")
    with pytest.raises(UnsupportedModelError, match="dtype float16"):
        check_supported(config, device="cpu", dtype=torch.float16)
    with pytest.raises(UnsupportedModelError, match="device meta"):
        check_supported(config, device="meta", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="int8"):
        parse_dtype("int8")


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_scaled_rope_comes_from_the_model(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert self_test(tiny_model("llama", rope_parameters=rope)).passed


def test_prompts_are_checked():
    runner = LayerRunner(tiny_model("llama", max_position_embeddings=8))
    kv = runner.new_kv(8)
    for tokens, ends in (([], ()), ([1] * 9, (9,))):
        with pytest.raises((PromptError, ConfigError)):
            runner.prefill(tokens, ends, kv)
    for tokens in ([320], [-1]):
        with pytest.raises(PromptError, match="vocabulary"):
            runner.prefill(tokens, (1,), kv)
    with pytest.raises(ConfigError, match="chunks end at 3"):
        runner.prefill([1, 2], (3,), kv)
    with pytest.raises(PromptError, match="position 8"):
        runner.decode_step(1, 8, kv)


def test_random_weights_have_the_asked_shape():
    shape = ModelShape(
        name="Qwen3-x", num_layers=2, hidden_size=32, num_q_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
        vocab_size=100, dtype="float32",
    )  # fmt: skip
    model = random_weights(shape, device="cpu", dtype="float32", max_tokens=64)
    assert model.shape == shape
    assert model.module.config.model_type == "qwen3"
    assert shape_of(model.module.config, name="Qwen3-x", dtype=torch.float32) == shape
    kv = LayerRunner(model).new_kv(10)
    assert LayerRunner(model).prefill(list(range(10)), (4, 10), kv).isfinite().all()
