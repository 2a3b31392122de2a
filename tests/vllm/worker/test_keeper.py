"""Pins that a worker makes in the background: after the writes, the first chunk first, counted."""

import threading
import time

import pytest

pytest.importorskip("torch")

from cacheflow.stores.keys import RankKeys, RankObjects, Shard
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.retention import Retention
from cacheflow.vllm.step import KeepWork
from cacheflow.vllm.worker.keeper import PrefixKeeper
from support.store_objects import NAMESPACE, TIMEOUT_S, payload, put, put_request

pytestmark = pytest.mark.torch

RECORD = 4096 + 1000
CHUNKS = tuple(f"{number:064x}" for number in range(4))
ONE_RANK = (RankObjects(keys=RankKeys(), rows=((0, 1),), state_rows=((0, 1),), boundary=True),)
TWO_RANKS = tuple(RankObjects(keys=RankKeys(Shard(tp_rank=rank, tp_size=2)), rows=((0, 1),)) for rank in (0, 1))


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=8 * RECORD, retention=Retention(pinned_share=0.5)) as store:
        yield store


@pytest.fixture
def keeper(store):
    keeper = PrefixKeeper(store)
    yield keeper
    keeper.close()


def keep(chunks=CHUNKS, keep_s=600.0, objects=ONE_RANK):
    return KeepWork(namespace=NAMESPACE.digest, chain_hashes=chunks, objects=objects, keep_s=keep_s)


def written(_timeout_s):
    """Nothing is under way."""


def outcomes_of(keeper, num_chunks):
    counted, ends_s = {}, time.monotonic() + TIMEOUT_S
    while sum(counted.values()) < num_chunks:
        assert time.monotonic() < ends_s, counted
        time.sleep(0.005)
        for name, count in keeper.take_outcomes().items():
            counted[name] = counted.get(name, 0) + count
    return counted


def crowd(store):
    for number in range(100, 120):
        put(store, number)


def kept(store):
    keys = [ONE_RANK[0].kv(NAMESPACE.digest, each)[0] for each in CHUNKS]
    return [number for number, there in enumerate(store.contains(keys)) if there]


def test_a_prefix_is_pinned_and_let_go_of(store, keeper):
    put(store, 0, 1, 2, 3)
    keeper.carry_out(keep(CHUNKS[:2]), written=written)
    assert outcomes_of(keeper, 2) == {"pinned": 2}
    crowd(store)
    assert kept(store) == [0, 1]
    keeper.carry_out(keep(CHUNKS[:2], keep_s=0.0), written=written)
    keeper.carry_out(keep(CHUNKS[:1], keep_s=1e-9), written=written)
    assert outcomes_of(keeper, 1) == {"missing": 1}, "it was over before it began"
    crowd(store)
    assert kept(store) == []


def test_what_finds_no_room_is_refused_from_there_on(store, keeper):
    put(store, 10, 0, 1, 2)
    store.pin([put_request(10).key], ttl_s=600.0)
    put(store, 20)
    store.pin([put_request(20).key], ttl_s=600.0)
    keeper.carry_out(keep(), written=written)
    assert outcomes_of(keeper, 4) == {"pinned": 2, "refused": 2}
    crowd(store)
    assert kept(store) == [0, 1]


def test_what_is_missing_is_counted_and_the_rest_is_kept(store, keeper):
    put(store, 0, 2)
    keeper.carry_out(keep(CHUNKS[:3]), written=written)
    assert outcomes_of(keeper, 3) == {"pinned": 2, "missing": 1}


def test_what_is_under_way_is_waited_for(store, keeper):
    arrived = threading.Event()
    keeper.carry_out(keep(CHUNKS[:1]), written=lambda timeout_s: arrived.wait(timeout_s))
    put(store, 0)
    arrived.set()
    assert outcomes_of(keeper, 1) == {"pinned": 1}


def test_what_another_rank_writes_a_little_later_is_pinned_too(store, keeper):
    def put_of(rank):
        (key,) = TWO_RANKS[rank].kv(NAMESPACE.digest, CHUNKS[0])
        request = put_request(0, payload(0))
        store.submit_put([type(request)(key, request.buffers, request.shape, request.dtype)]).wait(TIMEOUT_S)
        return key

    own = put_of(0)
    keeper.carry_out(keep(CHUNKS[:1], objects=TWO_RANKS), written=written)
    peers = put_of(1)
    assert outcomes_of(keeper, 1) == {"pinned": 1}
    crowd(store)
    assert store.contains([own, peers]) == (True, True)


def test_a_bug_in_a_store_costs_a_pin_and_the_next_one_is_made(store, keeper, caplog, monkeypatch):
    put(store, 0)
    with monkeypatch.context() as broken:
        failed = threading.Event()

        def pin(keys, *, ttl_s):
            failed.set()
            raise RuntimeError("a bug")

        broken.setattr(store, "pin", pin)
        keeper.carry_out(keep(CHUNKS[:1]), written=written)
        assert failed.wait(TIMEOUT_S)
    keeper.carry_out(keep(CHUNKS[:1]), written=written)
    assert outcomes_of(keeper, 1) == {"pinned": 1}
    assert "a bug" in caplog.text
