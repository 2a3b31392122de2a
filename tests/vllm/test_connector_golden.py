"""Save, evict, poison, restore: KV and tokens equal those of an engine without the connector, in every bit."""

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNKS = (128, 256, 512)
NUM_CHUNKS = 5
POLICIES = ("cacheflow", "cake", "load", "cacheflow_v1", "cacheflow_v2")
MODEL = {"num_hidden_layers": 6}


def prompt_of(chunk_tokens):
    from support.connector_engine import random_tokens

    return random_tokens(NUM_CHUNKS * chunk_tokens + 37, seed=chunk_tokens)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def setting(request, tmp_path_factory, _single_process_vllm):
    """An engine with the connector, and by chunk size what one without it answered on the same chunk grid."""
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("golden"), "qwen3", **MODEL)
    own = {}
    with serving_engine(folder, dtype=request.param, chunk_tokens=512) as plain:
        for chunk_tokens in CHUNKS:
            plain.scheduler.max_num_scheduled_tokens = chunk_tokens
            own[chunk_tokens] = plain.ask(prompt_of(chunk_tokens))
            plain.scheduler.reset_prefix_cache()
    options = {"throttle_bytes_per_s": 1e9}
    with serving_engine(folder, dtype=request.param, chunk_tokens=512, options=options) as engine:
        yield engine, own


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_restored_as_computed(setting, chunk_tokens, policy):
    engine, own = setting
    engine.configure(chunk_tokens=chunk_tokens, policy=policy)
    prompt = prompt_of(chunk_tokens)
    first = engine.ask(prompt, params={"cacheflow": "recompute"})
    assert first.tokens == own[chunk_tokens].tokens
    assert np.array_equal(first.kv, own[chunk_tokens].kv)
    engine.evict()
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    again = engine.ask(prompt)
    record = again.record
    assert record["outcome"] == "done"
    assert record["policy"] == policy
    assert (record["start"], record["end"]) == (0, NUM_CHUNKS * chunk_tokens)
    assert record["loaded_cells"] > 0
    assert (record["recomputed_cells"] > 0) == (policy != "load")
    assert record["recomputed_cells"] + record["loaded_cells"] == NUM_CHUNKS * MODEL["num_hidden_layers"]
    assert np.array_equal(again.kv, first.kv)
    assert again.tokens == first.tokens
