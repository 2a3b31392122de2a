import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cacheflow.errors import ConfigError
from cacheflow.shapes.hardware import GPUS, MODEL_SHAPES, UNSUPPORTED_MODELS, find_gpu, find_model


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("Llama-3.1-8B", 131_072),
        ("Llama-3.1-70B", 327_680),
        ("Qwen3-8B", 147_456),
        ("Qwen3-32B", 262_144),
        ("Qwen3-30B-A3B", 98_304),
    ],
)
def test_kv_bytes_per_token_are_the_published_ones(name: str, kv_bytes: int):
    assert MODEL_SHAPES[name].kv_bytes_per_token == kv_bytes


def test_names_are_found_whatever_their_case():
    assert find_model("llama-3.1-8b") is MODEL_SHAPES["Llama-3.1-8B"]
    assert find_gpu("h100") is GPUS["H100"]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown model 'GPT-2'; known: Llama-3.1-8B, .*Qwen3-30B-A3B"):
        find_model("GPT-2")
    with pytest.raises(ConfigError, match=r"unknown gpu 'TPU'; known: L40S, A100, H100, H200, B200"):
        find_gpu("TPU")


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_MODELS))
def test_models_without_plain_keys_and_values_are_refused_with_the_reason(name: str):
    with pytest.raises(ConfigError, match="not supported yet: "):
        find_model(name.upper())


def test_user_files_are_read(tmp_path: Path):
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(asdict(MODEL_SHAPES["Qwen3-8B"]) | {"name": "mine", "num_layers": 4}))
    assert find_model(str(shape)).num_layers == 4
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps(asdict(GPUS["L40S"]) | {"name": "mine"}))
    assert find_gpu(str(gpu)).name == "mine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("{", "cannot be read", id="not JSON"),
        pytest.param("[]", "must be one JSON object with the fields name, memory_bytes", id="list"),
        pytest.param('{"name": "x", "speed": 1}', "must be one JSON object with the fields", id="unknown field"),
        pytest.param('{"name": "x"}', "lacks memory_bytes, memory_bytes_per_s", id="fields missing"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        find_gpu(str(path))


def test_values_of_the_wrong_type_or_range_are_errors_of_ours(tmp_path: Path):
    path = tmp_path / "gpu.json"
    for value in ("fast", 0):
        path.write_text(json.dumps(asdict(GPUS["L40S"]) | {"memory_bytes_per_s": value}))
        with pytest.raises(ConfigError, match=r"must be a number|must be above 0"):
            find_gpu(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_gpu(str(tmp_path / "none.json"))
