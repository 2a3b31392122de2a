"""What every store and every wrapper promises, whatever lies behind it."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheflow.stores.base import GetRequest, PinOutcome, PrefetchRequest, PutOutcome, PutRequest
from cacheflow.stores.faults import FaultPlan, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import Namespace, ObjectKey, ObjectKind
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.retention import Retention
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.url import StoreUrl
from cacheflow.types import LoadOutcome
from support.documented_store import documented_opener
from support.examples import examples
from support.lending import lending
from support.store_kinds import ALL, LMCACHE, url_of
from support.store_objects import NAMESPACE, TIMEOUT_S, get, key, payload, put, put_request

CAPACITY = 64 << 20
OK = LoadOutcome.OK


def throttled(store, **options):
    return ThrottledStore(store, 1e10, **options)


OTHERS = {
    "documented_example": lambda root: documented_opener()(StoreUrl.parse(f"sqlite://{root}"))(
        capacity_bytes=CAPACITY, retention=Retention()
    ),
    "file_without_fsync": lambda root: FileStore(root, capacity_bytes=CAPACITY, fsync=False),
    "memory_in_slabs": lambda root: lending(MemoryStore(capacity_bytes=CAPACITY)),
    "throttled_memory": lambda root: throttled(MemoryStore(capacity_bytes=CAPACITY), latency_s=1e-4, jitter_s=1e-4),
    "throttled_file": lambda root: throttled(FileStore(root, capacity_bytes=CAPACITY, fsync=False), throttle_puts=True),
    "faulty_memory": lambda root: FaultyStore(MemoryStore(capacity_bytes=CAPACITY), FaultPlan()),
    "faulty_throttled": lambda root: FaultyStore(throttled(MemoryStore(capacity_bytes=CAPACITY)), FaultPlan()),
}


TIERS = {" over ".join(tiers): tiers for tiers in [("memory", "file"), ("memory", "shm", "file"), ("file", "redis")]}


@pytest.fixture(params=[*ALL, *LMCACHE, *TIERS, *OTHERS])
def store(request, tmp_path):
    root = tmp_path / "store"
    if request.param not in OTHERS:
        urls = [url_of(kind, request, root) for kind in TIERS.get(request.param, (request.param,))]
        opened = open_store(urls, capacity_bytes=CAPACITY)
    else:
        opened = OTHERS[request.param](root)
    with opened:
        yield opened


def test_what_was_put_is_read_back(store):
    assert put(store, 1, 2) == (PutOutcome.STORED,) * 2
    for number in (2, 1):
        outcome, buffer = get(store, number)
        assert outcome is OK
        assert np.array_equal(buffer, payload(number))


def test_parts_of_any_dtype_are_stored_one_behind_the_other(store):
    parts = [payload(1).view("u2").reshape(10, 50), b"between", bytearray(b"last"), memoryview(payload(2, 8))]
    put_handle = store.submit_put([PutRequest(key(1), parts, (1019,), "uint8")])
    assert put_handle.wait(TIMEOUT_S) == (PutOutcome.STORED,)
    outcome, buffer = get(store, 1, 1019)
    assert outcome is OK
    assert buffer.tobytes() == payload(1).tobytes() + b"betweenlast" + payload(2, 8).tobytes()


def test_a_read_fills_a_slice_and_nothing_beside_it(store):
    put(store, 1)
    buffer = np.full((3, 250, 4), 7, np.uint8)
    assert store.submit_get([GetRequest(key(1), buffer[1])]).wait(TIMEOUT_S) == (OK,)
    assert np.array_equal(buffer[1].ravel(), payload(1))
    assert (buffer[[0, 2]] == 7).all()


def test_outcomes_are_per_item_and_never_prefix_only(store):
    put(store, 1, 3)
    buffers = [np.zeros(1000, np.uint8) for _ in range(4)]
    handle = store.submit_get([GetRequest(key(number), buffers[number]) for number in (0, 1, 2, 3)])
    assert handle.wait(TIMEOUT_S) == (LoadOutcome.MISS, OK, LoadOutcome.MISS, OK)
    assert handle.poll() == handle.wait() == (LoadOutcome.MISS, OK, LoadOutcome.MISS, OK)
    assert np.array_equal(buffers[3], payload(3))


def test_an_empty_batch_is_done(store):
    assert store.submit_get([]).wait() == ()
    assert store.submit_put([]).poll() == ()
    assert store.contains([]) == ()


def test_existing_keys_are_not_written_twice(store):
    put(store, 1)
    other = store.submit_put([put_request(1, payload(99))])
    assert other.wait(TIMEOUT_S) == (PutOutcome.EXISTS,)
    assert np.array_equal(get(store, 1)[1], payload(1))


def test_replace_overwrites_also_with_another_length(store):
    put(store, 1)
    handle = store.submit_put([put_request(1, payload(99, 64), replace=True)])
    assert handle.wait(TIMEOUT_S) == (PutOutcome.STORED,)
    outcome, buffer = get(store, 1, 64)
    assert outcome is OK
    assert np.array_equal(buffer, payload(99, 64))
    assert store.stats().num_objects == 1


def test_contains_and_delete(store):
    put(store, 1, 2)
    assert store.contains([key(1), key(3), key(2)]) == (True, False, True)
    assert store.delete([key(1), key(3)]) == 1
    assert store.contains([key(1), key(2)]) == (False, True)
    assert get(store, 1)[0] is LoadOutcome.MISS
    assert store.delete([key(1)]) == 0


def test_keys_that_differ_in_one_part_are_different_objects(store):
    base = key(1)
    hidden = ObjectKey(namespace=base.namespace, chain_hash=base.chain_hash, kind=ObjectKind.HIDDEN)
    put(store, 1)
    assert store.contains([hidden, key(1, layer=1), key(2)]) == (False,) * 3


@pytest.mark.parametrize("num_bytes", [1, 999, 1001, 5000])
def test_a_buffer_of_another_length_is_an_error_and_harms_nothing(store, num_bytes):
    put(store, 1)
    assert get(store, 1, num_bytes)[0] is LoadOutcome.ERROR
    assert get(store, 1)[0] is OK


def test_misuse_is_a_value_error(store):
    array = payload(1)
    for bad in (bytes(10), np.zeros(0, np.uint8), np.zeros((4, 4))[:, ::2], np.array([object()])):
        with pytest.raises(ValueError, match="buffer"):
            store.submit_get([GetRequest(key(1), bad)])
    for bad in (
        PutRequest(key(1), [b""], (0,), "uint8"),
        PutRequest(key(1), [], (0,), "uint8"),
        PutRequest(key(1), [array], (1,) * 9, "uint8"),
        PutRequest(key(1), [array], (1000,), "a dtype with a long name"),
    ):
        with pytest.raises(ValueError, match=r"buffer|must"):
            store.submit_put([bad])
    assert get(store, 1)[0] is LoadOutcome.MISS


def test_a_deadline_in_the_past_is_late(store):
    put(store, 1)
    assert get(store, 1, deadline_s=0.0)[0] is LoadOutcome.LATE
    assert store.submit_put([put_request(2)], deadline_s=0.0).wait(TIMEOUT_S) == (PutOutcome.LATE,)
    assert get(store, 1, deadline_s=TIMEOUT_S)[0] is OK


def test_cancelling_what_has_ended_changes_nothing(store):
    put(store, 1)
    handle = store.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
    handle.wait(TIMEOUT_S)
    handle.cancel()
    handle.cancel()
    assert handle.poll() == (OK,)


def test_cancel_leaves_the_buffers_alone(store):
    put(store, *range(8), num_bytes=200_000)
    buffers = [np.zeros(200_000, np.uint8) for _ in range(8)]
    handle = store.submit_get([GetRequest(key(number), buffers[number]) for number in range(8)])
    handle.cancel()
    before = [buffer.copy() for buffer in buffers]
    get(store, 0, 200_000)  # whatever was queued before this has been passed over
    assert set(handle.poll()) <= {OK, LoadOutcome.CANCELLED}
    for number, (outcome, buffer) in enumerate(zip(handle.poll(), buffers, strict=True)):
        assert np.array_equal(buffer, before[number])
        assert outcome is not OK or np.array_equal(buffer, payload(number, 200_000))


def test_pins_are_for_objects_that_are_there(store):
    put(store, 1)
    assert store.pin([key(1), key(2)], ttl_s=60.0) == (PinOutcome.PINNED, PinOutcome.MISSING)
    store.unpin([key(1), key(2)])
    with pytest.raises(ValueError, match="ttl_s"):
        store.pin([key(1)], ttl_s=0.0)


def test_what_is_prefetched_is_as_it_was(store):
    put(store, 1, 2)
    requests = [PrefetchRequest(key(number), 1000) for number in (1, 2, 3)]
    num_taken = store.prefetch(requests, within_s=60.0, keep_s=60.0)
    assert num_taken == (3 if store.stats().tiers else 0)
    for number in (1, 2):
        outcome, buffer = get(store, number)
        assert outcome is OK
        assert np.array_equal(buffer, payload(number))
    assert store.contains([key(3)]) == (False,)
    store.delete([key(1), key(2)])
    assert store.contains([key(1), key(2)]) == (False, False)


def test_stats_count_every_item_once(store):
    put(store, 1, 2)
    put(store, 2)
    for number in (1, 2, 3):
        get(store, number)
    get(store, 1, deadline_s=0.0)
    stats = store.stats()
    assert stats.get_outcomes[OK] == 2
    assert stats.get_outcomes[LoadOutcome.MISS] == stats.get_outcomes[LoadOutcome.LATE] == 1
    assert stats.put_outcomes[PutOutcome.STORED] == 2
    assert stats.put_outcomes[PutOutcome.EXISTS] == 1
    assert (stats.read_bytes, stats.written_bytes, stats.num_objects) == (2000, 2000, 2)
    assert stats.used_bytes == 2 * (1000 + 4096)
    assert stats.read_bytes_per_s is None or stats.read_bytes_per_s > 0
    assert stats.read_latency_s > 0
    assert set(stats.get_outcomes) == set(LoadOutcome)


def test_capabilities_are_stated(store):
    found = store.capabilities()
    assert found.name
    assert found.capacity_bytes == CAPACITY
    assert found.max_parallel_reads >= 1


def test_the_census_counts_objects_by_namespace(store):
    assert store.census() == {}
    other = Namespace(weights_fingerprint="other weights", dtype="bfloat16", chunk_tokens=4)
    put(store, 1, 2, 3)
    request = PutRequest(key(1, namespace=other), [payload(1)], (1000,), "uint8")
    assert store.submit_put([request]).wait(TIMEOUT_S) == (PutOutcome.STORED,)
    assert store.census() == {NAMESPACE.digest: 3, other.digest: 1}
    store.delete([key(2), key(1, namespace=other)])
    get(store, 2)
    assert store.census() == {NAMESPACE.digest: 2}


def test_after_close_everything_is_an_error_and_nothing_raises(store):
    put(store, 1)
    store.close()
    store.close()
    assert get(store, 1)[0] is LoadOutcome.ERROR
    assert put(store, 2) == (PutOutcome.ERROR,)
    assert store.stats().get_outcomes[LoadOutcome.ERROR] == 1


def test_many_threads_at_once(store):
    put(store, *range(6))
    wrong = []

    def hammer(seed):
        for step in range(10):
            number = (seed * 7 + step) % 6
            outcome, buffer = get(store, number, priority=step % 3)
            if outcome is not OK or not np.array_equal(buffer, payload(number)):
                wrong.append((number, outcome))
            put(store, 100 + step)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.stats().put_outcomes[PutOutcome.STORED] >= 16
    assert store.stats().num_objects == 16


@settings(max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects=st.dictionaries(st.integers(1000, 2000), st.binary(min_size=1, max_size=9000), max_size=5))
def test_round_trip(store, objects):
    store.delete([key(number) for number in objects])
    requests = [PutRequest(key(number), [data], (len(data),), "uint8") for number, data in objects.items()]
    assert store.submit_put(requests).wait(TIMEOUT_S) == (PutOutcome.STORED,) * len(objects)
    buffers = {number: bytearray(len(data)) for number, data in objects.items()}
    handle = store.submit_get([GetRequest(key(number), buffer) for number, buffer in reversed(buffers.items())])
    assert handle.wait(TIMEOUT_S) == (OK,) * len(objects)
    assert buffers == objects
