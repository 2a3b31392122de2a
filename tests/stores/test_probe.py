"""Measuring a store's link; no torch."""

import threading

import pytest

import cacheflow.stores.probe as probe
from cacheflow.errors import StoreError
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.probe import measure_link, stored_share
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.types import LoadOutcome
from support.gated_store import GatedStore
from support.store_kinds import ALL, LMCACHE, url_of
from support.store_objects import put
from support.waiting import eventually

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


@pytest.mark.parametrize("tiered", [False, True])
def test_probes_take_no_more_than_their_share_and_throw_out_no_more(tmp_path, tiered):
    num_kept, record_bytes = 16, OBJECT_BYTES + 4096
    capacity_bytes = num_kept * record_bytes
    urls = ["memory", (tmp_path / "below").as_uri()] if tiered else "memory"
    with open_store(urls, capacity_bytes=capacity_bytes) as store:
        assert set(put(store, *range(num_kept), num_bytes=OBJECT_BYTES)) == {PutOutcome.STORED}
        assert measure_link(store, object_bytes=OBJECT_BYTES, rounds=2, most_share=1 / 8).bytes_per_s > 0
        assert store.stats().num_objects >= num_kept - 3  # two and a small one before them


def test_a_store_with_room_for_one_probe_is_measured():
    with MemoryStore(capacity_bytes=OBJECT_BYTES + 4096) as store:
        assert measure_link(store, object_bytes=OBJECT_BYTES, rounds=2, most_share=1 / 8).bytes_per_s > 0
        assert store.stats().num_objects == 0


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


@pytest.mark.parametrize("num_good", [0, 4], ids=["the small one", "one of several under way"])
def test_a_read_that_hangs_is_an_error_and_nobody_waits_until_it_ends(num_good, monkeypatch):
    class HangsLater(GatedStore):
        num_begun = 0

        def read_record(self, key, header, payload):
            self.num_begun += 1
            if self.num_begun > num_good:
                return super().read_record(key, header, payload)
            return MemoryStore.read_record(self, key, header, payload)

    with HangsLater(reads=True) as store:
        monkeypatch.setattr(probe, "READ_TIMEOUT_S", 1.0)
        with pytest.raises(StoreError, match="a read is still pending after 1 s: the store hangs"):
            measure_link(store, object_bytes=OBJECT_BYTES, num_objects=8, rounds=1)
        assert not store.stats().get_outcomes[LoadOutcome.CANCELLED], "it was not waited for to let go of its buffer"
        assert store.stats().num_objects == 0
        store.open_gates()


def hangs_in_delete():
    """A store in memory, and what lets it delete."""

    class HangsInDelete(MemoryStore):
        def delete(self, keys):
            lets_go.wait()
            return super().delete(keys)

    lets_go = threading.Event()
    return HangsInDelete(capacity_bytes=CAPACITY), lets_go


@pytest.mark.parametrize("measure", [measure_link, stored_share])
def test_probes_that_the_store_hangs_over_deleting_are_left_behind_with_a_warning(measure, monkeypatch, caplog):
    monkeypatch.setattr(probe, "DELETE_TIMEOUT_S", 0.01)
    store, lets_go = hangs_in_delete()
    with store:
        assert measure(store, object_bytes=OBJECT_BYTES, dtype="bfloat16")
        assert store.stats().num_objects > 0
        assert f"did not delete {store.stats().num_objects} probes in 0.01 s, and some may stay" in caplog.text
        lets_go.set()
        eventually(lambda: store.stats().num_objects == 0)
