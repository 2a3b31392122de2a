"""Preemption, engines that end with work in flight, the next one on the same store, and starts that are refused."""

import copy
import threading
import time
from dataclasses import replace

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _single_process_vllm):
    from support.vllm_models import write_model

    return write_model(tmp_path_factory.mktemp("lifecycle"), "qwen3")


def tokens(count, seed):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


@pytest.fixture
def threads_left():
    """Names of our threads that began in this test and do not end soon."""
    before = set(threading.enumerate())

    def left():
        return [each.name for each in set(threading.enumerate()) - before if each.name.startswith("cacheflow")]

    def wait(timeout_s=15.0):
        end_s = time.monotonic() + timeout_s
        while left() and time.monotonic() < end_s:
            time.sleep(0.02)
        return left()

    return wait


def test_a_store_of_files_outlives_an_engine_that_ends_in_the_middle(folder, tmp_path, threads_left):
    """Restored requests that are preempted; shutdown with restorations, saves and a queue; then a second engine."""
    from support.connector_engine import serving_engine

    options = {
        "store": "file", "store_path": str(tmp_path / "store"), "throttle_bytes_per_s": 1e8, "policy": "cake",
    }  # fmt: skip
    prompts = [tokens(4 * CHUNK + 30 + n, seed=n) for n in range(3)]
    with serving_engine(
        folder, dtype="float32", chunk_tokens=CHUNK, options=options, num_gpu_blocks_override=28, max_model_len=2048
    ) as engine:
        own = [engine.saved(prompt, num_tokens=200).tokens for prompt in prompts]
        free_blocks = engine.free_blocks
        preempted = engine.count_preemptions()
        engine.balance_link(len(prompts[0]))
        names = [engine.submit(prompt, num_tokens=200) for prompt in prompts]
        engine.run()
        assert preempted, "the KV cache is too large for this test"
        assert [engine.answers[name].tokens for name in names] == own
        assert all(len(engine.answers[name].records) >= 1 for name in names)
        restored_twice = [name for name in names if len(engine.answers[name].records) > 1]
        assert {engine.answers[name].records[0]["outcome"] for name in names} == {"done"}
        engine.evict()
        assert engine.free_blocks == free_blocks
        engine.set_rate(1e6)
        for prompt in prompts:
            engine.submit(prompt)
        engine.submit(tokens(2 * CHUNK, seed=9))
        for _ in range(4):
            engine.step()
        assert engine.side.has_work
    assert threads_left() == []
    assert restored_twice or preempted

    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options=options) as engine:
        again = engine.ask(prompts[1], num_tokens=200)
        assert again.record["end"] == 4 * CHUNK
        assert again.record["loaded_cells"] > 0
        assert again.tokens == own[1]
        refusals(engine)
        long_answers_outgrow_the_prompt(engine)
    assert threads_left() == []


def long_answers_outgrow_the_prompt(engine):
    """A preempted request is restored from what it saved itself while it was decoding."""
    engine.configure(policy="load")
    prompt = tokens(CHUNK + 100, seed=40)
    own = engine.own(prompt, num_tokens=2 * CHUNK).tokens
    name = engine.submit(prompt, num_tokens=2 * CHUNK)
    engine.run(until=lambda: len(engine.answers[name].tokens) > CHUNK + 60)
    request = engine.request(name)
    engine.settle()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.num_preemptions == 1
    engine.poison()
    engine.run()
    assert engine.answers[name].tokens == own
    assert engine.answers[name].record["end"] == 2 * CHUNK


REFUSED = [
    ({"chunk_tokens": 200}, "multiple of vLLM's KV block size of 128"),
    ({"chunk_token": 256}, "unknown 'chunk_token'; known are store, store_path"),
    ({"policy": "fastest"}, "policy is 'fastest', must be one of"),
    ({"store": "file"}, "the file store needs a store_path"),
    ({"cpu_bytes_to_use": "4GB"}, "cpu_bytes_to_use is '4GB', must be int"),
    ({"restore_timeout_s": 0}, "restore_timeout_s is 0.0, must be above 0"),
]


def refusals(engine):
    """Each configuration is refused by both halves, with what to do about it."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from cacheflow.errors import ConfigError
    from cacheflow.vllm.connector import CacheFlowConnector

    config = engine.engine.vllm_config
    for extra, message in REFUSED:
        changed = copy.copy(config)
        transfer = replace(config.kv_transfer_config, kv_connector_extra_config=extra)
        changed.kv_transfer_config = transfer
        for role in KVConnectorRole:
            with pytest.raises(ConfigError) as caught:
                CacheFlowConnector(changed, role, engine.scheduler.kv_cache_config)
            assert message in str(caught.value), extra


@pytest.mark.usefixtures("_single_process_vllm")
def test_a_model_that_cannot_be_recomputed_is_refused_at_start(tmp_path, threads_left):
    """Through a whole start; by default the same model is served by loading alone."""
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from cacheflow.errors import UnsupportedModelError
    from support.connector_engine import kv_transfer_config, new_llm, serving_engine
    from support.random_weights import model_folder, random_weights

    folder = model_folder(tmp_path / "solar", "solar")  # it hands on hidden states past some of its layers
    options = {"self_test": True, "throttle_bytes_per_s": 1e8}
    refusing = kv_transfer_config(folder, {"chunk_tokens": CHUNK, **options, "unsupported_models": "refuse"})
    with random_weights():
        with pytest.raises(
            UnsupportedModelError, match=r"SolarForCausalLM.*layers\.3\..* differs by up to .*load_only"
        ):
            new_llm(folder, dtype="float32", chunk_tokens=CHUNK, transfer=refusing, load_format="dummy")
        ensure_kv_transfer_shutdown()  # vLLM keeps the connector of an engine that did not start
        cleanup_dist_env_and_memory()
        serving = serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options=options, load_format="dummy")
        with serving as engine:
            prompt = [token % 512 for token in tokens(4 * CHUNK + 30, seed=1)]
            own = engine.saved(prompt)
            again = engine.ask(prompt)
            assert again.record["recomputed_cells"] == 0
            assert (again.kv == own.kv).all()
            assert again.tokens == own.tokens
    assert threads_left() == []


def test_the_failure_policy_is_read_where_vllm_reads_it(folder, threads_left):
    """As a child of MultiConnector: through a whole start, whatever the child's own says."""
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from cacheflow.errors import ConfigError
    from support.connector_engine import kv_transfer_config, new_llm

    child = kv_transfer_config(folder, {"chunk_tokens": CHUNK})
    assert child["kv_load_failure_policy"] == "recompute"
    outer = {
        "kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [child]},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"kv_load_failure_policy is 'fail'.*outer"):
        new_llm(folder, dtype="float32", chunk_tokens=CHUNK, transfer=outer)
    ensure_kv_transfer_shutdown()  # vLLM keeps the connector of an engine that did not start
    cleanup_dist_env_and_memory()
    assert threads_left() == []
