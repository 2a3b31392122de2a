"""An engine that takes images: text is recomputed and loaded, what holds an image is loaded alone, by its content."""

import numpy as np
import pytest

from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK, NUM_CHUNKS = 128, 6
TEXT, OUTPUT = CHUNK * NUM_CHUNKS + 40, 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory, _single_process_vllm):
    """An engine, and the token that stands for an image."""
    from support.connector_engine import serving_engine
    from support.image_model import write_image_model
    from support.random_weights import random_weights

    def faulty_store(options):
        from cacheflow.stores.memory import MemoryStore
        from cacheflow.stores.throttled import ThrottledStore

        store = FaultyStore(MemoryStore(capacity_bytes=options.cpu_bytes_to_use), FaultPlan())
        return ThrottledStore(store, options.throttle_bytes_per_s)

    folder, image_token = write_image_model(tmp_path_factory.mktemp("images"))
    options = {"self_test": True, "unsupported_models": "refuse", "throttle_bytes_per_s": 1e8, "policy": "cake"}
    with (
        pytest.MonkeyPatch.context() as patch,
        random_weights(),
    ):
        patch.setattr("cacheflow.vllm.startup.open_store.open_store", faulty_store)
        with serving_engine(
            folder, dtype="float32", chunk_tokens=CHUNK, options=options, load_format="dummy",
            skip_tokenizer_init=False,
        ) as engine:  # fmt: skip
            yield engine, image_token


def text(seed, count=TEXT):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def wish(*seeds):
    from support.image_model import picture

    return {"num_tokens": OUTPUT, "media": {"image": [picture(seed) for seed in seeds]}}


def assert_same(again, own):
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens


def test_text_is_recomputed_and_loaded(setting):
    engine, _ = setting
    tokens = text(1)
    own = engine.saved(tokens, num_tokens=OUTPUT)
    for ratio in (1.0, 4.0):
        engine.balance_link(TEXT, ratio=ratio)
        again = engine.ask(tokens, num_tokens=OUTPUT)
        assert again.record["loaded_cells"] > 0
        assert again.record["recomputed_cells"] > 0
        assert_same(again, own)
        engine.evict()


def test_text_before_an_image_is_recomputed_and_loaded(setting):
    engine, image_token = setting
    tokens = [*text(2, CHUNK * NUM_CHUNKS + 5), image_token, *text(3, 30)]
    own = engine.saved(tokens, **wish(1))
    engine.balance_link(TEXT)
    again = engine.ask(tokens, **wish(1))
    assert again.record["end"] == CHUNK * NUM_CHUNKS
    assert again.record["recomputed_cells"] > 0
    assert_same(again, own)


@pytest.mark.parametrize("before", [0, 3 * CHUNK - 8, 5 * CHUNK])
def test_a_prefix_with_an_image_is_loaded_alone(setting, before):
    from support.image_model import NUM_IMAGE_TOKENS

    engine, image_token = setting
    tokens = [*text(4, before), image_token, *text(5, TEXT - before - NUM_IMAGE_TOKENS)]
    own = engine.saved(tokens, **wish(2))
    engine.balance_link(TEXT, ratio=4.0)
    again = engine.ask(tokens, **wish(2))
    assert again.record["end"] == CHUNK * NUM_CHUNKS
    assert again.record["recomputed_cells"] == 0
    assert_same(again, own)


def test_another_image_in_its_place_is_another_prefix(setting):
    engine, image_token = setting
    tokens = [*text(6, 2 * CHUNK + 10), image_token, *text(7, 4 * CHUNK)]
    first = engine.saved(tokens, **wish(3))
    other = engine.own(tokens, **wish(4))
    assert not np.array_equal(first.kv, other.kv)
    again = engine.ask(tokens, **wish(4))
    assert again.record["end"] == 2 * CHUNK  # what lies before it is the same
    assert_same(again, other)


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.LATE])
def test_what_the_store_loses_after_an_image_is_left_to_vllm(setting, fault):
    engine, image_token = setting
    tokens = [image_token, *text(8)]
    own = engine.saved(tokens, **wish(5))
    engine.store.inner.set_plan(FaultPlan(rules=(FaultRule(fault=fault, every=5),)))
    again = engine.ask(tokens, **wish(5))
    engine.store.inner.set_plan(FaultPlan())
    assert again.record["outcome"] == "failed"
    assert again.record["recomputed_cells"] == 0
    assert_same(again, own)


def test_a_link_slower_than_prefill_leaves_a_prompt_with_an_image_to_vllm(setting):
    engine, image_token = setting
    tokens = [image_token, *text(9)]
    engine.configure(policy="cacheflow")
    own = engine.saved(tokens, **wish(6))
    engine.balance_link(TEXT, ratio=20.0)
    again = engine.ask(tokens, **wish(6))
    engine.configure(policy="cake")
    assert again.records == []
    assert "vLLM's own prefill" in again.params["cacheflow_reason"]
    assert_same(again, own)
