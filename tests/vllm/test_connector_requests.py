"""Requests as they come: chats, shared and diverging prefixes, partly cached ones, and what each may ask for."""

import numpy as np
import pytest

from support.v2_runner import first_runner

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 256
LAYERS = 4


@pytest.fixture(scope="module")
def started(tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("requests"), "qwen3", num_hidden_layers=LAYERS)
    options = {"throttle_bytes_per_s": 1e8, "policy": "cake"}
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options=options) as engine:
        engine.ask(tokens(40, 1))
        yield engine


@pytest.fixture
def engine(started):
    """The engine with nothing cached, a fast link and the policy that needs no advantage to restore."""
    started.evict()
    started.set_rate(1e8)
    yield started
    started.run()


def tokens(count, seed):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def reads(engine):
    from cacheflow.types import LoadOutcome

    return engine.store.stats().get_outcomes[LoadOutcome.OK]


def close(engine, one, other):
    """Equal but for the rounding that another chunk grid brings."""
    one, other = engine.numbers(one), engine.numbers(other)
    return one.shape == other.shape and np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other)


@pytest.mark.parametrize("num_local", [CHUNK, CHUNK + 128, 2 * CHUNK + 128])
@pytest.mark.parametrize("policy", ["cake", "load", "cacheflow_v1"])
def test_a_part_is_still_in_the_prefix_cache(engine, num_local, policy):
    engine.configure(policy=policy)
    prompt = tokens(5 * CHUNK + 21, seed=10)
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    engine.ask(prompt[: num_local + 1], params={"cacheflow": "off"}, num_tokens=1)
    again = engine.ask(prompt)
    assert (again.record["start"], again.record["end"]) == (num_local, 5 * CHUNK)
    assert close(engine, again.kv, own.kv)
    assert again.tokens == own.tokens
    if policy == "load":
        first = num_local // 128
        assert np.array_equal(again.kv[:, first:], own.kv[:, first:])
    else:
        assert again.record["recomputed_cells"] > 0


@pytest.mark.parametrize("save_decode_kv", [True, pytest.param(False, marks=first_runner)])
def test_the_second_turn_of_a_chat(engine, save_decode_kv):
    """Its prefix ends in tokens that decode steps made."""
    engine.configure(policy="cake", save_decode_kv=save_decode_kv)
    prompt = tokens(CHUNK + 60, seed=20 + save_decode_kv)
    first = engine.saved(prompt, num_tokens=CHUNK + 50)
    chat = [*prompt, *first.tokens, *tokens(70, seed=21)]
    own = engine.own(chat)
    again = engine.ask(chat)
    assert (again.record["start"], again.record["end"]) == (0, 2 * CHUNK if save_decode_kv else CHUNK)
    assert close(engine, again.kv, own.kv)
    assert again.tokens == own.tokens
    engine.configure(save_decode_kv=True)


def test_the_last_decoded_token_of_a_chunk_is_saved_once_its_keys_are_there(engine):
    """A chunk that ends with the answer's last token: that token was never run through the model."""
    prompt = tokens(2 * CHUNK - 40, seed=25)
    first = engine.saved(prompt, num_tokens=40)
    chat = [*prompt, *first.tokens, *tokens(30, seed=26)]
    own = engine.own(chat)
    again = engine.ask(chat)
    assert again.record["end"] == CHUNK
    assert again.tokens == own.tokens


def test_saves_and_restores_in_one_batch(engine):
    old = [tokens(4 * CHUNK + 30 * n + 5, seed=30 + n) for n in range(3)]
    new = [tokens(2 * CHUNK + 41 * n + 9, seed=40 + n) for n in range(3)]
    own = {id(prompt): engine.own(prompt).tokens for prompt in (*old, *new)}
    for prompt in old:
        engine.saved(prompt)
    engine.balance_link(len(old[0]))
    mixed = [prompt for pair in zip(old, new, strict=True) for prompt in pair]
    names = {engine.submit(prompt): prompt for prompt in mixed}
    engine.run()
    assert {name: engine.answers[name].tokens == own[id(prompt)] for name, prompt in names.items()} == dict.fromkeys(
        names, True
    )
    assert sum(len(engine.answers[name].records) for name in names) == len(old)
    engine.evict()
    for prompt in mixed:
        assert engine.ask(prompt).record["end"] == len(prompt) // CHUNK * CHUNK


def test_two_requests_with_the_same_missing_prefix_load_it_once(engine):
    engine.configure(policy="load")
    prompt = tokens(4 * CHUNK, seed=50)
    one, two = [*prompt, *tokens(30, seed=51)], [*prompt, *tokens(33, seed=52)]
    own = [engine.own(each).tokens for each in (one, two)]
    engine.saved(one)
    before = reads(engine)
    names = [engine.submit(one), engine.submit(two)]
    engine.run()
    assert [engine.answers[name].tokens for name in names] == own
    assert reads(engine) - before == 4 * LAYERS
    # Whoever's question to the store is answered first restores.
    assert sorted(len(engine.answers[name].records) for name in names) == [0, 1]


@pytest.mark.parametrize("abort_first", [False, True])
def test_what_another_restoration_has_brought_is_copied(engine, abort_first):
    """Both go on alone behind the part they share; the first one's blocks may be given away as soon as it is over."""
    engine.configure(policy="cake")
    shared = tokens(4 * CHUNK, seed=53)
    one, two = [*shared, *tokens(3 * CHUNK + 30, seed=54)], [*shared, *tokens(CHUNK + 20, seed=55)]
    own_one, own_two = engine.saved(one), engine.saved(two)
    engine.balance_link(len(one), ratio=3.0)
    names = [engine.submit(one)]
    engine.run(until=lambda: restoring(engine, names[0]))
    names.append(engine.submit(two))
    engine.run(until=lambda: restoring(engine, names[1]))
    if abort_first:
        engine.abort(names[0])
        engine.step()
        engine.poison(free_blocks_of(engine))
    engine.run()
    again = engine.answers[names[1]]
    assert [len(record["cells"]) for record in again.records] == [1]
    assert np.array_equal(again.kv, own_two.kv)
    assert again.tokens == own_two.tokens
    if not abort_first:
        assert engine.answers[names[0]].tokens == own_one.tokens


def restoring(engine, name):
    """Whether a request's restoration has begun; what it copies is copied in the same step."""
    return engine.side.restorations.restoring(engine.internal_ids[name])


def free_blocks_of(engine):
    pool = engine.scheduler.kv_cache_manager.block_pool
    return [block.block_id for block in pool.blocks if block.ref_cnt == 0 and not block.is_null]


def test_the_one_that_was_waited_for_is_aborted(engine):
    engine.configure(policy="load")
    prompt = tokens(4 * CHUNK, seed=55)
    one, two = [*prompt, *tokens(30, seed=56)], [*prompt, *tokens(33, seed=57)]
    own = engine.own(two).tokens
    engine.saved(one)
    engine.set_rate(2e6)
    names = [engine.submit(one), engine.submit(two)]
    for _ in range(3):
        engine.step()
    engine.abort(names[0])
    engine.set_rate(1e8)
    engine.run()
    assert engine.answers[names[1]].tokens == own
    assert engine.answers[names[1]].record["end"] == 4 * CHUNK


def test_a_prompt_that_diverges_gets_what_is_shared(engine):
    engine.configure(policy="cake")
    prompt = tokens(4 * CHUNK + 20, seed=60)
    engine.saved(prompt)
    other = [*prompt[: 2 * CHUNK + 100], *tokens(2 * CHUNK, seed=61)]
    own = engine.own(other)
    again = engine.ask(other)
    assert (again.record["start"], again.record["end"]) == (0, 2 * CHUNK)
    assert again.tokens == own.tokens


def test_a_prompt_shorter_than_a_chunk_is_neither_saved_nor_restored(engine):
    prompt = tokens(CHUNK - 1, seed=70)
    before = engine.store.stats().num_objects
    own = engine.saved(prompt, num_tokens=1)
    assert engine.store.stats().num_objects == before
    again = engine.ask(prompt, num_tokens=1)
    assert again.records == []
    assert again.tokens == own.tokens


@pytest.mark.parametrize(("extra", "restored"), [(-1, 2), (0, 2), (1, 3), (128, 3)])
def test_a_prompt_around_a_whole_number_of_chunks(engine, extra, restored):
    """The last token is always computed, for its logits."""
    prompt = tokens(3 * CHUNK + extra, seed=80 + extra)
    own = engine.saved(prompt)
    again = engine.ask(prompt)
    assert again.record["end"] == restored * CHUNK
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv) == (extra != 0) or close(engine, again.kv, own.kv)


def test_a_prompt_of_which_all_is_cached_but_the_last_chunk_is_computed(engine):
    prompt = tokens(3 * CHUNK, seed=85)
    own = engine.saved(prompt)
    engine.ask(prompt[: 2 * CHUNK + 1], params={"cacheflow": "off"}, num_tokens=1)
    again = engine.ask(prompt)
    assert again.records == []
    assert again.tokens == own.tokens


# What a request asks for is answered by the scheduler's side, whatever runs the model.


@first_runner
def test_what_a_request_may_ask_for(engine):
    engine.configure(policy="cake")
    prompt = tokens(4 * CHUNK + 9, seed=90)
    own = engine.saved(prompt)
    expected = {
        "auto": ({}, 4),
        "off": ({"cacheflow": "off"}, 0),
        "recompute": ({"cacheflow": "recompute"}, 0),
        "load": ({"cacheflow": "load"}, 4),
        "two chunks": ({"max_load_tokens": 2 * CHUNK + 5}, 2),
        "none": ({"max_load_tokens": 0}, 0),
    }
    for name, (params, num_chunks) in expected.items():
        again = engine.ask(prompt, params=params)
        assert sum(len(record["cells"]) for record in again.records) == num_chunks, name
        assert again.tokens == own.tokens, name
        assert "cacheflow_error" not in again.params
        engine.evict()
    again = engine.ask(prompt, params={"cacheflow": "load"})
    assert again.record["recomputed_cells"] == 0


@first_runner
def test_max_load_tokens_counts_what_is_loaded_not_what_was_there(engine):
    prompt = tokens(5 * CHUNK + 9, seed=95)
    own = engine.saved(prompt)
    engine.ask(prompt[: 2 * CHUNK + 1], params={"cacheflow": "off"}, num_tokens=1)
    again = engine.ask(prompt, params={"max_load_tokens": 2 * CHUNK})
    assert (again.record["start"], again.record["end"]) == (2 * CHUNK, 4 * CHUNK)
    assert again.tokens == own.tokens


@first_runner
def test_off_saves_nothing_and_recompute_saves(engine):
    prompt = tokens(2 * CHUNK + 9, seed=100)
    engine.own(prompt)
    assert engine.ask(prompt, params={"cacheflow": "off"}, num_tokens=2).records == []
    engine.evict()
    assert engine.ask(prompt, num_tokens=2).records == []
    engine.evict()
    assert engine.ask(prompt, num_tokens=2).record["end"] == 2 * CHUNK


@first_runner
def test_what_a_request_asks_wrongly_is_answered(engine):
    prompt = tokens(CHUNK + 9, seed=110)
    own = engine.own(prompt)
    again = engine.ask(prompt, params={"cacheflow": "fast", "max_load_tokens": "many", "explain": 3})
    assert again.tokens == own.tokens
    error = again.params["cacheflow_error"]
    for part in ("'fast'", "auto, load, recompute, off", "'many'", "explain is 3"):
        assert part in error


@first_runner
@pytest.mark.parametrize("mode", [["load"], {"a": 1}, 7, None])
def test_parameters_of_any_type_do_not_hurt_the_engine(engine, mode):
    """They come from the network as JSON."""
    prompt = tokens(CHUNK + 9, seed=111)
    again = engine.ask(prompt, params={"cacheflow": mode, "max_load_tokens": [1], "explain": "yes"}, num_tokens=2)
    assert again.finish_reason == "length"
    assert "max_load_tokens" in again.params["cacheflow_error"]


@first_runner
def test_a_salt_keeps_tenants_apart(engine):
    prompt = tokens(3 * CHUNK + 9, seed=120)
    own = engine.saved(prompt, salt="one")
    found = {}
    for salt in ("two", None, "", "one"):
        again = engine.ask(prompt, salt=salt or None, params={"cacheflow": "load"})
        found[salt] = len(again.records)
        assert again.tokens == own.tokens
        engine.evict()
    assert found == {"two": 0, None: 0, "": 1, "one": 1}  # the request before it, without salt, has saved
