"""Staging buffers are handed out again, never twice at once."""

import threading

import pytest

from cacheflow.tensors.staging import StagingPool

pytestmark = pytest.mark.torch


def test_buffers_in_flight_differ_and_come_back():
    pool = StagingPool(64)
    first, second = pool.take(), pool.take()
    assert first is not second
    first.array[:] = 7
    assert first.tensor.sum() == 7 * 64
    pool.give(first)
    assert pool.take() is first


def test_threads_never_hold_the_same_buffer():
    pool, held, twice = StagingPool(8), set(), []
    lock = threading.Lock()

    def work():
        for _ in range(2000):
            buffer = pool.take()
            with lock:
                if id(buffer) in held:
                    twice.append(buffer)
                held.add(id(buffer))
            with lock:
                held.discard(id(buffer))
            pool.give(buffer)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not twice
