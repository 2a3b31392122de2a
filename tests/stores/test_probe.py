"""Measuring a store's link; no torch."""

import pytest

from cacheflow.errors import StoreError
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.probe import measure_link
from cacheflow.stores.throttled import ThrottledStore
from support.store_kinds import ALL, LMCACHE, url_of

OBJECT_BYTES = 20_000
CAPACITY = 8 << 20


@pytest.fixture(params=[*ALL, *LMCACHE])
def store(request, tmp_path):
    with open_store(url_of(request.param, request, tmp_path / "store"), capacity_bytes=CAPACITY) as opened:
        yield opened


def test_a_link_is_measured_and_the_probes_are_gone(store):
    link = measure_link(store, object_bytes=OBJECT_BYTES, num_objects=8, rounds=2)
    assert link.bytes_per_s > 0
    assert link.latency_s > 0
    assert store.stats().num_objects == 0
    assert store.stats().read_bytes == 2 * 8 * OBJECT_BYTES + 8 * 4096


@pytest.mark.parametrize("bytes_per_s", [2e6, 2e7])
def test_a_throttled_link_is_never_faster_than_it_was_set(store, bytes_per_s):
    throttled = ThrottledStore(store, bytes_per_s, latency_s=0.002)
    link = measure_link(throttled, object_bytes=OBJECT_BYTES, num_objects=6, rounds=2)
    assert link.bytes_per_s <= 1.03 * bytes_per_s
    assert link.latency_s >= 0.002 + 4096 / bytes_per_s - 1e-4
    assert throttled.stats().num_objects == 0


def test_a_slow_link_measures_slower_than_the_store_behind_it(store):
    slow = measure_link(ThrottledStore(store, 5e5), object_bytes=OBJECT_BYTES, num_objects=4, rounds=1)
    fast = measure_link(store, object_bytes=OBJECT_BYTES, num_objects=4, rounds=3)
    assert slow.bytes_per_s < fast.bytes_per_s


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR])
def test_a_probe_that_cannot_be_read_back_is_an_error(store, fault):
    faulty = FaultyStore(store, FaultPlan(rules=(FaultRule(fault=fault, every=5),)))
    with pytest.raises(StoreError, match=f"a read ended as {fault.value}"):
        measure_link(faulty, object_bytes=OBJECT_BYTES, num_objects=4, rounds=1)
    assert store.stats().num_objects == 0


def test_probes_that_cannot_be_written_are_an_error(store):
    faulty = FaultyStore(store, FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR, every=3),)))
    with pytest.raises(StoreError, match="4 objects of 20000 bytes could not be written"):
        measure_link(faulty, object_bytes=OBJECT_BYTES, num_objects=4, rounds=1)
    assert store.stats().num_objects == 0


def test_a_store_too_small_for_a_probe_is_an_error():
    with (
        MemoryStore(capacity_bytes=16_384) as store,
        pytest.raises(StoreError, match="1 objects of 20000 bytes could not be written"),
    ):
        measure_link(store, object_bytes=OBJECT_BYTES, num_objects=1, rounds=1)
