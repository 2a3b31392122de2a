"""A process that may have no more threads, or no more memory: operations fail or wait, and nothing is written late."""

import os
import threading
from contextlib import closing

import numpy as np
import pytest

from cacheflow import threads
from cacheflow.stores import copy_queue, routed
from cacheflow.stores.base import GetRequest, PutOutcome
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.gated_store import GatedStore
from support.store_objects import TIMEOUT_S, get, key, payload, put
from support.waiting import eventually

CAPACITY = 4 << 20


@pytest.fixture
def refused(monkeypatch):
    """Names of the threads that cannot be started, each while it is in here."""
    names = set()
    real = threading.Thread.start

    def start(thread):
        if any(thread.name.startswith(name) for name in names):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(threads, "_refused", set())
    return names


def test_without_any_thread_operations_fail_and_with_one_again_they_work(refused, caplog):
    with closing(MemoryStore(capacity_bytes=CAPACITY)) as store:
        refused.add("cacheflow-store")
        assert put(store, 1) == (PutOutcome.ERROR,)
        assert put(store, 1) == (PutOutcome.ERROR,)
        refused.clear()
        assert put(store, 2) == (PutOutcome.STORED,)
        assert get(store, 1)[0] is LoadOutcome.MISS, "what failed was not carried out later"
    said = [record.message for record in caplog.records if "could not be started" in record.message]
    assert len(said) == 1
    assert "pids.max" in said[0]


def test_with_fewer_threads_than_wanted_operations_wait_for_their_turn(refused):
    with closing(GatedStore()) as store:
        put(store, 1, 2)
        store.reads.clear()
        first = store.submit_get([GetRequest(key(1), np.zeros_like(payload(1)))])
        refused.add("cacheflow-store")
        buffer = np.zeros_like(payload(2))
        second = store.submit_get([GetRequest(key(2), buffer)])
        store.reads.set()
        assert first.wait(TIMEOUT_S) == second.wait(TIMEOUT_S) == (LoadOutcome.OK,)
        assert np.array_equal(buffer, payload(2))


def test_a_buffer_is_not_written_after_its_read_was_cancelled(refused, tmp_path):
    fast, slow = FileStore(tmp_path / "a", capacity_bytes=CAPACITY), GatedStore()
    put(slow, 1, 2)
    put(fast, 3)
    with closing(TieredStore({"fast": fast, "slow": slow})) as store:
        slow.reads.clear()
        hung = slow.submit_get([GetRequest(key(1), np.zeros_like(payload(1)))])
        refused.add("cacheflow-store")
        buffer = np.zeros_like(payload(2))
        handle = store.submit_get([GetRequest(key(2), buffer)], deadline_s=0.2)
        assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,)
        cancelled = threading.Thread(target=handle.cancel)
        cancelled.start()
        slow.reads.set()
        cancelled.join(TIMEOUT_S)
        assert not cancelled.is_alive()
        assert fast.submit_get([GetRequest(key(3), buffer)]).wait(TIMEOUT_S) == (LoadOutcome.OK,)
        hung.wait(TIMEOUT_S)
        assert get(slow, 1)[0] is LoadOutcome.OK, "by the only thread, after whatever waited for it"
        assert np.array_equal(buffer, payload(3))


def test_a_tier_that_nobody_could_probe_stays_in_service(refused, tmp_path):
    slow = FileStore(tmp_path, capacity_bytes=CAPACITY)
    put(slow, 1, 2, 3, 4)
    with closing(TieredStore({"fast": MemoryStore(capacity_bytes=CAPACITY), "slow": slow})) as store:
        refused.add("cacheflow-tier-probe")
        real, slow.read_record = slow.read_record, _fails
        assert {get(store, number)[0] for number in (1, 2, 3)} == {LoadOutcome.ERROR}
        slow.read_record = real
        assert get(store, 4)[0] is LoadOutcome.OK


def test_what_was_given_up_is_left_once_there_is_a_thread_again(refused, monkeypatch, caplog):
    monkeypatch.setattr(routed, "UNLEFT_S", 0.001)
    fast, slow = GatedStore(), MemoryStore(capacity_bytes=CAPACITY)
    put(fast, 1)
    put(slow, 1)
    with closing(TieredStore({"fast": fast, "slow": slow})) as store:
        fast.reads.clear()
        refused.add("cacheflow-tier-leave")
        buffer = np.zeros_like(payload(1))
        handle = store.submit_get([GetRequest(key(1), buffer)], deadline_s=2 * TIMEOUT_S)
        eventually(lambda: handle.poll() == (None,) and "tier-leave could not be started" in caplog.text)
        refused.clear()
        fast.reads.set()
        assert handle.wait(TIMEOUT_S) == (LoadOutcome.OK,)
        assert np.array_equal(buffer, payload(1))


def test_a_copy_for_which_there_is_no_memory_is_dropped_and_costs_no_room(monkeypatch, caplog):
    fast, slow = MemoryStore(capacity_bytes=CAPACITY), MemoryStore(capacity_bytes=CAPACITY)
    put(slow, 1, 2)
    with closing(TieredStore({"fast": fast, "slow": slow}, copy_bytes=1500)) as store:
        with monkeypatch.context() as lacking:
            lacking.setattr(copy_queue.np, "empty", _no_memory)
            request = GetRequest(key(1), bytearray(1000))
            assert store.submit_get([request]).wait(TIMEOUT_S) == (LoadOutcome.OK,)
        assert "there is no memory for a copy" in caplog.text
        assert get(store, 2)[0] is LoadOutcome.OK
        assert store.drain(TIMEOUT_S)
        assert fast.contains([key(1), key(2)]) == (False, True)
        promoted = store.stats().tiers[0]
        assert (promoted.num_promoted, promoted.num_unpromoted) == (1, 1)


def test_in_a_fork_operations_fail_at_once(tmp_path):
    with closing(FileStore(tmp_path, capacity_bytes=CAPACITY)) as store:
        put(store, 1)
        child = os.fork()
        if not child:
            os._exit(get(store, 1)[0] is not LoadOutcome.ERROR)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert get(store, 1)[0] is LoadOutcome.OK


def _fails(*_):
    raise OSError("it fails")


def _no_memory(*_):
    raise MemoryError
