"""A compiled engine: restored in whole passes, equal in every bit to what it computes itself."""

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 256
NUM_CHUNKS = 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("compiled"), "llama", num_hidden_layers=6)
    options = {"throttle_bytes_per_s": 1e9, "self_test": True}
    with serving_engine(folder, dtype="bfloat16", chunk_tokens=CHUNK, options=options, enforce_eager=False) as engine:
        yield engine


@pytest.mark.parametrize("policy", ["cacheflow", "cake", "load", "cacheflow_v1", "cacheflow_v2"])
def test_token_wise(engine, policy):
    from support.connector_engine import random_tokens

    engine.configure(policy=policy)
    prompt = random_tokens(NUM_CHUNKS * CHUNK + 37)
    own = engine.own(prompt)
    first = engine.saved(prompt)
    assert np.array_equal(first.kv, own.kv)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    again = engine.ask(prompt)
    assert again.record["outcome"] == "done"
    assert again.record["loaded_cells"] + again.record["recomputed_cells"] == NUM_CHUNKS
    assert again.record["loaded_cells"] > 0
    assert (again.record["recomputed_cells"] > 0) == (policy != "load")
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens


def test_layer_blocks_are_refused(engine):
    from cacheflow.errors import ConfigError

    with pytest.raises(ConfigError, match="enforce-eager"):
        engine.configure(layers_per_block=2)
