"""A vLLM engine over a file and memory: what comes next is in memory before it is asked for."""

from collections import Counter

import numpy as np
import pytest

from cacheflow.stores.base import PrefetchOutcome
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import key_of
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
LAYERS = 4
NUM_CHUNKS = 6
TIMEOUT_S = 20.0
ALL = NUM_CHUNKS * LAYERS


@pytest.fixture(scope="module")
def started(llama, tmp_path_factory):
    """Two requests run at once; tiers that tests can look into."""

    def open_tiers(options):
        file = FileStore(tmp_path_factory.mktemp("kv"), capacity_bytes=1 << 30, fsync=False)
        return TieredStore({"memory": MemoryStore(capacity_bytes=options.cpu_bytes_to_use), "file": file})

    options = {"policy": "load", "cpu_bytes_to_use": 64 << 20, "keep_tool_s": 600.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacheflow.vllm.startup.open_store.open_store", open_tiers)
        patch.setattr(llama.scheduler, "max_num_active_reqs", 2)
        llama.restart(options)
        for tier in llama.store.tiers:  # measured a moment ago, perhaps on a machine that was idle then
            tier.promise(bytes_per_s=1e6, latency_s=1e-3)
        yield llama


@pytest.fixture
def engine(started):
    started.evict()
    started.worker.counts.take()
    yield started
    started.run()


def tokens(seed, count=NUM_CHUNKS * CHUNK + 21):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


def only_in_file(engine):
    """Everything that was saved leaves memory, as if others had thrown it out."""
    assert engine.store.drain(TIMEOUT_S)
    memory = engine.store.tiers[0].store
    keys = [key_of(name) for name in memory._index.sizes()]  # noqa: SLF001 -- there is no list of what a store holds
    memory.unpin(keys)
    memory.delete(keys)
    assert memory.stats().num_objects == 0


def prefetched(engine):
    return engine.store.stats().prefetches[PrefetchOutcome.FETCHED]


def num_read(engine):
    return [tier.store.get_outcomes[LoadOutcome.OK] for tier in engine.store.stats().tiers]


def asked(engine, prompt, **wishes):
    """The answer, and how many objects it read from memory and from the file."""
    before = num_read(engine)
    answer = engine.ask(prompt, **wishes)
    return answer, [after - earlier for after, earlier in zip(num_read(engine), before, strict=True)]


def until_prefetched(engine, num_objects):
    """Step a request that does nothing else until so many were brought: workers hear what is due in a step."""
    name = engine.submit(tokens(99, 40), num_tokens=500, params={"cacheflow": "off"})
    eventually(lambda: engine.step() or prefetched(engine) >= num_objects)
    engine.abort(name)
    engine.run()


def test_what_was_announced_comes_from_memory_and_answers_as_without(engine):
    prompt = tokens(1)
    own = engine.own(prompt)
    saved = engine.saved(prompt)
    only_in_file(engine)
    slow, from_tiers = asked(engine, prompt)
    assert from_tiers[1] == ALL, "or there would be nothing to gain"
    engine.evict()
    only_in_file(engine)
    before = prefetched(engine)
    announcing = engine.ask(tokens(2, 40), params={"prefetch": [prompt], "cacheflow": "off"})
    assert "cacheflow_error" not in (announcing.params or {})
    until_prefetched(engine, before + ALL)
    engine.evict()
    again, from_tiers = asked(engine, prompt)
    assert from_tiers == [ALL, 0]
    assert again.record["outcome"] == "done"
    assert again.tokens == own.tokens == saved.tokens == slow.tokens
    assert np.array_equal(again.kv, saved.kv)
    assert engine.store.stats().prefetches[PrefetchOutcome.USED] >= ALL


def test_it_is_pinned_until_the_request_that_was_announced_has_ended(engine):
    prompt = tokens(3)
    engine.saved(prompt)
    only_in_file(engine)
    before = prefetched(engine)
    engine.ask(tokens(4, 40), params={"prefetch": [prompt], "cacheflow": "off"})
    until_prefetched(engine, before + ALL)
    stats = [tier.store for tier in engine.store.tiers]
    eventually(lambda: all(tier.stats().pinned_bytes > 0 for tier in stats))
    sizes = [tier.stats().pinned_bytes for tier in stats]
    assert sizes[0] == sizes[1], "all of it, in both"
    engine.ask(prompt)
    engine.step()
    eventually(lambda: all(tier.stats().pinned_bytes == 0 for tier in stats))


def test_a_request_that_queues_is_brought_while_others_run(engine):
    prompt, busy = tokens(5), [tokens(6, 40), tokens(7, 40)]
    saved = engine.saved(prompt)
    only_in_file(engine)
    before, read = prefetched(engine), num_read(engine)
    running = [engine.submit(each, num_tokens=1500, params={"cacheflow": "off"}) for each in busy]
    engine.step()
    queued = engine.submit(prompt)
    eventually(lambda: engine.step() or prefetched(engine) >= before + ALL)
    assert not engine.answers[queued].tokens
    assert all(engine.answers[name].finish_reason is None for name in running), "they were running all the time"
    by_prefetch = num_read(engine)[1] - read[1]
    assert by_prefetch == ALL
    for name in running:
        engine.abort(name)
    engine.run()
    answer = engine.answers[queued]
    assert num_read(engine)[1] - read[1] == by_prefetch, "none of it was read from the file again"
    assert num_read(engine)[0] - read[0] == ALL
    assert answer.record["outcome"] == "done"
    assert answer.tokens == saved.tokens
    assert np.array_equal(answer.kv, saved.kv)


def test_a_tenant_cannot_announce_what_is_anothers(engine):
    prompt = tokens(8)
    engine.saved(prompt, salt="theirs")
    only_in_file(engine)
    before, questions = engine.store.stats(), []
    contains = engine.store.tiers[1].store.contains
    with pytest.MonkeyPatch.context() as patch:

        def noting(keys):
            found = contains(keys)
            questions.append((len(keys), sum(found)))
            return found

        patch.setattr(engine.store.tiers[1].store, "contains", noting)
        answers, asked_of_file = [], []
        for announced in (prompt, tokens(9)):
            questions.clear()
            params = {"prefetch": [announced], "explain": True}
            answers.append(engine.ask(tokens(10, 40), num_tokens=20, salt="ours", params=params).params)
            asked_of_file.append(list(questions))
            engine.evict()
    assert answers[0] == answers[1]
    assert asked_of_file[0] == asked_of_file[1]
    assert asked_of_file[0], "it was looked up"
    assert not any(found for _, found in asked_of_file[0])
    after = engine.store.stats()
    assert after.prefetches == before.prefetches
    assert [tier.store.pinned_bytes for tier in after.tiers] == [0, 0]
    before = prefetched(engine)
    engine.ask(tokens(10, 40), salt="theirs", params={"prefetch": [prompt]})
    until_prefetched(engine, before + ALL)  # or this could not fail


def test_what_is_announced_wrongly_is_answered(engine):
    answer = engine.ask(tokens(11, 40), num_tokens=2, params={"prefetch": ["text"]})
    assert answer.finish_reason == "length"
    assert "prefetch is ['text'], must be a list of lists of token ids" in answer.params["cacheflow_error"]


def test_what_became_of_it_is_counted(engine):
    prompt = tokens(12)
    engine.saved(prompt)
    only_in_file(engine)
    counted, take = Counter(), engine.worker_connector.get_kv_connector_stats
    take()

    def noting():  # vLLM asks in every step
        stats = take()
        counted.update({} if stats is None else stats.data.get("prefetched", {}))
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.worker_connector, "get_kv_connector_stats", noting)
        before = prefetched(engine)
        engine.ask(tokens(13, 40), params={"prefetch": [prompt], "cacheflow": "off"})
        until_prefetched(engine, before + ALL)
        noting()
        assert counted == {"fetched": ALL}
        engine.ask(prompt)
        noting()
        assert counted == {"fetched": ALL, "used": ALL}
