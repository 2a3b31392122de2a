"""Files of GPUs and models that hold what JSON allows and no GPU or model has."""

from __future__ import annotations

import json

import pytest

from cacheflow.errors import ConfigError
from cacheflow.shapes.hardware import find_gpu, find_model

GPU = {"name": "X", "memory_bytes": 80e9, "memory_bytes_per_s": 3e12, "dense_flops_per_s": 9e14,
       "pcie_bytes_per_s": 64e9}  # fmt: skip
MODEL = {"name": "m", "num_layers": 4, "hidden_size": 256, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64,
         "intermediate_size": 512, "vocab_size": 1000}  # fmt: skip
KINDS = {"gpu": (GPU, find_gpu), "model": (MODEL, find_model)}
DIGITS = "9" * 400


@pytest.fixture
def refusal(tmp_path):
    """What is said about a file of these bytes; every complaint names the file."""

    def of(kind, raw):
        path = tmp_path / f"{kind}.json"
        path.write_bytes(raw)
        with pytest.raises(ConfigError) as raised:
            KINDS[kind][1](str(path))
        assert f"{kind} file {path}" in str(raised.value)
        return str(raised.value)

    return of


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", DIGITS, f"-{DIGITS}", "1e400", "true", '"x"', "[]"])
@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, (base, _) in KINDS.items() for field in base if field != "name"]
)
def test_a_number_that_is_none_or_no_machine_has(refusal, kind, field, value):
    text = json.dumps(KINDS[kind][0] | {field: "@"}).replace('"@"', value)
    said = refusal(kind, text.encode())
    assert field in said or "wrong type" in said
    assert len(said) < 600


@pytest.mark.parametrize("value", ["null", "Infinity", "[]", "5", '""', '" "'])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_none(refusal, kind, value):
    text = json.dumps(KINDS[kind][0] | {"name": "@"}).replace('"@"', value)
    assert "name is" in refusal(kind, text.encode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "thousands of digits"),
        (b"[]", "must be one JSON object"),
        (b'"x"', "must be one JSON object"),
        (b"null", "must be one JSON object"),
        ('{"é": 1}'.encode("utf-16"), "not UTF-8"),
        (b"{}", "lacks name"),
        (b" " * (1 << 24) + b"  ", "larger than 16,777,216 bytes"),
    ],
    ids=["empty", "deep", "digits", "list", "text", "null", "utf-16", "no field", "huge"],
)
def test_a_file_that_is_no_object(refusal, kind, raw, reason):
    assert reason in refusal(kind, raw)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_or_nothing_in_place_of_a_file(tmp_path, kind):
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for path, reason in ((folder, "Is a directory"), (tmp_path / "none.json", "No such file")):
        with pytest.raises(ConfigError, match=f"{kind} file {path} cannot be read: {reason}"):
            KINDS[kind][1](str(path))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_bytes(json.dumps(GPU).encode("utf-8-sig"))
    assert find_gpu(str(path)).dense_flops_per_s == 9e14


HF = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256,
      "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000}  # fmt: skip


def test_a_hugging_face_configuration_is_a_model_alone_or_in_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF))
    assert find_model(str(folder)) == find_model(str(folder / "config.json")) == find_model(str(folder) + "/")
    assert find_model(str(folder)).name == "tiny"
    assert find_model(str(folder)).head_dim == 64
    monkeypatch.chdir(folder)
    assert find_model("config.json").name == "tiny"
    (tmp_path / "copied.json").write_text(json.dumps(HF))
    assert find_model(str(tmp_path / "copied.json")).name == "copied"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "not supported: the model keeps a compressed latent"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000"),
        ({"num_key_value_heads": 3}, "num_q_heads 4 is no multiple"),
    ],
)
def test_a_hugging_face_configuration_that_is_none_of_ours_is_refused_by_file_and_key(refusal, changes, reason):
    assert reason in refusal("model", json.dumps(HF | changes).encode())


def test_a_folder_without_a_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json cannot be read: No such file"):
        find_model(str(tmp_path))
