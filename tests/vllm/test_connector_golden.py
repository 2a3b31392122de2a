"""Save, evict, poison, restore: KV and tokens equal those of an engine without the connector, in every bit."""

import numpy as np
import pytest

from support.fixed_staircase import planned

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_CHUNKS = {128: 5, 256: 5, 512: 5, 1024: 3}
"""By chunk size; what the model's positions have room for."""
POLICIES = ("cacheflow", "cake", "load", "cacheflow_v1", "cacheflow_v2")
LAYERS = 6
STAIRCASES = {128: (6, 4, 3, 1, 0), 1024: (5, 3, 1)}
"""By chunk size: blocks of each chunk that are recomputed, those above are loaded."""


def prompt_of(chunk_tokens):
    from support.connector_engine import random_tokens

    return random_tokens(NUM_CHUNKS[chunk_tokens] * chunk_tokens + 37, seed=chunk_tokens)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def setting(request, tmp_path_factory, _single_process_vllm):
    """An engine with the connector, and by chunk size what one without it answered on the same chunk grid."""
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("golden"), "qwen3", num_hidden_layers=LAYERS)
    own = {}
    with serving_engine(folder, dtype=request.param, chunk_tokens=max(NUM_CHUNKS)) as plain:
        for chunk_tokens in NUM_CHUNKS:
            plain.scheduler.max_num_scheduled_tokens = chunk_tokens
            own[chunk_tokens] = plain.ask(prompt_of(chunk_tokens))
            plain.scheduler.reset_prefix_cache()
    options = {"throttle_bytes_per_s": 1e9}
    with serving_engine(folder, dtype=request.param, chunk_tokens=max(NUM_CHUNKS), options=options) as engine:
        yield engine, own


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk_tokens", NUM_CHUNKS)
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
    assert (record["start"], record["end"]) == (0, NUM_CHUNKS[chunk_tokens] * chunk_tokens)
    assert record["loaded_cells"] > 0
    assert (record["recomputed_cells"] > 0) == (policy != "load")
    assert record["recomputed_cells"] + record["loaded_cells"] == NUM_CHUNKS[chunk_tokens] * LAYERS
    assert np.array_equal(again.kv, first.kv)
    assert again.tokens == first.tokens


def test_staircases_of_all_kinds_are_exact(setting):
    """Whatever the meeting point: fast links, slow links, and objects of several layers."""
    engine, own = setting
    for layers_per_block in (1, 4):
        engine.configure(chunk_tokens=128, policy="cacheflow_v1", layers_per_block=layers_per_block)
        prompt = prompt_of(128)
        engine.saved(prompt)
        for ratio in (0.2, 0.6, 2.0, 5.0):
            engine.balance_link(len(prompt), ratio=ratio)
            again = engine.ask(prompt)
            assert again.record["outcome"] == "done"
            assert np.array_equal(again.kv, own[128].kv)
            assert again.tokens == own[128].tokens
            engine.evict()
    engine.configure(layers_per_block=None)


@pytest.mark.parametrize("kv_only_top", [False, True])
@pytest.mark.parametrize("chunk_tokens", STAIRCASES)
def test_a_staircase_of_heights_that_fall_with_the_block(setting, chunk_tokens, kv_only_top):
    """The lower layers of a chunk recomputed and its upper layers loaded, as planned, with nothing left to chance."""
    engine, own = setting
    engine.configure(chunk_tokens=chunk_tokens, policy="cake")
    prompt, levels_K = prompt_of(chunk_tokens), STAIRCASES[chunk_tokens]
    engine.saved(prompt)
    engine.balance_link(len(prompt))
    with planned(engine, *levels_K, kv_only_top=kv_only_top) as staircase:
        again = engine.ask(prompt)
    assert again.record["outcome"] == "done"
    assert again.record["policy"] == staircase.name
    assert again.record["cells"] == staircase.cells(LAYERS)
    assert np.array_equal(again.kv, own[chunk_tokens].kv)
    assert again.tokens == own[chunk_tokens].tokens


def test_what_decoding_computed_comes_back_bit_for_bit(setting):
    """Against vLLM's own prefix cache, which holds what decode steps computed, not what a prefill would."""
    from support.connector_engine import random_tokens

    engine, _ = setting
    engine.configure(chunk_tokens=128, policy="load")
    engine.evict()
    prompt = random_tokens(128 + 60, seed=27)
    first = engine.ask(prompt, num_tokens=2 * 128 + 50)
    chat = [*prompt, *first.tokens, *random_tokens(70, seed=28)]
    own = engine.ask(chat)
    assert own.records == []
    assert "384 are in the KV cache" in own.params["cacheflow_reason"]
    engine.evict()
    engine.balance_link(len(chat), ratio=0.1)
    again = engine.ask(chat)
    assert (again.record["start"], again.record["end"]) == (0, 4 * 128)  # the last chunk is the second turn's
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens


def replaced(engine, prompt, chunk, layer, change):
    """Put other bytes in the place of a stored object, checksum and all."""
    from cacheflow.stores.base import GetRequest, PutOutcome, PutRequest
    from cacheflow.stores.keys import RankKeys, chain_hashes
    from cacheflow.types import LoadOutcome

    chunk_tokens = engine.options.chunk_tokens
    hashes = chain_hashes(prompt, list(range(chunk_tokens, (chunk + 1) * chunk_tokens + 1, chunk_tokens)))
    key = RankKeys().kv(engine.side.identity.namespace(None), hashes[chunk].hex(), (layer, layer + 1))
    num_bytes = engine.layout.num_bytes(layer, layer + 1, chunk_tokens // engine.layout.block_size)
    payload = np.empty(num_bytes, dtype=np.uint8)
    assert engine.store.submit_get([GetRequest(key, payload)]).wait() == (LoadOutcome.OK,)
    change(payload)
    request = PutRequest(key, [payload], shape=payload.shape, dtype="uint8", replace=True)
    assert engine.store.submit_put([request]).wait() == (PutOutcome.STORED,)


def test_wrong_bytes_in_the_store_show(setting):
    """Negative control: what is loaded is what is used."""
    engine, _ = setting
    engine.configure(chunk_tokens=128, policy="load")
    prompt = [*prompt_of(128)[::-1]]
    first = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=0.1)

    def change(payload):
        payload[3::8] ^= 0x0F  # in fp32 an exponent, in bf16 every other one

    replaced(engine, prompt, 1, 2, change)
    again = engine.ask(prompt)
    per_chunk = 128 // engine.layout.block_size
    different = (again.kv != first.kv).any(axis=2)
    assert different[2, per_chunk : 2 * per_chunk].all()
    assert different.sum() == per_chunk
    assert again.tokens != first.tokens


def test_blocks_that_were_not_restored_show(setting, monkeypatch):
    """Negative control: the KV cache really is empty before a restoration."""
    from cacheflow.vllm.worker.transfer import VllmTransferPort

    engine, own = setting
    engine.configure(chunk_tokens=128, policy="load")
    prompt = prompt_of(128)
    engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(VllmTransferPort, "place", VllmTransferPort.cancel)
        again = engine.ask(prompt)
    assert (again.kv != own[128].kv).mean() > 0.9
    assert again.tokens != own[128].tokens
    engine.evict()
    assert engine.ask(prompt).tokens == own[128].tokens


def test_vllm_itself_answers_the_same_on_a_poisoned_cache(setting):
    """Control of the control: poison alone changes nothing that is computed."""
    engine, own = setting
    engine.configure(chunk_tokens=128)
    assert engine.own(prompt_of(128)).tokens == own[128].tokens
