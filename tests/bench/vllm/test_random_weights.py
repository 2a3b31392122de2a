"""Weights that servers draw: attention far from uniform, and the same every time."""

import json

import pytest

torch = pytest.importorskip("torch")

from cacheflow.bench.vllm.costs import PrefixSize  # noqa: E402
from cacheflow.bench.vllm.random_weights import QKV_GAIN, draw_weights  # noqa: E402
from cacheflow.bench.vllm.study import tokens_needed  # noqa: E402
from cacheflow.bench.vllm.workload import open_shape, prompt_tokens, read_model  # noqa: E402
from cacheflow.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.torch


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Named as vLLM names its layers; as good as zero, as its dummy weights are."""
    layers = {
        "embed_tokens": torch.nn.Embedding(500, 64), "qkv_proj": torch.nn.Linear(64, 256),
        "down_proj": torch.nn.Linear(256, 64, bias=False), "input_layernorm": torch.nn.LayerNorm(64, bias=False),
    }  # fmt: skip
    made = torch.nn.ModuleDict(layers).to(dtype)
    for weight in made.parameters():
        weight.data.fill_(1e-3)
    return made


def test_every_weight_is_drawn_for_what_it_does():
    drawn = model()
    draw_weights(drawn)
    weights = dict(drawn.named_parameters())
    assert float(weights["input_layernorm.weight"].detach().mean()) == pytest.approx(1.0, abs=0.1)
    assert float(weights["embed_tokens.weight"].detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(weights["qkv_proj.weight"].detach().std()) == pytest.approx(QKV_GAIN / 8, rel=0.05)
    assert float(weights["down_proj.weight"].detach().std()) == pytest.approx(1 / 16, rel=0.05)


def test_scores_of_attention_spread_by_units():
    drawn = model()
    draw_weights(drawn)
    hidden = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    query, key = drawn["qkv_proj"](hidden)[:, :128].split(64, dim=1)
    scores = (query @ key.T).detach() / 8
    assert float(scores.std()) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_servers_draw_the_same(dtype: torch.dtype):
    one, other = model(dtype), model(dtype)
    draw_weights(one)
    draw_weights(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_known_shape_is_a_folder_that_vllm_reads_and_is_asked_by_token(tmp_path):
    model = open_shape("Llama-3.1-8B", tmp_path)
    assert not model.has_weights
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert read_model(tmp_path, model.shape.name).shape == model.shape
    needed = tokens_needed(PrefixSize(num_tokens=32_768, suffix_tokens=512, chunk_tokens=1024), 3)
    tokens = prompt_tokens(model, needed)
    assert len(tokens) == needed
    assert max(tokens) < model.shape.vocab_size


def test_a_shape_with_recurrent_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--shape Qwen3\.5-9B has recurrent layers"):
        open_shape("Qwen3.5-9B", tmp_path)
