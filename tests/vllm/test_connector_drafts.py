"""A live engine that drafts from tokens (ngram): tokens as without drafts, and decode's KV comes back as it was."""

import sys

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
NUM_DRAFTS = 3
OUTPUT = CHUNK + 62
"""Fills what the prompt leaves of the first chunk, and the second."""


def repetitive(count, *, seed=1):
    """A prompt that gives an n-gram drafter something to find."""
    from support.connector_engine import random_tokens

    phrase = random_tokens(23, seed=seed)
    return (phrase * (count // 23 + 1))[:count]


@pytest.fixture(scope="module")
def setting(tmp_path_factory, _single_process_vllm):
    """An engine with the connector and drafts, and what one without either answered."""
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("drafts"), "qwen3")
    prompts = {seed: repetitive(CHUNK - 30 + seed, seed=seed) for seed in range(1, 4)}
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK) as plain:
        own = {seed: plain.ask(prompt, num_tokens=OUTPUT).tokens for seed, prompt in prompts.items()}
    speculative = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 3}
    with serving_engine(
        folder, dtype="float32", chunk_tokens=CHUNK, options={"throttle_bytes_per_s": 1e9, "policy": "load"},
        speculative_config=speculative,
    ) as engine:  # fmt: skip
        yield engine, prompts, own
    # The drafter's numba brings an object that vLLM 0.32 stumbles over when it looks through all modules at its next
    # start in this process. Who uses it holds it.
    sys.modules.pop("llvmlite.binding.ffi", None)


@pytest.fixture
def drafts(setting):
    """Counts drafts and those that were accepted."""
    engine, _, _ = setting
    counted = {"drafted": 0, "accepted": 0}
    make = engine.scheduler.make_spec_decoding_stats

    def noting(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
        counted["drafted"] += num_draft_tokens
        counted["accepted"] += num_accepted_tokens
        return make(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

    engine.scheduler.make_spec_decoding_stats = noting
    yield counted
    engine.scheduler.make_spec_decoding_stats = make


def test_tokens_are_those_without_drafts(setting, drafts):
    engine, prompts, own = setting
    for seed, prompt in prompts.items():
        assert engine.saved(prompt, num_tokens=OUTPUT).tokens == own[seed]
    assert 0 < drafts["accepted"] < drafts["drafted"]


def test_what_decoding_with_drafts_computed_comes_back_bit_for_bit(setting, drafts):
    """Against vLLM's own prefix cache; a chunk with a rejected token's KV would differ."""
    from support.connector_engine import random_tokens

    engine, prompts, own = setting
    for seed, prompt in prompts.items():
        engine.evict()
        first = engine.ask(prompt, num_tokens=OUTPUT)
        assert first.tokens == own[seed]
        chat = [*prompt, *first.tokens, *random_tokens(70, seed=30 + seed)]
        cached = engine.ask(chat)
        assert cached.records == []
        assert "256 are in the KV cache" in cached.params["cacheflow_reason"]
        engine.evict()
        engine.balance_link(len(chat), ratio=0.1)
        again = engine.ask(chat)
        assert again.record["start"] == 0
        assert again.record["end"] == 2 * CHUNK
        assert np.array_equal(again.kv[:, :2], cached.kv[:, :2])
        assert again.tokens == cached.tokens
    assert 0 < drafts["accepted"] < drafts["drafted"]


@pytest.mark.parametrize("num_new", [1, 2, NUM_DRAFTS + 1, 40])
def test_a_restored_prompt_goes_on_with_drafts(setting, num_new):
    """With one new token vLLM pads the first step behind the restoration with drafts that are none."""
    engine, _, _ = setting
    prompt = repetitive(3 * CHUNK + num_new, seed=50 + num_new)
    engine.configure(policy="cake")
    own = engine.saved(prompt, num_tokens=40)
    engine.balance_link(len(prompt))
    again = engine.ask(prompt, num_tokens=40)
    assert (again.record["outcome"], again.record["end"]) == ("done", 3 * CHUNK)
    assert again.record["recomputed_cells"] > 0
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)
    engine.configure(policy="load")


def test_preempted_while_it_drafts(setting):
    """Restored from what it saved itself; drafts under way are forgotten."""
    engine, prompts, own = setting
    engine.evict()
    name = engine.submit(prompts[1], num_tokens=OUTPUT)
    engine.run(until=lambda: len(engine.answers[name].tokens) > CHUNK + 40)
    request = engine.request(name)
    engine.settle()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert request.num_preemptions == 1
    engine.poison()
    engine.run()
    assert engine.answers[name].tokens == own[1]
    assert engine.answers[name].record["end"] == 2 * CHUNK


def test_restorations_beside_requests_that_draft(setting, drafts):
    """What each of them answered at first is the next one's prompt."""
    engine, prompts, own = setting
    engine.evict()
    chats = {seed: [*prompt, *own[seed], *repetitive(40, seed=seed)] for seed, prompt in prompts.items()}
    answers = {seed: engine.saved(chat, num_tokens=60).tokens for seed, chat in chats.items()}
    free_blocks = engine.free_blocks
    engine.balance_link(2 * CHUNK)
    names = {}
    for seed, chat in chats.items():
        names[engine.submit(chat, num_tokens=60)] = seed
        for _ in range(6):
            engine.step()
    engine.run()
    for name, seed in names.items():
        assert engine.answers[name].tokens == answers[seed]
        assert engine.answers[name].record["outcome"] == "done"
    assert drafts["drafted"] > 0
    engine.evict()
    assert engine.free_blocks == free_blocks
