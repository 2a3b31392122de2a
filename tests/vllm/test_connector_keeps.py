"""Keeps and tenants' quotas in an engine whose store is small: what comes back, and what made room."""

import time

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 256
LAYERS = 4
RECORD_BYTES = 4096 + CHUNK * 2 * 2 * 32 * 4  # keys and values, heads, their dimensions, float32
ROOM_CHUNKS = 16


@pytest.fixture(scope="module")
def started(tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("keeps"), "qwen3", num_hidden_layers=LAYERS)
    options = {
        "policy": "load",
        "cpu_bytes_to_use": ROOM_CHUNKS * LAYERS * RECORD_BYTES + (1 << 16),
        "tenant_quota": 0.5,
        "pinned_share": 1.0,  # so that a tenant may keep all of its quota
        "keep_tool_s": 600.0,
    }
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options=options) as engine:
        yield engine


@pytest.fixture
def engine(started):
    started.evict()
    yield started
    started.run()


def tokens(count, seed):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def prompt_of(seed, num_chunks=4):
    return tokens(num_chunks * CHUNK + 9, seed)


def save(engine, prompt, *, salt=None, **params):
    """Have a prompt computed and saved; returns its answer."""
    answer = engine.ask(prompt, salt=salt, num_tokens=2, params={"cacheflow": "recompute", **params})
    engine.step()  # in which workers hear what has ended
    engine.evict()
    return answer


def until_decided(engine, num_chunks):
    """Wait until so many chunks were pinned or not; returns how many of each, and starts counting anew."""
    ends_s = time.monotonic() + 60.0
    while (kept := engine.worker.counts.kept).total() < num_chunks:
        assert time.monotonic() < ends_s, f"only {kept}"
        time.sleep(0.01)
        engine.worker.forget(set())
    counted = dict(kept)
    kept.clear()
    return counted


def crowd(engine, first_seed, *, salt=None, num_prompts=6):
    """Save more than the store has room for."""
    for seed in range(first_seed, first_seed + num_prompts):
        save(engine, prompt_of(seed), salt=salt)


def restored_chunks(engine, prompt, *, salt=None, **params):
    answer = engine.ask(prompt, salt=salt, num_tokens=2, params={"cacheflow": "load", **params})
    engine.step()
    engine.evict()
    return sum(len(record["cells"]) for record in answer.records if record["outcome"] == "done")


def test_a_prefix_that_is_kept_outlives_a_crowd_of_others(engine):
    kept, other = prompt_of(1), prompt_of(2)
    save(engine, kept, keep=600)
    assert until_decided(engine, 4) == {"pinned": 4}
    save(engine, other)
    crowd(engine, 10)
    assert restored_chunks(engine, kept) == 4
    assert restored_chunks(engine, other) == 0, "the crowd took more than there was room for"
    save(engine, kept, keep=0)
    crowd(engine, 20)
    assert restored_chunks(engine, kept) == 0, "it was let go of"


def test_a_tools_prefix_is_kept_until_the_conversation_goes_on(engine):
    agent = prompt_of(3)
    save(engine, agent, keep="tool")
    assert until_decided(engine, 4) == {"pinned": 4}
    crowd(engine, 30)
    after_tool = [*agent, *tokens(40, 4)]
    assert restored_chunks(engine, after_tool) == 4
    crowd(engine, 40)
    assert restored_chunks(engine, agent) == 0


def test_keeps_never_fill_the_store(engine):
    prompts = [prompt_of(seed) for seed in (50, 51, 52)]
    decided = []
    for prompt in prompts:
        save(engine, prompt, keep=600)
        decided.append(until_decided(engine, 4))
    assert decided == [{"pinned": 4}, {"pinned": 4}, {"refused": 4}], "a tenant may keep all of its quota"
    crowd(engine, 60)
    assert [restored_chunks(engine, prompt) for prompt in prompts] == [4, 4, 0]
    last = prompt_of(65)
    save(engine, last)
    assert restored_chunks(engine, last) == 4, "others are still saved"
    for prompt in prompts:
        save(engine, prompt, keep=0)


def test_what_is_asked_wrongly_is_answered(engine):
    answer = save(engine, prompt_of(70), keep="forever")
    assert answer.finish_reason == "length"
    assert "keep is 'forever', must be 'tool' or seconds, from 0 to 3600" in answer.params["cacheflow_error"]
    assert not engine.worker.counts.kept


def test_one_tenant_cannot_throw_out_what_another_saved(engine):
    quiet = prompt_of(80)
    save(engine, quiet, salt="quiet")
    crowd(engine, 90, salt="noisy", num_prompts=8)
    assert restored_chunks(engine, quiet, salt="quiet") == 4
    assert restored_chunks(engine, prompt_of(97), salt="noisy") == 4
    assert restored_chunks(engine, prompt_of(90), salt="noisy") == 0


def test_a_tenants_requests_store_what_they_share_once_and_two_tenants_never_share(engine):
    shared = tokens(2 * CHUNK, 110)
    for seed, salt in ((111, "one"), (112, "one"), (111, "two")):
        before = engine.store.stats().put_outcomes
        save(engine, [*shared, *tokens(CHUNK + 5, seed)], salt=salt)
        after = engine.store.stats().put_outcomes
        written = {outcome: after[outcome] - before[outcome] for outcome in after if after[outcome] != before[outcome]}
        new_chunks = 1 if seed == 112 else 3
        assert {outcome.value: count for outcome, count in written.items()} == {"stored": new_chunks * LAYERS}
