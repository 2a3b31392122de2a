"""Tensor parallelism: two ranks restore a prefix together, by the same orders, each over a link of its own."""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(240)]

CHUNK = 256
NUM_CHUNKS = 10
LAYERS = 6
RANKS = 2
SUFFIX = 37
MAX_TOKENS = 21 * 128
BYTES_PER_RANK = NUM_CHUNKS * CHUNK * LAYERS * 2 * 32 * 4  # one KV head each, keys and values, float32


def tokens(count, seed):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def requests(*wished):
    """The same prompt again and again; between two of them another one that fills every block of the KV cache."""
    prompt, other = tokens(NUM_CHUNKS * CHUNK + SUFFIX, seed=1), tokens(MAX_TOKENS - 8, seed=2)
    asked = []
    for each in wished:
        asked.append({"tokens": other, "num_tokens": 8, "params": {"cacheflow": "off"}})
        asked.append({"tokens": prompt, "num_tokens": 24, **each})
    return asked


def test_a_prefix_is_restored_on_both_ranks_with_both_pointers_at_work(tmp_path):
    from support.connector_engine import kv_transfer_config
    from support.two_ranks import run
    from support.vllm_models import write_model

    order = {
        "model": str(write_model(tmp_path / "model", "llama", num_hidden_layers=LAYERS)),
        "chunk_tokens": CHUNK, "max_tokens": MAX_TOKENS, "transfer": None, "store": str(tmp_path / "store"),
    }  # fmt: skip
    plain = run({**order, "requests": requests({}, {})}, tmp_path)
    own = plain[-1]
    assert plain[1]["tokens"] == own["tokens"]
    options = {
        "chunk_tokens": CHUNK, "store": "file", "store_path": order["store"], "self_test": True,
        "throttle_bytes_per_s": BYTES_PER_RANK / own["ttft_s"],  # loading takes as long as recomputing
    }  # fmt: skip
    wished = [
        {"params": {"cacheflow": "recompute"}, "wait_for_objects": NUM_CHUNKS * LAYERS * RANKS},
        {"params": {"explain": True}},
        {"params": {"cacheflow": "load"}},
    ]
    transfer = kv_transfer_config(tmp_path / "profiles", options)
    answers = run({**order, "transfer": transfer, "requests": requests(*wished)}, tmp_path)[1::2]
    assert [each["tokens"] for each in answers] == [own["tokens"]] * 3
    computed, both, loaded = (each["params"]["cacheflow"] for each in answers)
    assert computed == []
    (record,) = both
    assert (record["outcome"], record["policy"], record["choice"]) == ("done", "cacheflow", "hybrid")
    assert (record["start"], record["end"]) == (0, NUM_CHUNKS * CHUNK)
    assert record["recomputed_cells"] >= LAYERS
    assert record["loaded_cells"] >= LAYERS
    assert record["recomputed_cells"] + record["loaded_cells"] == NUM_CHUNKS * LAYERS
    assert 0 < record["loaded_bytes"] < BYTES_PER_RANK
    (record,) = loaded
    assert (record["outcome"], record["loaded_cells"]) == ("done", NUM_CHUNKS * LAYERS)
