"""An engine that takes images: text is recomputed and loaded, what holds an image is loaded alone, by its content."""

from pathlib import Path

import numpy as np
import pytest

from cacheflow.stores.faults import Fault, FaultRule
from support.faulty_store import faulty_store, inject

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK, NUM_CHUNKS = 128, 6
TEXT, OUTPUT = CHUNK * NUM_CHUNKS + 40, 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory, _single_process_vllm):
    """An engine, and the token that stands for an image."""
    from support.connector_engine import serving_engine
    from support.image_model import write_image_model
    from support.random_weights import random_weights

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


def test_an_image_that_goes_by_a_name_is_neither_saved_nor_restored(setting):
    """The name is the user's: in another process it may stand for another image."""
    engine, image_token = setting
    tokens = [image_token, *text(10)]
    own = engine.own(tokens, **wish(7))
    for _ in range(2):
        named = engine.ask(tokens, **wish(7), media_names={"image": ["a cat"]})
        engine.evict()
        assert named.tokens == own.tokens
        assert named.records == []
        assert "has no hash" in named.params["cacheflow_reason"]


def test_a_weight_of_the_model_itself_and_the_processors_files_are_part_of_the_identity(setting, monkeypatch):
    """Neither is in a module of its own, and the hash of an image says nothing of either."""
    import torch

    from cacheflow.vllm.models.model_access import open_model
    from cacheflow.vllm.startup.identity import stage_weights, worker_namespace

    engine, _ = setting
    engine.evict()
    runner, layout = engine.core.model_executor.driver_worker.worker.model_runner, engine.layout
    handle = open_model(runner.vllm_config, runner.kv_cache_config)

    def digests():
        return stage_weights(handle, layout), worker_namespace(handle, layout, chunk_tokens=CHUNK).digest

    first = digests()
    assert digests() == first
    handle.model.register_parameter("newline", torch.nn.Parameter(torch.ones(4), requires_grad=False))
    other = digests()
    del handle.model.newline
    assert (other[0][0] != first[0][0], other[0][1:], other[1]) == (True, first[0][1:], first[1])
    media = handle.vllm_config.model_config.multimodal_config
    monkeypatch.setattr(media, "mm_processor_kwargs", {"image_mean": [0.1, 0.1, 0.1]})
    assert digests()[1] != first[1]
    monkeypatch.undo()
    file = Path(handle.vllm_config.model_config.model) / "processor_config.json"
    before = file.read_text()
    file.write_text(before.replace("0.5", "0.4"))
    assert digests()[1] != first[1]
    file.write_text(before)
    assert digests() == first


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.LATE])
def test_what_the_store_loses_after_an_image_is_left_to_vllm(setting, fault):
    engine, image_token = setting
    tokens = [image_token, *text(8)]
    own = engine.saved(tokens, **wish(5))
    inject(engine, FaultRule(fault=fault, every=5))
    again = engine.ask(tokens, **wish(5))
    inject(engine)
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
