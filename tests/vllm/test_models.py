"""Models of many families in an engine: saved, forgotten, restored both ways at once and by loading alone, bit for bit.

Random weights of a ``config.json`` each; see ``data/models``.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import kv_bytes
from support.v2_runner import WANTED

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK, NUM_CHUNKS = 128, 8
PROMPT, NUM_TOKENS = CHUNK * NUM_CHUNKS + 76, 8


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration of ``data/models`` in an engine."""

    config: str
    dtype: str
    changes: dict = field(default_factory=dict)
    engine: dict = field(default_factory=dict)


# The KV blocks of latent attention hold 16 tokens, not 128.
LATENT = {"num_gpu_blocks_override": 512}
DOCUMENTED = {
    "gpt_oss": Case("gpt_oss", "bfloat16"),
    "gemma3": Case("gemma3", "float32", {"sliding_window": 600}),
    "gemma4_ple_shared": Case("gemma4_ple_shared", "bfloat16"),
    "gemma4_heads": Case("gemma4_heads", "bfloat16"),
    "gemma4_heads_ple_shared": Case("gemma4_heads_ple_shared", "float32"),
    "olmo3": Case("olmo3", "float32"),
    "granite": Case("granite", "bfloat16", engine={"kv_cache_dtype": "fp8"}),
    "cohere2": Case("cohere2", "float32"),
    "llama4": Case("llama4", "bfloat16"),
    "glm4_moe": Case("glm4_moe", "bfloat16"),
    "minimax_m2": Case("minimax_m2", "float32"),
    "deepseek_v3": Case("deepseek_v3", "bfloat16", engine=LATENT),
    "kimi_k2": Case("kimi_k2", "float32", engine=LATENT),
}
SECOND_RUNNER = ("gpt_oss", "gemma4_heads_ple_shared", "olmo3", "granite", "deepseek_v3")
"""Run on vLLM's second-generation runner too, and compiled."""


def others():
    """Every configuration in its other dtype, and some compiled."""
    for name, case in DOCUMENTED.items():
        dtype = "float32" if case.dtype == "bfloat16" else "bfloat16"
        quantised = {"kv_cache_dtype": "fp8_e5m2"} if "kv_cache_dtype" in case.engine and dtype == "bfloat16" else {}
        engine = {key: value for key, value in case.engine.items() if key != "kv_cache_dtype"} | quantised
        yield pytest.param(replace(case, dtype=dtype, engine=engine), id=f"{name}-{dtype}", marks=pytest.mark.long)
    for name in SECOND_RUNNER:
        case = DOCUMENTED[name]
        compiled = replace(case, engine=case.engine | {"enforce_eager": False})
        yield pytest.param(compiled, id=f"{name}-compiled", marks=[pytest.mark.long, pytest.mark.timeout(900)])


def amx():
    """Of latents the attention that vLLM takes on a CPU with AMX, its default there."""
    has_amx = torch.cpu._is_amx_tile_supported()  # noqa: SLF001 -- as vLLM asks
    without = pytest.mark.skipif(not has_amx, reason="this CPU has no AMX")
    yield pytest.param(
        Case("deepseek_v3", "bfloat16", engine={"attention_backend": "AMX_MLA"}), id="amx", marks=without
    )


CASES = [
    *([] if WANTED else amx()),
    *(pytest.param(case, id=name) for name, case in DOCUMENTED.items() if not WANTED or name in SECOND_RUNNER),
    *([] if WANTED else others()),
]


@pytest.fixture(scope="module", params=CASES)
def engine(request, tmp_path_factory, _single_process_vllm):
    from support.connector_engine import hold_to_chunks, serving_engine
    from support.random_weights import model_folder, random_weights

    case = request.param
    folder = model_folder(tmp_path_factory.mktemp("models") / case.config, case.config, **case.changes)
    options = {"self_test": True, "throttle_bytes_per_s": 1e8, "policy": "cake"}
    arguments = {"load_format": "dummy"} | case.engine
    with (
        random_weights(),
        serving_engine(folder, dtype=case.dtype, chunk_tokens=CHUNK, options=options, **arguments) as serving,
    ):
        hold_to_chunks(serving.scheduler, CHUNK)
        yield serving


def prompt(seed):
    from support.connector_engine import random_tokens

    return random_tokens(PROMPT, seed=seed)


def test_both_ways_at_once(engine):
    tokens = prompt(1)
    own = engine.saved(tokens, num_tokens=NUM_TOKENS)
    for ratio in (1.0, 4.0):
        engine.balance_link(PROMPT, ratio=ratio)
        again = engine.ask(tokens, num_tokens=NUM_TOKENS)
        assert again.record["loaded_cells"] > 0
        assert again.record["recomputed_cells"] > 0
        assert np.array_equal(again.kv, own.kv)
        assert again.tokens == own.tokens
        engine.evict()


def test_by_loading_alone(engine):
    tokens = prompt(2)
    own = engine.saved(tokens, num_tokens=NUM_TOKENS)
    again = engine.ask(tokens, num_tokens=NUM_TOKENS, params={"cacheflow": "load"})
    assert again.record["recomputed_cells"] == 0
    num_blocks = NUM_CHUNKS * CHUNK // engine.layout.block_size
    assert again.record["loaded_bytes"] == engine.layout.num_bytes(0, engine.layout.num_layers, num_blocks)
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens


def test_a_little_wrong_kv_shows_in_the_layers_above(engine):
    """Negative control: attention is not so uniform that a little of wrong KV in the first chunk would go unnoticed."""
    tokens = prompt(3)
    own = engine.saved(tokens, num_tokens=NUM_TOKENS)
    random = np.random.default_rng(5)
    name = engine.submit(tokens, num_tokens=NUM_TOKENS, params={"cacheflow": "off"})
    engine.step()
    first = engine.block_ids(name)[0]
    wrong = engine.gather([first])
    wrong ^= np.where(random.random(wrong.shape) < 0.05, 0x10, 0).astype(np.uint8)
    kv_bytes.scatter(engine.layout, wrong, [first], layers=(0, engine.layout.num_layers))
    engine.run()
    kv = engine.answers[name].kv
    after = CHUNK // engine.layout.block_size  # the first block of the next chunk: farther ones may be out of a window
    assert (kv[1:, after] != own.kv[1:, after]).mean() > 0.1


def test_layers_of_other_heads_have_bytes_and_costs_of_their_own(engine):
    """What a layer keeps of a token and what kind it is go together; by it cells are planned and measured."""
    facts, layout = engine.worker.facts, engine.layout
    bytes_L = [each // layout.block_size for each in layout.block_bytes_L]
    assert list(facts.shape.kv_bytes_per_token_L) == bytes_L
    assert isinstance(facts.shape.kv_token_bytes, tuple) == (len(set(bytes_L)) > 1)
    if Path(engine.engine.vllm_config.model_config.model).name == "gemma4_heads":
        narrow = bytes_L[2]
        assert bytes_L == [2 * narrow, 2 * narrow, narrow] * 2
    kinds = dict.fromkeys(zip(facts.costs.layer_kinds, bytes_L, strict=True))
    assert len(kinds) == len(facts.costs.kinds)


def test_the_documented_models_are_these():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| \w+ \| (bf16|fp32) \|", text, flags=re.MULTILINE)
    short = {"bfloat16": "bf16", "float32": "fp32"}
    assert documented == [(name, short[case.dtype]) for name, case in DOCUMENTED.items()]
