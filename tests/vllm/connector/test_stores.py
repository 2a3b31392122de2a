"""Stores that a vLLM engine is given by their URL: what one engine saved the next restores, and the store may die."""

import shutil
import signal
from contextlib import ExitStack

import numpy as np
import pytest

from cacheflow.stores.shm import shm_folder
from cacheflow.stores.url import StoreUrl
from cacheflow.types import LoadOutcome
from support.servers import new_bucket_url, running_redis, running_s3
from support.store_kinds import shm_url

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
LAYERS = 4
NUM_CHUNKS = 6
SLOW = 2e5
"""Bytes per second at which a restoration takes seconds: time to strike in the middle of it."""


@pytest.fixture(params=["redis", "redis that hangs", "s3", "shm"])
def store(request, tmp_path, s3_environment):
    """The URL of an empty store, and what makes an end of the store."""
    with ExitStack() as stack:
        if request.param.startswith("redis"):
            server = stack.enter_context(running_redis(tmp_path))
            blow = signal.SIGSTOP if "hangs" in request.param else signal.SIGKILL
            yield f"{server.url}?timeout_s=1", lambda: server.process.send_signal(blow)
        elif request.param == "s3":
            server = stack.enter_context(running_s3())
            yield f"{new_bucket_url(server.endpoint)}&timeout_s=5", server.process.kill
        else:
            url = shm_url(request)
            yield f"{url}?keep=yes", lambda: shutil.rmtree(shm_folder(StoreUrl.parse(url).host))


def tokens(seed):
    from support.connector_engine import random_tokens

    return random_tokens(NUM_CHUNKS * CHUNK + 21, seed=seed)


def test_the_next_engine_restores_and_outlives_the_store(llama, store):
    """Equal tokens and KV from the store, half from it, and without it."""
    engine, (url, end_of_store) = llama, store
    options = {"store": url, "policy": "load", "throttle_bytes_per_s": 1e9}
    prompts = [tokens(seed) for seed in range(3)]
    engine.restart(options)
    own = [engine.saved(prompt) for prompt in prompts]

    engine.restart(options)
    for policy in ("load", "cacheflow"):
        engine.configure(policy=policy)
        engine.balance_link(len(prompts[0]), ratio=0.2 if policy == "load" else 1.0)
        again = engine.ask(prompts[0])
        assert again.record["outcome"] == "done"
        assert again.record["end"] == NUM_CHUNKS * CHUNK
        assert again.record["loaded_cells"] > 0
        assert again.tokens == own[0].tokens
        assert np.array_equal(again.kv, own[0].kv)
    engine.configure(policy="load", lookup_timeout_s=1.0)
    engine.evict()
    engine.set_rate(SLOW)
    reads_before = num_reads(engine, LoadOutcome.OK)
    name = engine.submit(prompts[1])
    engine.run(until=lambda: num_reads(engine, LoadOutcome.OK) > reads_before + 2)
    assert engine.answers[name].tokens == []
    end_of_store()
    engine.run()
    assert sum(engine.answers[name].record["failed_loads"].values()) > 0
    assert engine.answers[name].tokens == own[1].tokens
    assert np.array_equal(engine.answers[name].kv, own[1].kv)
    engine.evict()
    assert engine.ask(prompts[2]).tokens == own[2].tokens
    assert engine.ask(tokens(seed=7)).finish_reason == "length"


def num_reads(engine, outcome):
    return engine.throttled.stats().get_outcomes[outcome]
