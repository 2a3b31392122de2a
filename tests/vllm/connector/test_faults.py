"""Stores and workers that fail: the answer stays vLLM's own, nothing hangs, nothing is lost of the KV cache."""

import threading
from contextlib import ExitStack

import numpy as np
import pytest

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.faults import Fault, FaultRule
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKind
from cacheflow.types import LoadOutcome
from support.damage import DAMAGES
from support.faulty_store import faulty_store, inject
from support.patience import no_late_reads

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128
LAYERS = 4
NUM_CHUNKS = 6
SAVER_THREAD = "cacheflow-save"
READ_FAULTS = [Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.LATE, Fault.HANG]


@pytest.fixture(scope="module")
def started(llama):
    options = {"throttle_bytes_per_s": 1e8, "policy": "cake"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacheflow.vllm.startup.open_store.open_store", faulty_store)
        llama.restart(options)
    return llama


@pytest.fixture
def engine(started):
    """The engine with nothing cached, a fast link, and no faults."""
    started.evict()
    started.set_rate(1e8)
    free_blocks = started.free_blocks
    yield started
    inject(started)
    started.run()
    started.evict()
    assert started.free_blocks == free_blocks


def tokens(count=NUM_CHUNKS * CHUNK + 21, seed=1):
    from support.connector_engine import random_tokens

    return random_tokens(count, seed=seed)


@pytest.mark.parametrize("policy", ["cake", "load", "cacheflow_v1"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("fault", READ_FAULTS)
def test_reads_that_fail(engine, fault, every, policy):
    engine.configure(policy=policy)
    prompt = tokens()
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    inject(engine, FaultRule(fault=fault, every=every))
    again = engine.ask(prompt)
    assert engine.store.inner.injected()[fault] > 0
    assert again.tokens == own.tokens
    assert again.record["outcome"] == "done"
    assert again.record["end"] == NUM_CHUNKS * CHUNK
    if policy == "load" or every == 1:
        assert sum(again.record["failed_loads"].values()) > 0


def test_a_damaged_object_is_written_anew(engine):
    """In a middle layer: neither the lookup nor a save looks there first. The damage shows once, then it is mended."""
    engine.configure(policy="load")
    prompt = tokens(seed=2)
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=0.1)
    key = key_of(engine, prompt, chunk=1, layer=2)
    written = engine.store.stats().put_outcomes[PutOutcome.STORED]
    inject(engine, FaultRule(fault=Fault.CORRUPT, matches=lambda each: each == key, limit=1))
    damaged = engine.ask(prompt)
    assert damaged.record["failed_loads"]["corrupt"] == 1
    assert damaged.record["repaired_cells"] > 0
    engine.evict()
    assert engine.store.stats().put_outcomes[PutOutcome.STORED] > written
    healed = engine.ask(prompt)
    assert set(healed.record["failed_loads"]) <= {"cancelled"}
    assert healed.record["loaded_cells"] == NUM_CHUNKS * LAYERS
    assert own.tokens == damaged.tokens == healed.tokens


def key_of(engine, prompt, *, chunk, layer):
    from cacheflow.stores.keys import RankKeys, chain_hashes

    hashes = chain_hashes(prompt, list(range(CHUNK, (chunk + 1) * CHUNK + 1, CHUNK)))
    return RankKeys().kv(engine.side.identity.namespace(None), hashes[chunk].hex(), (layer, layer + 1))


def test_objects_that_were_evicted_between_lookup_and_read(engine):
    engine.configure(policy="load")
    prompt = tokens(seed=3)
    own = engine.saved(prompt)
    lost = [key_of(engine, prompt, chunk=chunk, layer=1) for chunk in range(NUM_CHUNKS)]
    assert engine.store.delete(lost) == NUM_CHUNKS
    again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert again.record["failed_loads"]["miss"] > 0


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_store_that_cannot_be_asked(engine, monkeypatch, how):
    engine.configure(policy="load", lookup_timeout_s=0.05)
    prompt = tokens(seed=4)
    own = engine.saved(prompt)
    release = threading.Event()

    def contains(keys):
        if how == "raises":
            raise RuntimeError("a bug in a store")
        release.wait(30.0)
        return (False,) * len(keys)

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "contains", contains)
        again = engine.ask(prompt)
        assert again.tokens == own.tokens
        assert again.records == []
        release.set()
    engine.evict()
    engine.configure(lookup_timeout_s=20.0)
    assert engine.ask(prompt).record["end"] == NUM_CHUNKS * CHUNK


def test_a_store_that_hangs_where_saves_ask_it_holds_no_step_up(engine, monkeypatch):
    prompt = tokens(seed=14)
    own = engine.own(prompt)
    go_on, asking, contains = threading.Event(), threading.Event(), engine.store.contains

    def hanging(keys):
        if threading.current_thread().name == SAVER_THREAD:
            asking.set()
            go_on.wait(30.0)
        return contains(keys)

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "contains", hanging)
        again = engine.ask(prompt, params={"cacheflow": "recompute"})
        assert asking.wait(10.0)
        assert not go_on.is_set()
        assert again.tokens == own.tokens
        assert not engine.worker.saver.wait(0.1)
        go_on.set()
        engine.settle()
    engine.evict()
    assert engine.ask(prompt).record["end"] == NUM_CHUNKS * CHUNK


def test_saves_that_fail(engine):
    prompt = tokens(seed=5)
    inject(engine, FaultRule(fault=Fault.PUT_ERROR, every=2))
    own = engine.saved(prompt)
    inject(engine)
    again = engine.ask(prompt)
    assert again.tokens == own.tokens
    engine.evict()
    assert engine.ask(prompt).record["end"] == NUM_CHUNKS * CHUNK


def failing(port, *, first, times):
    """``port.recompute`` that raises from its ``first`` call on, so many times."""
    calls, recompute = [], port.recompute

    def instead(self, tile, *, kv_only_top):
        calls.append(tile)
        if first <= len(calls) < first + times:
            raise RuntimeError("an injected failure of compute")
        recompute(self, tile, kv_only_top=kv_only_top)

    return instead, calls


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("times", [1, 1000])
def test_compute_that_fails_leaves_the_rest_to_vllm(engine, monkeypatch, first, times):
    from cacheflow.vllm.worker.recompute import VllmComputePort

    engine.configure(policy="cake")
    prompt = tokens(seed=6)
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=2.0)
    with monkeypatch.context() as patch:
        instead, calls = failing(VllmComputePort, first=first, times=times)
        patch.setattr(VllmComputePort, "recompute", instead)
        again = engine.ask(prompt)
        assert len(calls) >= first
    assert again.tokens == own.tokens
    assert again.record["outcome"] == "failed"
    assert "an injected failure of compute" in again.record["error"]
    assert again.record["recomputed_cells"] < NUM_CHUNKS * LAYERS
    assert "an injected failure of compute" in again.params["cacheflow_reason"]
    engine.evict()
    assert engine.ask(prompt).record["outcome"] == "done"


def test_compute_that_fails_at_the_very_end(engine, monkeypatch):
    """On a device that reports late nobody knows which of the cells are good."""
    from cacheflow.vllm.worker.recompute import VllmComputePort

    engine.configure(policy="cake")
    prompt = tokens(seed=7)
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=2.0)

    def finish(self):
        engine.poison(self._target.block_ids)
        raise RuntimeError("an injected failure of the device")

    with monkeypatch.context() as patch:
        patch.setattr(VllmComputePort, "finish", finish)
        again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert "an injected failure of the device" in again.params["cacheflow_reason"]
    assert again.record["outcome"] == "failed"


def test_ports_that_cannot_be_made(engine, monkeypatch):
    engine.configure(policy="cake")
    prompt = tokens(seed=8)
    own = engine.saved(prompt)

    def refuse(*args, **kwargs):
        raise RuntimeError("an injected failure at the start")

    with monkeypatch.context() as patch:
        patch.setattr("cacheflow.vllm.worker.side.VllmTransferPort", refuse)
        again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert "an injected failure at the start" in again.params["cacheflow_reason"]
    assert again.record["outcome"] == "failed"


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("fault", READ_FAULTS)
def test_an_engine_that_only_loads_gives_the_rest_to_vllm(engine, monkeypatch, fault, every):
    with monkeypatch.context() as patch:
        patch.setattr("cacheflow.vllm.models.model_access.configured_refusals", lambda *_: ["for the test"])
        engine.configure(unsupported_models="load_only", policy="cacheflow")
    prompt = tokens(seed=9)
    own = engine.saved(prompt)
    with no_late_reads():
        again = engine.ask(prompt)
    assert again.record["loaded_cells"] == NUM_CHUNKS * LAYERS
    assert again.tokens == own.tokens
    engine.evict()
    inject(engine, FaultRule(fault=fault, every=every))
    again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert "failed" in again.params["cacheflow_reason"]
    assert again.record["outcome"] == "failed"
    assert again.record["loaded_cells"] < NUM_CHUNKS * LAYERS
    inject(engine)
    engine.configure(unsupported_models="refuse", policy="cake")


def test_a_restoration_that_takes_too_long_is_recomputed(engine):
    engine.configure(policy="load", restore_timeout_s=0.3)
    prompt = tokens(seed=10)
    own = engine.saved(prompt)
    engine.set_rate(3e5)
    again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert again.record["recomputed_cells"] > 0
    engine.configure(restore_timeout_s=60.0)


def test_a_restoration_that_may_not_compute_beside_others_ends_all_the_same(engine):
    """No time per step is left for recomputation, and the link is down: somebody who waits for ever is worse."""
    engine.configure(policy="cake", restore_timeout_s=0.3, itl_slo_ms=0.01)
    prompt = tokens(seed=11)
    own = engine.saved(prompt)
    other = engine.submit(tokens(40, seed=12), num_tokens=1500)
    for _ in range(5):
        engine.step()
    inject(engine, FaultRule(fault=Fault.ERROR))
    name = engine.submit(prompt)
    engine.run(until=lambda: engine.answers[name].finish_reason is not None)
    assert engine.answers[other].finish_reason is None
    assert engine.answers[name].tokens == own.tokens
    engine.abort(other)
    engine.run()
    engine.configure(restore_timeout_s=60.0, itl_slo_ms=None)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 8, 13])
def test_an_abort_in_the_middle_frees_everything(engine, num_steps):
    engine.configure(policy="cake")
    prompt = tokens(seed=13)
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=2.0)
    free_blocks = engine.free_blocks
    name = engine.submit(prompt)
    for _ in range(num_steps):
        engine.step()
    engine.abort(name)
    engine.run()
    assert engine.free_blocks == free_blocks
    assert not engine.side.has_work
    assert engine.side.requests == {}
    engine.evict()
    again = engine.ask(prompt)
    assert again.record["outcome"] == "done"
    assert again.tokens == own.tokens


def test_an_abort_while_others_go_on(engine):
    """The blocks of the aborted one go to others: nothing of it may be written into them any more."""
    engine.configure(policy="load")
    prompts = [tokens(seed=20 + n) for n in range(3)]
    own = [engine.saved(prompt).tokens for prompt in prompts]
    fresh = tokens(8 * CHUNK, seed=25)
    expected = engine.own(fresh).tokens
    engine.set_rate(4e6)
    names = [engine.submit(prompt) for prompt in prompts]
    for _ in range(4):
        engine.step()
    engine.abort(names[1])
    last = engine.submit(fresh)
    engine.run()
    assert [engine.answers[name].tokens for name in (names[0], names[2])] == [own[0], own[2]]
    assert engine.answers[last].tokens == expected


def test_a_hanging_read_does_not_hold_up_an_abort(engine):
    engine.configure(policy="load")
    prompt = tokens(seed=30)
    engine.saved(prompt)
    free_blocks = engine.free_blocks
    inject(engine, FaultRule(fault=Fault.HANG))
    name = engine.submit(prompt)
    for _ in range(3):
        engine.step()
    engine.abort(name)
    for _ in range(3):
        engine.step()
    assert engine.free_blocks == free_blocks


# What the rules above lack: damage to the very bytes, a store that is half out, slow, or comes and goes; in memory and
# in files, under the same engine.


def of_layer_1(key):
    return key.kind is ObjectKind.KV and key.layer_lo == 1


@pytest.fixture(params=["memory", "file"])
def inner(engine, request, tmp_path, monkeypatch):
    """The store behind the one that fails, which is the engine's own or, for this test, one in a folder."""
    with ExitStack() as stack:
        if request.param == "file":
            files = stack.enter_context(FileStore(tmp_path / "store", capacity_bytes=1 << 28, fsync=False))
            monkeypatch.setattr(engine.store.inner, "inner", files)
        yield engine.store.inner.inner
        engine.settle()


@pytest.mark.parametrize("policy", ["load", "cake", "cacheflow"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_records_damaged_in_the_store(engine, inner, damage, policy):
    engine.configure(policy=policy)
    prompt = tokens(seed=40)
    own = engine.saved(prompt)
    for chunk in range(1, NUM_CHUNKS, 2):
        mine, other = (key_of(engine, prompt, chunk=chunk, layer=layer) for layer in (1, 2))
        DAMAGES[damage](inner, mine, other)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)
    assert again.record["end"] == NUM_CHUNKS * CHUNK
    if policy == "load":
        assert again.record["failed_loads"]["corrupt"] > 0  # of the others some may be recomputed before they are read
    assert inner.delete(keys_of(engine, prompt)) > 0


def keys_of(engine, prompt):
    return [key_of(engine, prompt, chunk=chunk, layer=layer) for chunk in range(NUM_CHUNKS) for layer in range(LAYERS)]


@pytest.mark.parametrize("policy", ["load", "cake", "cacheflow"])
@pytest.mark.parametrize("trouble", ["partial outage", "flapping", "slow"])
def test_a_store_that_is_half_out_or_flaps_or_crawls(engine, inner, trouble, policy):
    engine.configure(policy=policy)
    prompt = tokens(seed=41)
    own = engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    when = {"matches": of_layer_1} if trouble == "partial outage" else {"every": 5, "in_a_row": 3}
    if trouble == "slow":
        engine.throttled.set_bandwidth(engine.throttled.bytes_per_s / 10)  # and nobody was told
    else:
        inject(engine, *(FaultRule(fault=fault, **when) for fault in (Fault.ERROR, Fault.PUT_ERROR)))
    again = engine.ask(prompt)
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)
    assert again.record["end"] == NUM_CHUNKS * CHUNK
    if policy == "load" and trouble != "slow":
        assert again.record["failed_loads"]["error"] > 0
    assert inner.delete(keys_of(engine, prompt)) > 0


def test_faults_were_really_counted(engine):
    """What the store says of itself agrees with what the tests did to it."""
    outcomes = engine.store.stats().get_outcomes
    assert min(outcomes[each] for each in (LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR)) > 0
