"""The self-test at start on families that are not in ``test_models.py``: configurations of transformers, made tiny."""

import json
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long]

SMALL = {
    "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "sliding_window": 100,
}  # fmt: skip
NO_WINDOW = {"sliding_window": None}
"""Of models that would have a window in every layer, of which vLLM then keeps nothing else."""
FAMILIES = {
    "arcee": {}, "cohere": {}, "cohere2_moe": {}, "ernie4_5": {}, "ernie4_5_moe": {}, "exaone4": {}, "exaone_moe": {},
    "flex_olmo": {}, "gemma": {}, "gemma2": {}, "glm": {}, "glm4": {}, "gpt_neox": {}, "granitemoe": {},
    "granitemoeshared": {}, "hunyuan_v1_dense": {}, "hunyuan_v1_moe": {}, "jais2": {}, "ministral3": NO_WINDOW,
    "mistral": NO_WINDOW, "mixtral": NO_WINDOW, "nemotron": {}, "olmo2": {}, "olmoe": {}, "phi": {}, "phi3": NO_WINDOW,
    "qwen2": {}, "qwen2_moe": {}, "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": NO_WINDOW,
}  # fmt: skip
"""Model types of transformers, and what is not as in ``SMALL``."""


def write_family(folder: Path, family: str) -> Path:
    """A folder with the ``config.json`` of a tiny model of a family."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    usual = AutoConfig.for_model(family)
    changes = {key: value for key, value in (SMALL | FAMILIES[family]).items() if hasattr(usual, key)}
    config = AutoConfig.for_model(family, **changes).to_dict()
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("_single_process_vllm")
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_as_the_engine_computes(tmp_path, family):
    from cacheflow.vllm.models.partial_forward import PartialForward
    from cacheflow.vllm.startup.selftest import self_test
    from support.random_weights import random_weights
    from support.vllm_models import tiny_engine

    folder = write_family(tmp_path, family)
    options = {"load_format": "dummy", "disable_hybrid_kv_cache_manager": True}
    with random_weights(), tiny_engine(folder, dtype="bfloat16", **options) as engine:
        result = self_test(engine.layout, PartialForward(engine.handle), chunk_tokens=512)
        assert result.difference is None
        assert result.num_cuts == engine.layout.num_layers - 1


def test_the_documented_families_are_these():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"^By the self-test alone.*?: (.*?)\.$", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == list(FAMILIES)
