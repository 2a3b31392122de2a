"""Fast stores over slow ones: where a read and a write go, what follows in the background, and a tier that fails."""

import logging
import re
import threading

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.stores import copy_queue, tier
from cacheflow.stores.base import GetRequest, PinOutcome, PutOutcome, PutRequest
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import next_key
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.retention import Retention
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.gated_store import CAPACITY, LONG_S, GatedStore
from support.lending import Reader, borrow
from support.store_kinds import url_of
from support.store_objects import NAMESPACE, TIMEOUT_S, get, key, payload, put, put_request
from support.waiting import eventually

OK = LoadOutcome.OK


@pytest.fixture
def slow():
    store = GatedStore()
    yield store
    store.open_gates()


def memory():
    return MemoryStore(capacity_bytes=CAPACITY)


def over(fast, slow, **options):
    return TieredStore({"fast": fast, "slow": slow}, **options)


@pytest.fixture(params=[("memory", "file"), ("memory", "shm"), ("file", "redis")], ids=" over ".join)
def urls(request, tmp_path):
    return [url_of(kind, request, tmp_path / "store") for kind in request.param]


# What follows a read and a write


def test_what_came_from_a_slower_tier_is_in_the_faster_one_afterwards(urls):
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        fast, slow = (tier.store for tier in store.tiers)
        put(slow, 1)
        assert not fast.contains([key(1)])[0]
        assert store.contains([key(1), key(2)]) == (True, False)
        assert store.locate([key(1)]) == (1,)
        assert np.array_equal(get(store, 1)[1], payload(1))
        assert store.drain(TIMEOUT_S)
        assert store.stats().tiers[0].num_promoted == 1
        assert store.locate([key(1)]) == (0,)
        slow.delete([key(1)])
        outcome, buffer = get(store, 1)
        assert outcome is OK
        assert np.array_equal(buffer, payload(1))


def test_what_was_put_is_in_every_tier_afterwards(urls):
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        assert put(store, 1, 2) == (PutOutcome.STORED,) * 2
        assert store.drain(TIMEOUT_S)
        for tier in store.tiers:
            assert np.array_equal(get(tier.store, 2)[1], payload(2))
        assert store.stats().tiers[1].num_copied == 2
        assert put(store, 1) == (PutOutcome.EXISTS,)


def test_the_next_process_finds_in_the_slow_tier_what_the_last_one_had_in_memory(tmp_path, request):
    urls = ["memory?capacity=20KiB", url_of("file", request, tmp_path / "kv")]
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        put(store, *range(10))
        assert [tier.store.capabilities().capacity_bytes for tier in store.tiers] == [20 << 10, CAPACITY]
        assert store.tiers[0].store.stats().num_objects == 4
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        assert store.contains([key(number) for number in range(10)]) == (True,) * 10
        assert all(np.array_equal(get(store, number)[1], payload(number)) for number in range(10))


def test_a_put_does_not_wait_for_the_slow_tier(slow):
    slow.writes.clear()
    with over(memory(), slow) as store:
        data = payload(1)
        assert store.submit_put([put_request(1, data)]).wait(TIMEOUT_S) == (PutOutcome.STORED,)
        data[:] = 0  # the buffer is the caller's again
        assert not slow.contains([key(1)])[0]
        slow.writes.set()
        assert store.drain(TIMEOUT_S)
        assert np.array_equal(get(slow, 1)[1], payload(1))


def test_more_than_the_buffer_holds_is_dropped_counted_and_said_once(slow, caplog):
    slow.writes.clear()
    with over(memory(), slow, copy_bytes=2500) as store:
        assert put(store, *range(6)) == (PutOutcome.STORED,) * 6
        slow.writes.set()
        assert store.drain(TIMEOUT_S)
        assert (store.stats().tiers[1].num_copied, store.stats().tiers[1].num_dropped) == (2, 4)
        assert slow.contains([key(number) for number in range(6)]) == (True, True) + (False,) * 4
        assert all(get(store, number)[0] is OK for number in range(6))
    assert len([record for record in caplog.records if "was not written to it" in record.message]) == 1


def test_promotions_are_dropped_where_the_fast_tier_is_slow_to_write(slow):
    """The names say how it should be; here the fast tier is the one whose writes hang."""
    with over(slow, memory(), copy_bytes=1500) as store:
        put(store.tiers[1].store, 1, 2, 3)
        slow.writes.clear()
        assert all(get(store, number)[0] is OK for number in (1, 2, 3))
        slow.writes.set()
        assert store.drain(TIMEOUT_S)
        fast = store.stats().tiers[0]
        assert (fast.num_promoted, fast.num_unpromoted, fast.num_dropped) == (1, 2, 0)


def test_closing_waits_for_what_is_still_to_be_written_and_not_for_ever(slow, caplog):
    with over(memory(), slow, drain_s=LONG_S) as store:
        put(store, 1, 2)
    assert slow.usage().num_objects == 2
    hung = GatedStore(writes=True)
    store = over(memory(), hung, drain_s=0.05)
    put(store, *range(8))
    threading.Timer(0.3, hung.open_gates).start()
    store.close()
    assert re.search("closed with [4-7] objects not yet written", caplog.text)  # one to four more were being written
    assert get(store, 1)[0] is LoadOutcome.ERROR


def test_what_is_deleted_does_not_come_back_from_what_waits(slow):
    slow.writes.clear()
    with over(memory(), slow) as store:
        put(store, *range(8))
        threading.Timer(0.1, slow.writes.set).start()
        assert store.delete([key(number) for number in range(8)]) == 8
        assert store.drain(TIMEOUT_S)
        assert store.contains([key(number) for number in range(8)]) == (False,) * 8


def test_what_is_deleted_again_while_a_tier_deletes_it_stays_when_it_is_put_anew(slow, monkeypatch):
    monkeypatch.setattr(copy_queue, "FORGET_S", 0.01)
    slow.writes.clear()
    writing, deleting, erasable = (threading.Event() for _ in range(3))
    write, delete = slow.write_record, slow.delete
    slow.write_record = lambda *args, **options: writing.set() or write(*args, **options)
    slow.delete = lambda keys: deleting.set() or (erasable.wait(TIMEOUT_S) and delete(keys))
    with over(memory(), slow) as store:
        copies = store.tiers[1].copies
        put(store, 1)
        assert writing.wait(TIMEOUT_S)
        copies.forget([key(1)])
        slow.writes.set()
        assert deleting.wait(TIMEOUT_S)
        copies.forget([key(1)])
        erasable.set()
        assert store.drain(TIMEOUT_S)
        assert store.delete([key(1)]) == 1
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        assert slow.contains([key(1)]) == (True,)


def test_what_the_fast_tier_does_not_take_goes_to_the_next(tmp_path):
    file = FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False)
    # What waits to be written holds less: the next tier is not written to from there as well.
    with over(MemoryStore(capacity_bytes=6000), file, copy_bytes=8000) as store:
        assert put(store, 1, num_bytes=9000) == (PutOutcome.STORED,)
        assert get(store, 1, 9000)[0] is OK
        assert store.locate([key(1)]) == (1,)


def test_notes_that_change_are_those_of_the_slowest_tier():
    """Which several processes share: each of them would otherwise read its own."""
    shared, note = memory(), next_key(NAMESPACE.digest, b"\1" * 32)
    first, second = over(memory(), shared), over(memory(), shared)
    for store, number in ((first, 1), (second, 2)):
        request = PutRequest(note, [payload(number)], (1000,), "uint8", replace=True)
        assert store.submit_put([request]).wait(TIMEOUT_S) == (PutOutcome.STORED,)
    for store in (first, second):
        buffer = np.zeros(1000, np.uint8)
        assert store.submit_get([GetRequest(note, buffer)]).wait(TIMEOUT_S) == (OK,)
        assert np.array_equal(buffer, payload(2))
        assert store.drain(TIMEOUT_S)
        assert not store.tiers[0].store.contains([note])[0]
    first.close()
    second.close()


def test_one_store_is_no_tiers():
    with pytest.raises(ConfigError, match="at least two tiers, not 1"):
        TieredStore({"memory": memory()})


# A tier that fails


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.HANG, Fault.LATE])
def test_a_read_that_fails_goes_on_to_the_next_tier_within_its_deadline(fault, tmp_path):
    fast = FaultyStore(memory(), FaultPlan(rules=(FaultRule(fault=fault),)))
    with over(fast, FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False)) as store:
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        outcome, buffer = get(store, 1, deadline_s=2.0)
        assert fast.injected()[fault] == 1
        assert outcome is OK
        assert np.array_equal(buffer, payload(1))


def test_a_read_that_no_tier_can_serve_says_the_worst_of_what_they_said(slow):
    plan = FaultPlan(rules=(FaultRule(fault=Fault.CORRUPT),))
    with over(FaultyStore(memory(), plan), slow) as store:
        assert get(store, 1)[0] is LoadOutcome.MISS
        put(store.tiers[0].store, 1)
        assert get(store, 1)[0] is LoadOutcome.CORRUPT
        assert put(store, 1) == (PutOutcome.STORED,)  # over the damaged one


def test_a_tier_that_hangs_costs_its_deadline_once_and_comes_back(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    fast = FaultyStore(memory(), FaultPlan(rules=(FaultRule(fault=Fault.HANG),)))
    file = FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False)
    with over(fast, file, probe_after_s=0.05) as store:
        put(store, 1, 2)
        assert store.drain(TIMEOUT_S)
        for _ in range(3):  # reads of one restoration
            assert get(store, 1, deadline_s=0.5)[0] is OK
        assert not store.stats().tiers[0].delivers
        while_out = fast.injected()[Fault.HANG]
        assert all(get(store, 2)[0] is OK for _ in range(20))
        assert fast.injected()[Fault.HANG] <= while_out + 5  # probes, which nobody waits for
        assert store.locate([key(1)]) == (1,)
        fast.set_plan(FaultPlan())
        eventually(lambda: store.stats().tiers[0].delivers)
        assert store.stats().tiers[0].num_outages == 1
        assert store.locate([key(1)]) == (0,)
        assert get(store, 1)[0] is OK
    said = [record.message for record in caplog.records if "tier fast" in record.message]
    assert "is taken out of service" in said[0]
    assert "is back in service" in said[1]
    assert len(said) == 2


def test_a_slow_tier_that_fails_is_out_and_its_objects_are_missed(slow):
    faulty = FaultyStore(slow, FaultPlan(rules=(FaultRule(fault=Fault.ERROR),)))
    with over(memory(), faulty, probe_after_s=0.05) as store:
        put(slow, *range(5))
        assert [get(store, number)[0] for number in range(3)] == [LoadOutcome.ERROR] * 3
        assert store.contains([key(4)]) == (False,)
        assert put(store, 7) == (PutOutcome.STORED,)
        faulty.set_plan(FaultPlan())
        eventually(lambda: store.contains([key(4)])[0])
        assert get(store, 4)[0] is OK


def test_a_transfer_that_hangs_keeps_its_buffer_from_the_next_tier():
    hung = GatedStore(reads=True)
    with over(hung, memory()) as store:
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        buffer = np.full(1000, 7, np.uint8)
        handle = store.submit_get([GetRequest(key(1), buffer)], deadline_s=0.2)
        assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,)
        assert (buffer == 7).all()
        hung.open_gates()
        handle.cancel()
        held = buffer.copy()
        assert get(store, 1)[0] is OK
        assert np.array_equal(buffer, held)


def test_a_tier_that_does_not_say_what_it_holds_is_out(slow):
    with over(memory(), slow, probe_after_s=0.05) as store:
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        slow.questions.clear()
        assert store.contains([key(1), key(2)]) == (True, False)
        assert not store.stats().tiers[1].delivers
        assert store.contains([key(1), key(2)]) == (True, False)
        slow.questions.set()
        eventually(lambda: store.stats().tiers[1].delivers)


def test_a_tier_has_longer_for_a_question_about_many_objects(slow, monkeypatch):
    monkeypatch.setattr(tier, "QUESTION_S", 0.001)
    monkeypatch.setattr(tier, "QUESTION_KEY_S", 2 * TIMEOUT_S)
    with over(memory(), slow) as store:
        slow.questions.clear()
        opened = threading.Timer(0.1, slow.questions.set)
        opened.start()
        assert store.contains([key(1)]) == (False,)
        assert store.stats().tiers[1].delivers
        opened.join()


def test_a_tier_that_deletes_slowly_stays_in_service_and_ends_it(slow, monkeypatch):
    monkeypatch.setattr(tier, "QUESTION_S", 0.01)
    with over(memory(), slow) as store:
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        erasable, remove = threading.Event(), slow.remove
        slow.remove = lambda key: erasable.wait(TIMEOUT_S) and remove(key)
        assert store.delete([key(1)]) == 1, "that of the fast tier"
        assert store.stats().tiers[1].delivers
        erasable.set()
        eventually(lambda: not slow.contains([key(1)])[0])


def test_a_store_that_raises_when_it_is_written_to_costs_the_copies_alone(slow, caplog):
    with over(memory(), slow) as store:
        submit, slow.submit_put = slow.submit_put, _raises
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        slow.submit_put = submit
        put(store, 2)
        assert store.drain(TIMEOUT_S)
        assert slow.contains([key(1), key(2)]) == (False, True)
        assert store.stats().tiers[1].num_dropped == 1
    assert "1 objects could not be written to it" in caplog.text


def test_a_store_that_raises_when_it_is_probed_is_probed_again(slow, caplog):
    with over(memory(), slow, probe_after_s=0.01) as store:
        put(slow, *range(5))
        read, slow.read_record = slow.read_record, _fails
        for number in range(3):
            get(store, number)
        submit, slow.submit_get = slow.submit_get, _raises
        slow.read_record = read
        eventually(lambda: "could not be probed" in caplog.text)
        slow.submit_get = submit
        eventually(lambda: store.stats().tiers[1].delivers)
        assert store.tiers[1].wait_until_unread(0.0)
        assert get(store, 4)[0] is OK


def test_a_tier_far_below_what_was_measured_is_out_until_it_delivers():
    num_bytes = 1_000_000
    link = ThrottledStore(memory(), 1e7)
    with over(memory(), link, probe_after_s=0.05) as store:
        put(link, *range(8), num_bytes=num_bytes)
        store.tiers[1].promise(bytes_per_s=1e9, latency_s=1e-3)
        assert [get(store, number, num_bytes)[0] for number in range(8)] == [OK] * 8
        assert not store.stats().tiers[1].delivers
        link.set_bandwidth(1e12)
        eventually(lambda: store.stats().tiers[1].delivers)
        assert store.stats().tiers[1].num_outages == 1


def test_small_objects_that_take_the_latency_take_no_tier_out():
    """One after the other, from a store far away that delivers what was measured."""
    far = ThrottledStore(memory(), 1e9, latency_s=0.01)
    with over(memory(), far) as store:
        put(far, *range(12))
        store.tiers[1].promise(bytes_per_s=1e9, latency_s=0.01)
        assert [get(store, number)[0] for number in range(12)] == [OK] * 12
        assert store.stats().tiers[1].num_outages == 0


def test_a_small_object_brings_a_tier_back_that_takes_longer_for_it_than_the_median():
    far = FaultyStore(ThrottledStore(memory(), 1e9, latency_s=0.02), FaultPlan())
    with over(memory(), far, probe_after_s=0.05) as store:
        put(far, *range(3))
        store.tiers[1].promise(bytes_per_s=1e9, latency_s=0.01)
        far.set_plan(FaultPlan(rules=(FaultRule(fault=Fault.ERROR, probability=1.0),)))
        for number in range(3):
            assert get(store, number)[0] is LoadOutcome.ERROR
        assert not store.stats().tiers[1].delivers
        far.set_plan(FaultPlan())
        eventually(lambda: store.stats().tiers[1].delivers, patience_s=10.0)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_tiers_do_what_is_read_is_right(tmp_path, seed):
    """Both tiers flap: reads fail in every way, writes fail."""
    rules = tuple(FaultRule(fault=fault, probability=0.1) for fault in Fault)
    fast = FaultyStore(MemoryStore(capacity_bytes=60_000), FaultPlan())
    file = FaultyStore(FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False), FaultPlan())
    read = 0
    with over(fast, file, probe_after_s=0.01, drain_s=1.0) as store:
        put(store, *range(30))
        assert store.drain(TIMEOUT_S)
        for number, faulty in enumerate((fast, file)):
            faulty.set_plan(FaultPlan(rules=rules, seed=seed + 9 * number, late_s=0.01))
        for number in range(60):
            put(store, number % 30)
            outcome, buffer = get(store, number * 7 % 30, deadline_s=0.1)
            assert outcome is not OK or np.array_equal(buffer, payload(number * 7 % 30))
            read += outcome is OK
        for faulty in (fast, file):
            faulty.set_plan(FaultPlan())
        eventually(lambda: all(tier.delivers for tier in store.stats().tiers))
        store.delete([key(number) for number in range(30)])
        put(store, *range(30))
        assert store.drain(TIMEOUT_S)
        assert all(np.array_equal(get(store, number)[1], payload(number)) for number in range(30))
    assert read > 10


# Both at once


def test_reads_of_a_slow_tier_do_not_stand_in_the_way_of_a_fast_one():
    link = ThrottledStore(memory(), 1e12, 30.0)
    with over(memory(), link) as store:
        put(link, 1, 2, 3)
        put(store.tiers[0].store, *range(4, 8))
        buffers = [np.zeros(1000, np.uint8) for _ in range(8)]
        handle = store.submit_get([GetRequest(key(number), buffers[number]) for number in range(1, 8)])
        eventually(lambda: handle.poll()[3:] == (OK,) * 4)
        assert handle.poll()[:3] == (None,) * 3
        handle.cancel()
        assert handle.poll() == (LoadOutcome.CANCELLED,) * 3 + (OK,) * 4


def test_the_fastest_tier_lends_and_what_another_has_is_copied():
    fast, slow = MemoryStore(capacity_bytes=CAPACITY, verified_share=1.0), MemoryStore(capacity_bytes=CAPACITY)
    reader = Reader()
    with TieredStore({"fast": fast, "slow": slow}) as store:
        store.lend_to(reader)
        put(store, 1)
        assert store.drain(TIMEOUT_S)
        outcome, loan, buffer = borrow(store, 1)
        assert outcome is OK
        assert np.array_equal(loan.payload, payload(1))
        assert not buffer.any()
        loan.end()

        (slab,) = reader.slabs
        slab[slab.tobytes().find(payload(1).tobytes())] ^= 1
        outcome, loan, buffer = borrow(store, 1)
        assert (outcome, loan.payload) == (OK, None), "damaged in the fast tier, and read from the slow one"
        assert np.array_equal(buffer, payload(1))

        put(slow, 2)
        outcome, loan, buffer = borrow(store, 2)
        assert (outcome, loan.payload) == (OK, None)
        assert np.array_equal(buffer, payload(2))
        assert store.drain(TIMEOUT_S)
        assert np.array_equal(get(fast, 2)[1], payload(2)), "what was promoted is what was read"
        assert store.stats().num_lent == 1


def test_what_nobody_asks_about_any_more_reaches_the_slow_tier_too(slow):
    with over(memory(), slow) as store:
        store.submit_put([put_request(1)])  # as a saver whose engine has become idle
        eventually(lambda: slow.contains([key(1)])[0])


def test_a_pin_waits_for_what_is_still_to_be_written():
    hung = GatedStore(writes=True)
    with over(MemoryStore(capacity_bytes=3 * 5120, retention=Retention(pinned_share=0.1)), hung) as store:
        put(store, 1)
        threading.Timer(0.2, hung.open_gates).start()
        assert store.pin([key(1)], ttl_s=60.0) == (PinOutcome.PINNED,), "refused by the fast tier, held in the slow one"


def test_tiers_behind_one_link_are_told_apart_and_counted_as_one():
    tiers = over(memory(), memory())
    with FaultyStore(ThrottledStore(tiers, 1e9), FaultPlan()) as store:
        put(tiers.tiers[1].store, 1)
        assert store.locate([key(1)]) == (1,)
        for tier in tiers.tiers:
            tier.promise(bytes_per_s=1e8, latency_s=0.0)
        assert tiers.tier_rates() == FaultyStore(tiers, FaultPlan()).tier_rates() == (1e8, 1e8)
        assert store.tier_rates() == ()
        assert len(store.stats().tiers) == 2


def test_a_pin_does_not_wait_for_a_slow_tier_that_hangs_a_second_time(slow):
    slow.writes.clear()
    with over(memory(), slow, drain_s=0.0) as store:
        put(store, *range(8))
        copies = store.tiers[1].copies
        assert not copies.settle([key(1)], 0.01)
        assert not copies.settle([key(2)], 3600.0)  # or this test would time out
        slow.writes.set()
        assert store.drain(TIMEOUT_S)
        assert copies.settle([key(1), key(2)], 3600.0)


def _raises(*_, **__):
    raise RuntimeError("can't start new thread")


def _fails(*_):
    raise OSError("it fails")
