"""Capacity, eviction and pins; threads that hang, and buffers while they do."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cacheflow
from cacheflow.errors import ConfigError
from cacheflow.stores.base import GetRequest, PutOutcome, ReadTap
from cacheflow.stores.lru import LruIndex
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.retention import Retention
from cacheflow.types import LoadOutcome
from support.lending import lending
from support.manual_clock import ManualClock
from support.store_kinds import ALL, LMCACHE, opened, url_of
from support.store_objects import TIMEOUT_S, get, key, payload, put, put_request

RECORD = 4096 + 1000
STORED, FULL = PutOutcome.STORED, PutOutcome.FULL
ALL_MAY_BE_PINNED = Retention(pinned_share=1.0)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(params=[*ALL, *LMCACHE, "memory_in_slabs"])
def small(request, tmp_path, clock):
    """A store for three objects."""
    if request.param == "memory_in_slabs":
        with lending(MemoryStore(capacity_bytes=3 * RECORD + 100, clock=clock, retention=ALL_MAY_BE_PINNED)) as store:
            yield store
        return
    url = url_of(request.param, request, tmp_path / "store")
    with opened(url, capacity_bytes=3 * RECORD + 100, clock=clock, retention=ALL_MAY_BE_PINNED) as store:
        yield store


def held(store, *numbers):
    return [number for number in numbers if store.contains([key(number)])[0]]


def put_in_turn(store, *numbers):
    for number in numbers:
        assert put(store, number) == (STORED,)


def test_the_least_recently_used_object_goes_first(small):
    put_in_turn(small, 1, 2, 3)
    get(small, 1)
    put(small, 4)
    assert held(small, 1, 2, 3, 4) == [1, 3, 4]
    assert get(small, 2)[0] is LoadOutcome.MISS
    stats = small.stats()
    assert (stats.num_objects, stats.used_bytes, stats.num_evicted) == (3, 3 * RECORD, 1)


def test_eviction_takes_just_enough(small):
    put_in_turn(small, 1, 2, 3)
    assert put(small, 4, num_bytes=1000 + RECORD) == (STORED,)
    assert held(small, 1, 2, 3, 4) == [3, 4]


def test_pinned_objects_stay_until_the_pin_ends(small, clock):
    put_in_turn(small, 1, 2, 3)
    small.pin([key(1), key(2)], ttl_s=10.0)
    put_in_turn(small, 4, 5)
    assert held(small, 1, 2, 3, 4, 5) == [1, 2, 5]
    small.unpin([key(2)])
    put(small, 6)
    assert held(small, 1, 2, 5, 6) == [1, 5, 6]
    if small.capabilities().name in ("file", "shm"):
        return  # whose dates say it to other processes, on a clock that a test cannot move
    clock.now_s += 10.0
    put(small, 7)
    assert held(small, 1, 5, 6, 7) == [5, 6, 7]


def test_when_pins_leave_too_little_nothing_is_evicted(small):
    put_in_turn(small, 1, 2, 3)
    small.pin([key(1), key(2)], ttl_s=10.0)
    assert put(small, 4, num_bytes=1000 + RECORD) == (FULL,)
    assert held(small, 1, 2, 3, 4) == [1, 2, 3]
    assert small.stats().num_evicted == 0


def test_an_object_larger_than_the_store_is_full_and_evicts_nothing(small):
    put(small, 1)
    assert put(small, 2, num_bytes=3 * RECORD) == (FULL,)
    assert held(small, 1, 2) == [1]


def test_deleting_gives_the_space_back(small):
    put_in_turn(small, 1, 2, 3)
    small.pin([key(1)], ttl_s=10.0)
    small.delete([key(1)])
    put(small, 4)
    assert held(small, 1, 2, 3, 4) == [2, 3, 4]


def test_a_process_that_gets_no_more_memory_evicts_for_new_objects():
    program = (
        "import resource, sys\n"
        f"sys.path[:0] = [{str(Path(cacheflow.__file__).parents[1])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from cacheflow.stores.memory import MemoryStore\n"
        "from support.store_objects import key, payload, put_request\n"
        "data = payload(0, 8 << 20)\n"
        "def put(number):\n"
        "    return store.submit_put([put_request(number, data)]).wait(20.0)[0].value\n"
        "with MemoryStore(capacity_bytes=1 << 40) as store:\n"
        "    outcomes = [put(0), put(1)]  # the threads run\n"
        "    store.pin([key(0)], ttl_s=600.0)\n"
        "    address_space = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    no_limit = resource.getrlimit(resource.RLIMIT_AS)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (address_space + (60 << 20), no_limit[1]))\n"
        "    outcomes += [put(number) for number in range(2, 60)]\n"
        "    resource.setrlimit(resource.RLIMIT_AS, no_limit)\n"
        "    print(*set(outcomes))\n"
        "    print(*(number for number in range(60) if store.contains([key(number)])[0]))\n"
        "    print(store.stats().used_bytes, store.stats().num_evicted)\n"
    )
    # each record in pages of its own, which go back when it is evicted: the limit is then met to the byte
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    outcomes, numbers, counts = done.stdout.splitlines()
    assert outcomes == "stored"
    numbers = [int(number) for number in numbers.split()]
    assert 3 < len(numbers) < 50
    assert numbers == [0, *range(60 - len(numbers) + 1, 60)], "the pinned one and the newest"
    assert counts == f"{len(numbers) * ((8 << 20) + 4096)} {60 - len(numbers)}"


def test_memory_that_nothing_can_be_evicted_for_is_full(monkeypatch):
    with MemoryStore(capacity_bytes=1 << 20) as store:
        put_in_turn(store, 1, 2)
        store.pin([key(1), key(2)], ttl_s=60.0)

        def refuse(*_args):
            raise MemoryError

        request = put_request(3)
        monkeypatch.setattr(np, "empty", refuse)
        assert store.submit_put([request]).wait(TIMEOUT_S) == (FULL,)
        monkeypatch.undo()
        assert held(store, 1, 2, 3) == [1, 2]
        assert put(store, 3) == (STORED,), "and no room is lost"
        assert store.stats().used_bytes == 3 * RECORD


@pytest.mark.parametrize("options", [{"capacity_bytes": 0}, {"capacity_bytes": 10, "num_threads": 0}])
def test_bad_configuration_is_refused(options):
    with pytest.raises(ConfigError, match="must be at least 1"):
        MemoryStore(**options)


def test_the_capacity_is_logged_at_start(caplog):
    with caplog.at_level(logging.INFO):
        MemoryStore(capacity_bytes=12345)
    assert "12345" in caplog.text


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), max_size=30),
    pinned=st.sets(st.integers(0, 29)),
)
def test_an_index_never_exceeds_its_bound_nor_evicts_in_vain(sizes, pinned):
    index = LruIndex(100, retention=ALL_MAY_BE_PINNED)
    for number, size in enumerate(sizes):
        before = index.sizes()
        evicted = index.reserve(size, now_s=0.0)
        if evicted is None:
            assert index.sizes() == before
            assert sum(size for name, size in before.items() if int(name) in pinned) + size > 100
            continue
        assert list(before)[: len(before)] == list(before)
        freed = [before[name] for name in evicted]
        assert sum(before.values()) - sum(freed) + size <= 100
        assert not freed or sum(before.values()) - sum(freed[:-1]) + size > 100
        assert not {int(name) for name in evicted} & pinned
        index.commit(str(number), size, now_s=0.0)
        if number in pinned:
            index.pin(str(number), until_s=1.0, now_s=0.0)
        assert index.used_bytes == sum(index.sizes().values()) <= 100


class HangingStore(MemoryStore):
    """Every read copies half of its payload, then waits to be let go on."""

    def __init__(self):
        super().__init__(capacity_bytes=1 << 20, num_threads=1)
        self.is_reading = threading.Event()
        self.may_go_on = threading.Event()

    def read_record(self, key, header, payload):
        whole = bytearray(payload.nbytes)
        found = super().read_record(key, header, memoryview(whole))
        half = payload.nbytes // 2
        payload[:half] = whole[:half]
        self.is_reading.set()
        assert self.may_go_on.wait(TIMEOUT_S)
        payload[half:] = whole[half:]
        return found


@pytest.fixture
def hanging():
    with HangingStore() as store:
        put(store, 1, 2)
        yield store
        store.may_go_on.set()


def test_cancel_returns_only_after_the_transfer_has_left_the_buffer(hanging):
    buffer = np.zeros(1000, np.uint8)
    handle = hanging.submit_get([GetRequest(key(1), buffer)])
    assert hanging.is_reading.wait(TIMEOUT_S)
    canceller = threading.Thread(target=handle.cancel)
    canceller.start()
    assert handle.wait(TIMEOUT_S) == (LoadOutcome.CANCELLED,)
    canceller.join(0.05)
    assert canceller.is_alive()
    hanging.may_go_on.set()
    canceller.join(TIMEOUT_S)
    assert not canceller.is_alive()
    assert np.array_equal(buffer, payload(1))  # the transfer was through when cancel returned
    assert handle.poll() == (LoadOutcome.CANCELLED,)


def test_a_queued_read_that_is_cancelled_never_touches_its_buffer(hanging):
    buffers = [np.zeros(1000, np.uint8) for _ in range(2)]
    first = hanging.submit_get([GetRequest(key(1), buffers[0])])
    queued = hanging.submit_get([GetRequest(key(2), buffers[1])])
    assert hanging.is_reading.wait(TIMEOUT_S)
    queued.cancel()  # returns at once: nothing is in flight
    assert queued.poll() == (LoadOutcome.CANCELLED,)
    hanging.may_go_on.set()
    assert first.wait(TIMEOUT_S) == (LoadOutcome.OK,)
    assert get(hanging, 1)[0] is LoadOutcome.OK
    assert not buffers[1].any()


def test_a_hung_read_is_late_at_its_deadline(hanging):
    buffer = np.zeros(1000, np.uint8)
    handle = hanging.submit_get([GetRequest(key(1), buffer)], deadline_s=0.02)
    assert handle.wait() == (LoadOutcome.LATE,)
    hanging.may_go_on.set()
    handle.cancel()
    assert handle.poll() == (LoadOutcome.LATE,)
    assert hanging.stats().get_outcomes[LoadOutcome.LATE] == 1
    assert hanging.stats().get_outcomes[LoadOutcome.OK] == 0


def test_wait_times_out_with_what_is_known(hanging):
    handle = hanging.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
    assert handle.wait(0.01) == (None,)
    hanging.may_go_on.set()
    assert handle.wait(TIMEOUT_S) == (LoadOutcome.OK,)


def test_a_larger_priority_overtakes_the_queue():
    order = []

    class Noting(HangingStore):
        def read_record(self, key, header, payload):
            order.append(int(key.chain_hash, 16))
            return super().read_record(key, header, payload)

    with Noting() as store:
        put(store, *range(5))
        buffers = [np.zeros(1000, np.uint8) for _ in range(5)]
        handles = [store.submit_get([GetRequest(key(0), buffers[0])])]
        assert store.is_reading.wait(TIMEOUT_S)
        for number, priority in ((1, 0), (2, 0), (3, 5), (4, 5)):
            handles.append(store.submit_get([GetRequest(key(number), buffers[number])], priority=priority))
        store.may_go_on.set()
        assert all(handle.wait(TIMEOUT_S) == (LoadOutcome.OK,) for handle in handles)
    assert order == [0, 3, 4, 1, 2]


def test_closing_cancels_what_is_queued(hanging):
    running = hanging.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
    queued = hanging.submit_get([GetRequest(key(2), np.zeros(1000, np.uint8))])
    assert hanging.is_reading.wait(TIMEOUT_S)
    closer = threading.Thread(target=hanging.close)
    closer.start()
    assert queued.wait(TIMEOUT_S) == (LoadOutcome.CANCELLED,)
    hanging.may_go_on.set()
    assert running.wait(TIMEOUT_S) == (LoadOutcome.OK,)
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()


def test_a_bug_in_a_backend_is_an_error_outcome_and_the_pool_lives_on(caplog):
    class Buggy(MemoryStore):
        def read_record(self, key, header, payload):
            if key.chain_hash.endswith("1"):
                raise RuntimeError("a bug")
            return super().read_record(key, header, payload)

    with Buggy(capacity_bytes=1 << 20, num_threads=1) as store:
        put(store, 1, 2)
        assert get(store, 1)[0] is LoadOutcome.ERROR
        assert get(store, 2)[0] is LoadOutcome.OK
    assert "a bug" in caplog.text


@pytest.mark.parametrize("flipped", [0, 4095, 4096, 5095])
def test_a_corrupt_object_counts_as_absent_and_is_repaired_by_the_next_put(flipped):
    with MemoryStore(capacity_bytes=1 << 20) as store:
        put(store, 1)
        request = GetRequest(key(1), np.zeros(1000, np.uint8), tap=ReadTap(flipped))
        assert store.submit_get([request]).wait(TIMEOUT_S) == (LoadOutcome.CORRUPT,)
        assert store.contains([key(1)]) == (False,)
        assert store.submit_put([put_request(1)]).wait(TIMEOUT_S) == (STORED,)
        assert store.contains([key(1)]) == (True,)
        assert store.submit_put([put_request(1)]).wait(TIMEOUT_S) == (PutOutcome.EXISTS,)
        assert get(store, 1)[0] is LoadOutcome.OK
