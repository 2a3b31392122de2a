"""What library users hand in wrongly is refused at the door, by name; nothing is changed, nothing computed."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import CacheFlowError, ConfigError, PromptError

pytestmark = pytest.mark.torch

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def store():
    from cacheflow.stores.memory import MemoryStore

    with MemoryStore(capacity_bytes=1 << 28) as opened:
        yield opened


@pytest.fixture
def engine(store):
    from support.embedded_cases import make_engine, tiny

    return make_engine(tiny(), store)


TOKENS = {
    "text": ("abc", "tokens"),
    "texts": (["1", "2"], "tokens"),
    "none": (None, "tokens"),
    "number": (5, "tokens"),
    "none inside": ([1, None], "tokens"),
    "floats": ([1.0, 2.0], "tokens"),
    "nan": ([NAN], "tokens"),
    "booleans": ([True, False], "True or False"),
    "a boolean": ([5, True], "True or False"),
    "ragged": ([[1], [1, 2]], "tokens must be token ids, got a list"),
    "nested": ([[1, 2]], "one-dimensional"),
    "set": ({1, 2}, "tokens"),
    "generator": ((each for each in (1, 2)), "tokens"),
    "huge": ([10**400], "tokens"),
    "64 bits": ([2**64 - 1], "63 bits"),
    "object": (object(), "tokens"),
}


@pytest.mark.parametrize(("tokens", "message"), TOKENS.values(), ids=list(TOKENS))
def test_tokens_that_are_none(engine, tokens, message):
    session = engine.session()
    with pytest.raises(PromptError, match=message):
        session.generate(tokens, max_new_tokens=1)
    with engine.concurrent() as batch, pytest.raises(PromptError, match=message):
        batch.submit(session, tokens, max_new_tokens=1)
    assert session.tokens == []
    assert session.resident_tokens == 0


@pytest.mark.parametrize("tokens", [np.array([1, 2, 3]), np.array([1, 2, 3], dtype=np.uint8), (1, 2, 3), range(1, 4)])
def test_tokens_of_every_kind_are_one_prompt(engine, tokens):
    session = engine.session()
    session.generate(tokens, max_new_tokens=np.int64(1), stop_tokens=[np.int32(7)])
    assert session.tokens[:3] == [1, 2, 3]


HISTORIES = {"none": None, "number": 5, "text": "abc", "floats": [1.5], "outside": [1, 10**6], "endless": [1] * 100_000}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=list(HISTORIES))
def test_a_history_that_is_none(engine, history):
    with pytest.raises(PromptError):
        engine.session(history=history)


ARGUMENTS = {
    "count of text": ({"max_new_tokens": "5"}, "max_new_tokens is '5', must be a whole number"),
    "no count": ({"max_new_tokens": None}, "max_new_tokens is None"),
    "half a token": ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    "count nan": ({"max_new_tokens": NAN}, "max_new_tokens is nan"),
    "count true": ({"max_new_tokens": True}, "max_new_tokens is True"),
    "no token": ({"max_new_tokens": 0}, "1 or more are needed"),
    "fewer than none": ({"max_new_tokens": np.int64(-3)}, "1 or more are needed"),
    "endless": ({"max_new_tokens": 10**400}, "exceeds the model's"),
    "sampling text": ({"sampling": "greedy"}, "sampling is 'greedy', must be a Sampling"),
    "sampling table": ({"sampling": {"temperature": 1}}, "sampling is"),
    "no stop tokens": ({"stop_tokens": None}, "stop_tokens is None"),
    "stop token": ({"stop_tokens": 5}, "stop_tokens is 5"),
    "stop text": ({"stop_tokens": "abc"}, "stop_tokens is 'abc'"),
    "stop texts": ({"stop_tokens": ["a"]}, "stop_tokens is 'a'"),
    "stop floats": ({"stop_tokens": [2.0]}, "stop_tokens is 2.0"),
    "stop booleans": ({"stop_tokens": {True}}, "stop_tokens is True"),
    "save text": ({"save": "no"}, "save is 'no', must be True or False"),
    "save none": ({"save": None}, "save is None"),
    "save number": ({"save": 1}, "save is 1"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_arguments_of_the_wrong_kind(engine, store, arguments, message):
    session, asked = engine.session(), {"max_new_tokens": 2} | arguments
    with pytest.raises(CacheFlowError, match=message):
        session.generate([1, 2, 3], **asked)
    with engine.concurrent() as batch:
        with pytest.raises(CacheFlowError, match=message):
            batch.submit(session, [1, 2, 3], **asked)
        good = batch.submit(session, [1, 2, 3], max_new_tokens=2, save=False)  # the session is not taken for busy
    assert len(good.result(0).tokens) == 2
    assert store.stats().num_objects == 0


@pytest.mark.parametrize("cancel", [True, "yes", 1, threading.Event])
def test_a_cancel_that_is_no_event(engine, cancel):
    session = engine.session(history=[1, 2, 3])
    for ask in (lambda: session.generate([4], max_new_tokens=1, cancel=cancel), lambda: session.warm(cancel=cancel)):
        with pytest.raises(ConfigError, match="cancel is"):
            ask()


def test_stop_tokens_that_can_be_read_once_stop_every_time(engine):
    first = engine.session().generate([1, 2, 3], max_new_tokens=6).tokens
    stopped = engine.session().generate([1, 2, 3], max_new_tokens=6, stop_tokens=iter([first[2]]))
    assert stopped.tokens == first[: first.index(first[2]) + 1]


@pytest.mark.parametrize("timeout_s", ["1", -1, NAN, True, [1]])
def test_waits_that_are_no_seconds(engine, timeout_s):
    session = engine.session()
    with engine.concurrent() as batch:
        ticket = batch.submit(session, [1, 2, 3], max_new_tokens=2)
        for wait in (ticket.result, ticket.first_token):
            with pytest.raises(ConfigError, match="timeout_s is"):
                wait(timeout_s)
    assert len(ticket.result(INF).tokens) == 2
    with pytest.raises(ConfigError, match="timeout_s is"):
        session.save(timeout_s=timeout_s)


@pytest.mark.parametrize("first_chunk", ["0", -1, 0.5, None, True])
def test_a_first_chunk_that_is_none(engine, first_chunk):
    session = engine.session()
    session.generate([1, 2, 3], max_new_tokens=1, save=False)
    with pytest.raises(ConfigError, match="first_chunk is"):
        session.save(first_chunk=first_chunk)


OPTIONS = {
    "starvation true": ({"starvation_s": True}, "starvation_s is True"),
    "budget huge": ({"recompute_budget_ms": 10**400}, "recompute_budget_ms is"),
    "budget below zero": ({"recompute_budget_ms": -1}, "recompute_budget_ms is -1"),
    "latency of text": ({"itl_slo_ms": "80"}, "itl_slo_ms is '80'"),
    "latency nan": ({"itl_slo_ms": NAN}, "itl_slo_ms is nan"),
    "half a token": ({"kv_capacity_tokens": 1.5}, "kv_capacity_tokens is 1.5, must be a whole number"),
    "room without end": ({"kv_capacity_tokens": INF}, "kv_capacity_tokens is inf"),
    "room true": ({"kv_capacity_tokens": True}, "kv_capacity_tokens is True"),
    "no room": ({"kv_capacity_tokens": 0}, "kv_capacity_tokens is 0"),
    "no objective": ({"objective": None}, "objective None is not one of"),
    "objectives": ({"objective": ["slo"]}, "objective"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=list(OPTIONS))
def test_options_of_a_batch(engine, options, message):
    with pytest.raises(ConfigError, match=message):
        engine.concurrent(**options)
    with engine.concurrent():
        pass


def test_numbers_of_numpy_are_numbers(engine):
    options = {"starvation_s": np.float32(3), "recompute_budget_ms": np.int64(5), "kv_capacity_tokens": np.int32(4096)}
    with engine.concurrent(objective="slo", **options) as batch:
        ticket = batch.submit(engine.session(), [1, 2, 3], max_new_tokens=np.int64(2), deadline_s=np.float32(5))
    assert len(ticket.result(0).tokens) == 2


@pytest.mark.parametrize("deadline_s", [True, 10**400, [1]])
def test_deadlines_that_are_none(engine, deadline_s):
    with engine.concurrent(objective="slo") as batch, pytest.raises(ConfigError, match="deadline_s is"):
        batch.submit(engine.session(), [1, 2, 3], max_new_tokens=2, deadline_s=deadline_s)


def test_a_turn_beside_an_open_batch_is_an_error(engine):
    session = engine.session()
    session.generate([1, 2, 3], max_new_tokens=2)
    session.evict()
    before = list(session.tokens)
    with engine.concurrent() as batch:
        assert engine.in_batch
        for compute in (lambda: session.generate([4], max_new_tokens=1), session.warm):
            with pytest.raises(ConfigError, match="open batch: submit the turn to it, or close the batch first"):
                compute()
        assert session.tokens == before
        assert len(batch.submit(session, [4], max_new_tokens=1).result().tokens) == 1
    assert not engine.in_batch
    assert len(session.generate([5], max_new_tokens=1).tokens) == 1


SAMPLINGS = {
    "hot text": ({"temperature": "1"}, "temperature is '1'"),
    "no temperature": ({"temperature": None}, "temperature is None"),
    "temperature nan": ({"temperature": NAN}, "temperature is nan"),
    "temperature true": ({"temperature": True}, "temperature is True"),
    "share of text": ({"top_p": "0.9"}, "top_p is '0.9'"),
    "seed text": ({"seed": "1"}, "seed is '1'"),
    "no seed": ({"seed": None}, "seed is None"),
    "seed of 400 digits": ({"seed": 10**400}, "seed is a number of 1329 bits"),
    "half a seed": ({"seed": 0.5}, "seed is 0.5"),
}


@pytest.mark.parametrize(("arguments", "message"), SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_samplings_that_are_none(arguments, message):
    from cacheflow.engine.sampling import Sampling

    with pytest.raises(ConfigError, match=message):
        Sampling(**arguments)


ENGINE_OPTIONS = {
    "chunk of text": ({"chunk_tokens": "512"}, "chunk_tokens is '512'"),
    "half a chunk": ({"chunk_tokens": 0.5}, "chunk_tokens is 0.5"),
    "layers true": ({"layers_per_block": True}, "layers_per_block is True"),
    "deadline of text": ({"lookup_deadline_s": "1"}, "lookup_deadline_s is '1'"),
    "save of text": ({"save_deadline_s": "1"}, "save_deadline_s is '1'"),
    "no policy": ({"policy": None}, "policy is of type NoneType, must be of str"),
    "crossover of text": ({"crossover_tokens": "1"}, "crossover_tokens is '1'"),
    "executor": ({"executor": {}}, "executor is of type dict, must be of ExecutorOptions"),
    "self test": ({"self_test": "no"}, "self_test is 'no', must be True or False"),
}


@pytest.mark.parametrize(("options", "message"), ENGINE_OPTIONS.values(), ids=list(ENGINE_OPTIONS))
def test_options_of_an_engine(options, message):
    from cacheflow.embedded import EngineOptions

    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


PARTS = {
    "store": (7, "store is of type int, must be of Store: open_store"),
    "costs": (None, "costs is of type NoneType, must be of CostTable: load_profile"),
    "link": (1e9, "link is of type float, must be of LinkCost"),
    "options": ({}, "options is of type dict, must be of EngineOptions"),
}


@pytest.mark.parametrize(("part", "value", "message"), [(part, *case) for part, case in PARTS.items()], ids=list(PARTS))
def test_an_engine_of_wrong_parts(engine, part, value, message):
    from cacheflow.embedded import Engine

    parts = {key: getattr(engine, key) for key in ("store", "costs", "link", "options")} | {part: value}
    with pytest.raises(ConfigError, match=message):
        Engine(engine.model, **parts)
    if part != "options":
        with pytest.raises(ConfigError, match=message):
            Engine.open("smollm2-135m", **parts)


BY_URL = {
    "no url": ({"store": "kv", "capacity_bytes": 1 << 20}, "store is 'kv', must be a URL"),
    "no bound": ({"store": "memory"}, "capacity_bytes is None: it is the bound on the store that a URL names"),
    "a bound of nothing": ({"store": "memory", "capacity_bytes": 0}, "capacity_bytes is 0"),
    "two bounds": ({"capacity_bytes": 1 << 20}, "a store that is open has its own"),
    "no costs": ({"store": "memory", "capacity_bytes": 1 << 20, "costs": None}, "costs is of type NoneType"),
}


@pytest.mark.parametrize(("changed", "message"), BY_URL.values(), ids=list(BY_URL))
def test_an_engine_of_no_url(engine, changed, message):
    from cacheflow.embedded import Engine

    parts = {key: getattr(engine, key) for key in ("store", "costs", "link")} | changed
    with pytest.raises(ConfigError, match=message):
        Engine.open("smollm2-135m", **parts)


def test_an_engine_of_no_model(engine):
    from cacheflow.embedded import Engine

    parts = {"store": engine.store, "costs": engine.costs, "link": engine.link}
    with pytest.raises(ConfigError, match=r"model is of type str, must be of LoadedModel: Engine\.open takes a folder"):
        Engine("smollm2-135m", **parts)
    for model in (None, 5):
        with pytest.raises(ConfigError, match=f"model is {model}, must be a folder or a name"):
            Engine.open(model, **parts)


def test_the_options_of_these_tests_can_be_had(engine):
    from cacheflow.embedded import EngineOptions

    assert replace(EngineOptions(), chunk_tokens=np.int64(64)).chunk_tokens == 64
