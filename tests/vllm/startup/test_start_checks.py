"""What ``cacheflow serve`` refuses before vLLM starts, and what it leaves to vLLM. Needs no vLLM: it is faked."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cacheflow.errors import ConfigError
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.startup.installed import InstalledVllm
from cacheflow.vllm.startup.server_flags import ServerFlags
from cacheflow.vllm.startup.start_checks import check_start

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 4096,
}  # fmt: skip
FILE = ConnectorOptions(store="file", store_path="/kv", unsupported_models="refuse")
LOAD_ONLY = ConnectorOptions(store="file", store_path="/kv", unsupported_models="load_only")


@pytest.fixture
def vllm() -> InstalledVllm:
    return InstalledVllm(version="0.32.0", on_cpu=False)


@pytest.fixture
def model(tmp_path):
    """Writes a model folder: ``model(architectures=[...])``."""

    def write(**changes) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA | changes))
        return str(folder)

    return write


def refused(model, options, words, installed, environment=None) -> str:
    with pytest.raises(ConfigError) as raised:
        check_start(model, options, ServerFlags(words), installed=installed, environment=environment or {})
    return str(raised.value)


def passes(model, options, words, installed, environment=None) -> None:
    check_start(model, options, ServerFlags(words), installed=installed, environment=environment or {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "a recurrent state in some layers"),
        ({"model_type": "jamba", "mamba_d_state": 16}, "Gated DeltaNet and Mamba-2 are restored: serve it without"),
        ({"model_type": "mistral", "sliding_window": 512}, "--disable-sliding-window"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 512},
            "a sliding window of tokens in every layer",
        ),
        (
            {"model_type": "kimi_linear", "linear_attn_config": {"kda_layers": [1]}, "kv_lora_rank": 512},
            "the state of Kimi Delta Attention (KDA) in some layers; vLLM has its kernels for GPUs alone",
        ),
    ],
)
def test_a_model_that_is_not_even_loaded(model, vllm, changes, said):
    path = model(**changes)
    for options in (FILE, LOAD_ONLY):
        message = refused(path, options, [], vllm)
        assert said in message
        assert "load_only" not in message  # it would not help


@pytest.mark.parametrize("words", [["--block-size", "1088"], ["--max-model-len", "512"]], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3_next", "granitemoehybrid"])
def test_a_hybrid_s_chunk_is_a_block_unless_another_size_is_given(model, vllm, words, model_type):
    kinds = {"qwen3_next": ["linear_attention", "full_attention"], "granitemoehybrid": ["mamba", "attention"]}
    path = model(model_type=model_type, layer_types=kinds[model_type])
    passes(path, FILE, words, vllm)
    assert "chunk_tokens is 1024" in refused(path, replace(FILE, chunk_tokens=1024), words, vllm)
    too_long = ["--block-size", "1088", "--max-model-len", "1088"]
    assert "chunk_tokens is 1088, must be below vLLM's max_model_len of 1088" in refused(path, FILE, too_long, vllm)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--no-enable-prefix-caching"], "leave vLLM's prefix caching on (--enable-prefix-caching)"),
        (["--enable-prefix-caching", "--no-enable-prefix-caching"], "kept in mode 'none'"),
        (["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}'], "serve it without drafts"),
        (["-sc", '{"model": "d"}'], "serve it without drafts"),
    ],
    ids=str,
)
def test_a_hybrid_that_drafts_or_runs_without_prefix_caching(model, vllm, words, said):
    path = model(model_type="qwen3_next", layer_types=["linear_attention", "full_attention"])
    for options in (FILE, LOAD_ONLY):
        assert said in refused(path, options, words, vllm)
    passes(path, FILE, ["--no-enable-prefix-caching", "--enable-prefix-caching"], vllm)
    passes(model(), FILE, words, vllm)


@pytest.mark.parametrize(
    ("words", "said", "load_only_helps"),
    [
        (["--enable-eplb"], "expert load balancing", True),
        (["--enable-dbo"], "dual-batch overlap", True),
        (["--runner", "pooling"], "there is nothing to restore", False),
        (["--convert", "embed"], "there is nothing to restore", False),
        (["--convert=classify"], "there is nothing to restore", False),
        (["-dcp", "2"], "decode_context_parallel_size is 2", False),
        (["--prefill-context-parallel-size=4"], "prefill_context_parallel_size is 4", False),
        (["--calculate-kv-scales"], "calculate_kv_scales is on", False),
        (["--kv-sharing-fast-prefill"], "kv_sharing_fast_prefill is on", False),
        (["--max-model-len", "512"], "must be below vLLM's max_model_len of 512", False),
        (["--max-model-len", "0.5k"], "must be below vLLM's max_model_len of 500", False),
        (["--speculative-config", '{"method": "dflash", "model": "d"}'], "drafts by 'dflash'", False),
        (["-sc", '{"method": "medusa", "num_speculative_tokens": 2}'], "drafts by 'medusa'", False),
        (["--block-size", "48"], "must be a multiple of vLLM's KV block size of 48", False),
    ],
    ids=str,
)
def test_an_engine_that_would_be_refused(vllm, words, said, load_only_helps):
    message = refused("some/model", FILE, words, vllm)
    assert said in message
    assert ("load_only" in message) == load_only_helps
    if load_only_helps:
        passes("some/model", LOAD_ONLY, words, vllm)
    else:
        assert said in refused("some/model", LOAD_ONLY, words, vllm)


def test_drafting_is_asked_of_the_same_function_as_in_the_engine(vllm, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "cacheflow.vllm.startup.start_checks.engine_refusals", lambda view: seen.append(view) or ["no drafts"]
    )
    assert "no drafts" in refused("m/n", FILE, ["--speculative-config", '{"method": "eagle", "model": "d"}'], vllm)
    assert seen[0].speculative_config.method == "eagle"
    assert seen[0].speculative_config.num_speculative_tokens is None
    refused("m/n", FILE, ["--speculative-config.method", "ngram"], vllm)
    assert seen[1].speculative_config.method == "ngram"
    for words in ([], ["--speculative-config", '{"model": "d"}'], ["-sc", "{no json"]):
        refused("m/n", FILE, words, vllm)
        assert seen[-1].speculative_config is None, words  # vLLM works the method out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--kv-cache-dtype", "auto"],
        ["--kv-cache-dtype", "bfloat16"],
        ["--enable-lora", "--no-enable-lora"],
        ["-dcp", "1"],
        ["--max-model-len", "auto"],
        ["--max-model-len", "16k"],
        ["--max-model-len", "512", "--max-model-len", "1024"],
        ["--runner", "generate", "--convert", "none"],
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
        ["--speculative-config.method", "suffix"],
        ["--speculative-config", '{"model": "d"}'],
        ["--block-size", "128"],
        ["--served-model-name", "--enable-eplb-model"],
        ["--some-new-option", "pooling"],
    ],
    ids=str,
)
def test_what_is_fine_or_not_known_is_left_to_vllm(model, vllm, words):
    passes(model(), FILE, words, vllm)
    passes("some/model-not-here", FILE, words, vllm)


def test_nothing_is_said_where_the_configuration_may_not_be_what_runs(model, vllm, tmp_path):
    path = model(is_encoder_decoder=True)
    passes(path, FILE, ["--hf-overrides", "{}"], vllm)
    passes(model(model_type="minicpm3", kv_lora_rank=256), FILE, [], vllm)
    passes(model(model_type="deepseek_v3", kv_lora_rank=256), FILE, [], vllm, {"VLLM_MLA_DISABLE": "1"})
    passes(model(model_type="mistral", sliding_window=2048), FILE, ["--disable-sliding-window"], vllm)


@pytest.mark.parametrize("text", ["{not json", "[]", None])
def test_a_folder_without_a_model_is_refused_at_the_door(vllm, tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    message = refused(str(tmp_path), FILE, [], vllm)
    assert str(tmp_path) in message
    assert ("holds no model: it has no config.json" if text is None else "cannot be used") in message
    passes(str(tmp_path), FILE, ["--load-format", "gguf"], vllm)
    (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "params.json").write_text("{}")
    passes(str(tmp_path), FILE, [], vllm)


def test_the_models_longest_prompt_bounds_the_chunk(model, vllm):
    assert "max_model_len of 256" in refused(model(max_position_embeddings=256), FILE, [], vllm)
    stretched = {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "max_position_embeddings": 256}
    passes(model(**stretched), FILE, [], vllm)
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 256}
    assert "max_model_len of 256" in refused(model(**plain), FILE, [], vllm)


def test_a_model_in_hugging_faces_cache_is_read(tmp_path, vllm):
    repository = tmp_path / "hub" / "models--org--bloom"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots" / "abc123").mkdir(parents=True)
    config = json.dumps(LLAMA | {"is_encoder_decoder": True})
    (repository / "snapshots" / "abc123" / "config.json").write_text(config)
    for environment in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        assert "encoder-decoder" in refused("org/bloom", FILE, [], vllm, environment)
        assert "encoder-decoder" in refused("org/bloom", FILE, ["--revision", "abc123"], vllm, environment)
        passes("org/bloom", FILE, ["--revision", "other"], vllm, environment)
        passes("org/other", FILE, [], vllm, environment)


@pytest.mark.parametrize(
    "words", [["-tp", "2"], ["--pipeline-parallel-size=2"], ["--distributed-executor-backend", "ray"]]
)
def test_a_store_in_memory_and_workers_elsewhere(vllm, words):
    assert "store is 'memory', but vLLM's executor" in refused("m/n", ConnectorOptions(), words, vllm)
    passes("m/n", FILE, words, vllm)
    passes("m/n", ConnectorOptions(), [], vllm)


def test_it_costs_no_import_of_vllm_or_torch():
    code = (
        "import sys; from cacheflow.vllm import serve; from cacheflow.vllm.startup import start_checks; "
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"
