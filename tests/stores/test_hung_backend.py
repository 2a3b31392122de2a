"""A backend that hangs in every thread: what is given up is let go of, and closing ends, as does every wait."""

import gc
import logging
import threading
import weakref
from contextlib import closing

import numpy as np

from cacheflow.stores import threaded
from cacheflow.stores.base import GetRequest
from cacheflow.types import LoadOutcome
from support.gated_store import GatedStore
from support.store_objects import TIMEOUT_S, get, key, payload, put
from support.waiting import eventually


def hung_reads(store):
    """As many as there are threads, each under way."""
    store.reads.clear()
    handles = [store.submit_get([GetRequest(key(1), np.zeros_like(payload(1)))]) for _ in range(store.default_threads)]
    eventually(lambda: store.num_reads_begun == store.default_threads)
    return handles


def test_buffers_of_what_was_cancelled_are_let_go_of(monkeypatch):
    monkeypatch.setattr(threaded, "_PURGE_LENGTH", 10)
    with closing(GatedStore()) as store:
        put(store, 1)
        handles = hung_reads(store)
        kept = np.zeros_like(payload(1))
        waiting = store.submit_get([GetRequest(key(1), kept)])
        buffers = []
        for number in range(200):
            buffer = np.zeros(1000, np.uint8)
            store.submit_get([GetRequest(key(number), buffer)]).cancel()
            buffers.append(weakref.ref(buffer))
            del buffer
        gc.collect()
        assert sum(each() is not None for each in buffers) <= 10 + 2
        store.open_gates()
        assert {handle.wait(TIMEOUT_S) for handle in (*handles, waiting)} == {(LoadOutcome.OK,)}
        assert np.array_equal(kept, payload(1))
        assert get(store, 1)[0] is LoadOutcome.OK


def test_closing_ends_all_waits_and_takes_as_long_with_many_hung_threads_as_with_one(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    joined = []
    monkeypatch.setattr(threaded, "_JOIN_TIMEOUT_S", 0.01)
    monkeypatch.setattr(threading.Thread, "join", _noting(joined, threading.Thread.join))
    store = GatedStore()
    put(store, 1)
    handles = hung_reads(store)
    store.close()
    assert len(joined) == store.default_threads
    assert sum(joined) <= 0.01 * store.default_threads
    assert joined[-1] < 0.01
    assert [handle.wait() for handle in handles] == [(LoadOutcome.CANCELLED,)] * len(handles)
    assert sum("is hung in the backend" in record.message for record in caplog.records) == len(handles)
    store.open_gates()
    for handle in handles:
        handle.cancel()


def _noting(joined, join):
    def noting(thread, timeout=None):
        joined.append(timeout)
        join(thread, timeout)

    return noting
