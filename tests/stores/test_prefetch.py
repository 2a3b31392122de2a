"""Objects brought into the fastest tier before they are read: what comes, what it may cost, and whom it lets pass."""

import threading

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.stores import prefetcher
from cacheflow.stores.base import GetRequest, PrefetchOutcome, PrefetchRequest, Priority, PutRequest
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import next_key
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.prefetcher import WINDOW
from cacheflow.stores.retention import Retention
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.kv_like import kv_payload, put_kv
from support.manual_clock import ManualClock
from support.store_kinds import url_of
from support.store_objects import NAMESPACE, TIMEOUT_S, get, key, payload, put, put_request
from support.waiting import eventually

CAPACITY = 64 << 20
RECORD = 4096 + 1000
LONG_S = 60.0
OK = LoadOutcome.OK
FETCHED, USED, WASTED, DROPPED = (
    PrefetchOutcome.FETCHED, PrefetchOutcome.USED, PrefetchOutcome.WASTED, PrefetchOutcome.DROPPED,
)  # fmt: skip


class NotingStore(MemoryStore):
    """Notes which reads begin, and with which priority they came; holds reads and writes up until a test lets them."""

    def __init__(self, *, num_threads=2, capacity_bytes=CAPACITY, **options):
        super().__init__(capacity_bytes=capacity_bytes, num_threads=num_threads, **options)
        self.begun, self.batches = [], []
        self.reads, self.writes = threading.Event(), threading.Event()
        self.reads.set()
        self.writes.set()

    def submit_get(self, requests, *, priority=0, deadline_s=None):
        self.batches.append((priority, len(requests)))
        return super().submit_get(requests, priority=priority, deadline_s=deadline_s)

    def read_record(self, key, header, payload):
        self.begun.append(int(key.chain_hash, 16))
        found = super().read_record(key, header, payload)
        assert self.reads.wait(LONG_S)
        return found

    def write_record(self, key, parts, *, replace):
        assert self.writes.wait(LONG_S)
        return super().write_record(key, parts, replace=replace)


@pytest.fixture
def slow():
    store = NotingStore()
    yield store
    store.reads.set()
    store.writes.set()


def memory(num_records=1000, **retention):
    return MemoryStore(capacity_bytes=num_records * RECORD, retention=Retention(**retention))


def over(fast, slow, **options):
    return TieredStore({"fast": fast, "slow": slow}, **options)


def prefetch(store, *numbers, within_s=LONG_S, num_bytes=1000, **options):
    requests = [PrefetchRequest(key(number), num_bytes) for number in numbers]
    return store.prefetch(requests, within_s=within_s, **options)


def counts(store):
    return {outcome: count for outcome, count in store.stats().prefetches.items() if count}


def settled(store, num_objects):
    """Wait until so many prefetches have ended; returns the counts."""
    ended = (FETCHED, DROPPED)
    eventually(lambda: sum(store.stats().prefetches[each] for each in ended) >= num_objects)
    return counts(store)


def held(store, numbers):
    return [number for number, there in zip(numbers, store.contains([key(n) for n in numbers]), strict=True) if there]


@pytest.fixture
def asked_in_vain(monkeypatch):
    """How often the prefetcher found that others read from the tier it wants to read from."""
    from cacheflow.stores.tier import Tier

    waits, wait = [], Tier.wait_until_unread

    def noting(tier, timeout_s):
        free = wait(tier, timeout_s)
        if not free:
            waits.append(tier.name)
        return free

    monkeypatch.setattr(Tier, "wait_until_unread", noting)
    monkeypatch.setattr(prefetcher, "SLICE_S", 0.005)
    return waits


# What comes


@pytest.mark.parametrize("kinds", [("memory", "file"), ("shm", "file"), ("memory", "redis")], ids=" over ".join)
def test_what_is_in_a_slower_tier_is_brought_into_the_fastest_one(kinds, request, tmp_path):
    urls = [url_of(kind, request, tmp_path / "store") for kind in kinds]
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        fast, slow = (tier.store for tier in store.tiers)
        put(slow, *range(5))
        assert prefetch(store, *range(5)) == 5
        assert settled(store, 5) == {FETCHED: 5}
        assert held(fast, range(5)) == [*range(5)]
        assert store.locate([key(number) for number in range(5)]) == (0,) * 5
        before = slow.stats().get_outcomes[OK]
        for number in range(5):
            outcome, buffer = get(store, number)
            assert outcome is OK
            assert np.array_equal(buffer, payload(number))
        assert slow.stats().get_outcomes[OK] == before, "it was read from the fast tier"
        assert counts(store) == {FETCHED: 5, USED: 5}


def test_what_is_there_already_or_nowhere_is_not_read(slow):
    with over(memory(), slow) as store:
        put(store.tiers[0].store, 1)
        put(slow, 1, 3)
        assert prefetch(store, 1, 2, 3) == 3
        assert settled(store, 1) == {FETCHED: 1}
        assert slow.begun == [3]
        assert prefetch(store, 1, 2, 3, 4) == 4
        put(slow, 5)
        prefetch(store, 5)
        assert settled(store, 2) == {FETCHED: 2}
        assert slow.begun == [3, 5]


def test_of_three_tiers_each_object_comes_from_the_fastest_that_has_it(slow):
    middle = NotingStore()
    with TieredStore({"fast": memory(), "middle": middle, "slow": slow}) as store:
        put(middle, 1, 2)
        put(slow, 2, 3)
        prefetch(store, 1, 2, 3)
        assert settled(store, 3) == {FETCHED: 3}
        assert (middle.begun, slow.begun) == ([1, 2], [3])


def test_it_goes_in_the_order_asked_for_a_few_at_a_time_and_after_all_others(slow):
    with over(memory(), slow) as store:
        put(slow, *range(7))
        prefetch(store, 6, 5, 4, 3, 2, 1, 0)
        assert settled(store, 7) == {FETCHED: 7}
        assert set(slow.batches) <= {(Priority.AHEAD, count) for count in range(1, WINDOW + 1)}
        for first in range(0, 7, WINDOW):  # what is read at once may begin in any order
            assert set(slow.begun[first : first + WINDOW]) == set(range(7)[::-1][first : first + WINDOW])


def test_notes_that_change_are_left_where_they_are(slow):
    note = next_key(NAMESPACE.digest, b"\1" * 32)
    with over(memory(), slow) as store:
        slow.submit_put([PutRequest(note, [payload(1)], (1000,), "uint8")]).wait(TIMEOUT_S)
        put(slow, 1)
        assert store.prefetch([PrefetchRequest(note, 1000), PrefetchRequest(key(1), 1000)], within_s=LONG_S) == 1
        settled(store, 1)
        assert not store.tiers[0].store.contains([note])[0]


def test_a_store_without_tiers_does_nothing_and_wrappers_pass_it_on(slow):
    with memory() as alone:
        put(alone, 1)
        assert prefetch(alone, 1) == 0
        assert counts(alone) == {}
    wrapped = FaultyStore(ThrottledStore(over(memory(), slow), 1e9), FaultPlan())
    with wrapped as store:
        put(slow, 1)
        assert prefetch(store, 1) == 1
        assert settled(store, 1) == {FETCHED: 1}


@pytest.mark.parametrize("options", [{"within_s": 0.0}, {"within_s": float("nan")}, {"keep_s": -1.0}])
def test_what_means_nothing_is_refused(slow, options):
    with over(memory(), slow) as store, pytest.raises(ConfigError, match="prefetch within_s is"):
        prefetch(store, 1, **options)


# What it may cost


def test_at_least_half_of_the_fast_tier_is_left_to_what_was_used(slow):
    with over(memory(10), slow) as store:
        put(slow, *range(100, 120))
        put(store.tiers[0].store, *range(10))
        prefetch(store, *range(100, 120))
        ended = settled(store, 20)
        assert ended[FETCHED] + ended[DROPPED] == 20
        assert WINDOW <= ended[FETCHED] <= 5
        assert held(store.tiers[0].store, range(5, 10)) == [*range(5, 10)], "the last used"
        assert len(slow.begun) == ended[FETCHED], "what finds no room is not read either"


def test_what_a_codec_makes_shorter_takes_less_of_that_share():
    """Room for five of them as they are, and for six as they are stored."""
    raw_bytes = kv_payload(0).nbytes
    capacity_bytes = 2 * (5 * (4096 + raw_bytes) + 2000)
    fast = open_store("memory?codec=int8", capacity_bytes=capacity_bytes)
    with over(fast, open_store("memory?codec=int8", capacity_bytes=CAPACITY)) as store:
        for number in range(6):
            put_kv(store.tiers[1].store, number)
        prefetch(store, *range(6), num_bytes=raw_bytes)
        assert settled(store, 6) == {FETCHED: 6}
        assert fast.stats().used_bytes < 6 * (4096 + 0.6 * raw_bytes)


def test_room_is_found_again_once_it_was_read_or_has_gone(slow, monkeypatch):
    monkeypatch.setattr(prefetcher, "SWEEP_S", 0.01)
    with over(memory(10), slow) as store:
        put(slow, *range(100, 120))
        prefetch(store, *range(100, 104))
        assert settled(store, 4) == {FETCHED: 4}
        prefetch(store, 104, 105)
        assert settled(store, 6) == {FETCHED: 4, DROPPED: 2}
        assert [get(store, number)[0] for number in (100, 101)] == [OK] * 2
        prefetch(store, 104, 105)
        assert settled(store, 8) == {FETCHED: 6, DROPPED: 2, USED: 2}
        put(store.tiers[0].store, *range(10))  # others throw out all of it
        eventually(lambda: counts(store).get(WASTED) == 4)
        prefetch(store, *range(106, 110))
        assert settled(store, 12)[FETCHED] == 10


def test_what_nobody_reads_counts_as_others_do_after_a_while(slow):
    clock = ManualClock()
    with over(memory(10), slow, clock=clock) as store:
        put(slow, *range(100, 120))
        prefetch(store, *range(100, 104))
        settled(store, 4)
        clock.sleep(prefetcher.UNUSED_S + 1)
        prefetch(store, *range(104, 108))
        assert settled(store, 8) == {FETCHED: 8}


def test_what_is_pinned_is_never_thrown_out(slow):
    fast = memory(10, pinned_share=1.0)
    with over(fast, slow) as store:
        put(fast, *range(10))
        put(slow, *range(100, 110))
        fast.pin([key(number) for number in range(9)], ttl_s=LONG_S)
        prefetch(store, *range(100, 110))
        assert settled(store, 10) == {DROPPED: 10}
        assert held(fast, range(10)) == [*range(10)]
        assert slow.begun == []


def test_what_is_kept_is_pinned_once_it_is_there(slow):
    fast = memory(10)
    with over(fast, slow) as store:
        put(slow, *range(100, 104))
        prefetch(store, 100, 101, keep_s=LONG_S)
        prefetch(store, 102, 103)
        assert settled(store, 4) == {FETCHED: 4}
        eventually(lambda: fast.stats().pinned_bytes == 2 * RECORD)
        put(fast, *range(20))
        assert held(fast, range(100, 104)) == [100, 101]
        put(fast, 1)
        prefetch(store, 1, keep_s=LONG_S)
        eventually(lambda: fast.stats().pinned_bytes == 3 * RECORD)  # what is there already is pinned too
        store.unpin([key(100), key(101), key(1)])
        put(fast, *range(30, 50))
        assert held(fast, [100, 101, 1]) == []


def test_what_is_let_go_of_meanwhile_is_not_pinned(slow):
    fast = memory(10)
    slow.reads.clear()
    with over(fast, slow) as store:
        put(slow, 1)
        prefetch(store, 1, keep_s=LONG_S)
        eventually(lambda: slow.begun == [1])
        store.unpin([key(1)])
        slow.reads.set()
        assert settled(store, 1) == {FETCHED: 1}
        put(fast, *range(100, 120))
        assert held(fast, [1]) == []
        assert fast.stats().pinned_bytes == 0


def test_what_is_deleted_meanwhile_does_not_appear(slow):
    fast = memory()
    slow.reads.clear()
    with over(fast, slow) as store:
        put(slow, 1, 2, 3)
        prefetch(store, 1, 2, 3)
        eventually(lambda: set(slow.begun) == {1, 2})
        assert store.delete([key(1), key(3)]) == 2
        slow.reads.set()
        assert settled(store, 1) == {FETCHED: 1}
        put(slow, 4)
        prefetch(store, 4)  # after all that was asked for before
        settled(store, 2)
        assert held(fast, [1, 2, 3, 4]) == [2, 4]


# Whom it lets pass


def test_it_does_not_read_from_a_tier_from_which_somebody_reads(slow, asked_in_vain):
    slow.reads.clear()
    with over(memory(), slow) as store:
        put(slow, *range(4))
        buffer = np.zeros(1000, np.uint8)
        running = store.submit_get([GetRequest(key(0), buffer)])
        eventually(lambda: slow.begun == [0])  # the other thread of the store is free
        prefetch(store, 1, 2, 3)
        eventually(lambda: len(asked_in_vain) >= 3)
        assert slow.begun == [0]
        slow.reads.set()
        assert running.wait(TIMEOUT_S) == (OK,)
        assert settled(store, 3) == {FETCHED: 3}
        assert [priority for priority, _ in slow.batches] == [Priority.READ, Priority.AHEAD, Priority.AHEAD]


def test_a_read_that_comes_meanwhile_goes_first():
    slow = NotingStore(num_threads=1)
    slow.reads.clear()
    with over(memory(), slow) as store:
        put(slow, *range(6))
        prefetch(store, 0, 1, 2)
        eventually(lambda: slow.begun == [0])  # one is on its way; the second waits in the store's queue
        buffers = np.zeros((2, 1000), np.uint8)
        running = store.submit_get([GetRequest(key(4 + number), buffers[number]) for number in range(2)])
        slow.reads.set()
        assert running.wait(TIMEOUT_S) == (OK,) * 2
        assert settled(store, 3) == {FETCHED: 3}
        assert slow.begun == [0, 4, 5, 1, 2]


def test_what_somebody_reads_is_not_brought_any_more(slow, asked_in_vain):
    slow.reads.clear()
    with over(memory(), slow) as store:
        put(slow, *range(5))
        buffers = np.zeros((2, 1000), np.uint8)
        first = store.submit_get([GetRequest(key(0), buffers[0])])
        prefetch(store, 1, 2, 3)
        eventually(lambda: asked_in_vain)
        second = store.submit_get([GetRequest(key(2), buffers[1])])
        slow.reads.set()
        assert first.wait(TIMEOUT_S) == second.wait(TIMEOUT_S) == (OK,)
        assert settled(store, 2) == {FETCHED: 2}
        assert sorted(slow.begun) == [0, 1, 2, 3], "each once"


def test_it_waits_until_the_fast_tier_has_nothing_to_be_written(slow, monkeypatch):
    monkeypatch.setattr(prefetcher, "SLICE_S", 0.005)
    fast = NotingStore()
    with over(fast, slow) as store:
        put(slow, 1, 2)
        fast.writes.clear()
        assert get(store, 1)[0] is OK  # is being promoted
        drains, drain = [], store.tiers[0].copies.drain

        def noting(timeout_s):
            drains.append(drain(timeout_s))
            return drains[-1]

        monkeypatch.setattr(store.tiers[0].copies, "drain", noting)
        prefetch(store, 2)
        eventually(lambda: len(drains) >= 3)
        assert slow.begun == [1]
        fast.writes.set()
        assert settled(store, 1) == {FETCHED: 1}


def test_what_waits_for_too_long_is_dropped_and_can_be_asked_for_anew(slow, asked_in_vain):
    clock = ManualClock()
    slow.reads.clear()
    with over(memory(), slow, clock=clock) as store:
        put(slow, 0, 1, 2)
        buffer = np.zeros(1000, np.uint8)
        running = store.submit_get([GetRequest(key(0), buffer)])
        prefetch(store, 1, within_s=5.0)
        prefetch(store, 2, within_s=5.0)
        eventually(lambda: asked_in_vain)
        clock.sleep(4.0)
        prefetch(store, 2, within_s=5.0)
        clock.sleep(2.0)
        assert settled(store, 1) == {DROPPED: 1}
        slow.reads.set()
        assert running.wait(TIMEOUT_S) == (OK,)
        assert settled(store, 2) == {DROPPED: 1, FETCHED: 1}
        assert slow.begun == [0, 2]


def test_more_than_may_wait_is_dropped(slow, monkeypatch):
    monkeypatch.setattr(prefetcher, "MAX_WANTED", 3)
    slow.reads.clear()
    with over(memory(), slow) as store:
        put(slow, *range(6))
        assert prefetch(store, *range(6)) == 3
        assert counts(store) == {DROPPED: 3}
        slow.reads.set()
        assert settled(store, 6) == {DROPPED: 3, FETCHED: 3}


# Tiers that fail


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.HANG, Fault.LATE])
def test_a_slow_tier_that_fails_costs_prefetches_and_is_not_judged_by_them(slow, fault, monkeypatch):
    monkeypatch.setattr(prefetcher, "READ_S", 1.0)
    faulty, fast = FaultyStore(slow, FaultPlan(rules=(FaultRule(fault=fault),))), memory()
    with over(fast, faulty) as store:
        put(slow, *range(8))
        prefetch(store, *range(8))
        assert settled(store, 8) == {DROPPED: 8}
        assert held(fast, range(8)) == []
        assert store.stats().tiers[1].delivers
        assert store.stats().tiers[1].num_outages == 0
        gives_up = fault in (Fault.ERROR, Fault.HANG, Fault.LATE)
        assert faulty.injected()[fault] == (WINDOW if gives_up else 8), "one that does not work is not tried again"
        faulty.set_plan(FaultPlan())
        put(slow, *range(8))  # what was found damaged counts as absent until it is written again
        prefetch(store, *range(8))
        assert settled(store, 16) == {DROPPED: 8, FETCHED: 8}
        assert np.array_equal(get(fast, 7)[1], payload(7))


def test_a_fast_tier_that_takes_no_writes_costs_prefetches(slow):
    fast = FaultyStore(memory(), FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR),)))
    with over(fast, slow) as store:
        put(slow, *range(4))
        prefetch(store, *range(4))
        assert settled(store, 4) == {DROPPED: 4}
        assert get(store, 3)[0] is OK


def test_from_a_tier_that_is_out_nothing_is_brought(slow):
    faulty = FaultyStore(slow, FaultPlan(rules=(FaultRule(fault=Fault.ERROR),)))
    with over(memory(), faulty, probe_after_s=LONG_S) as store:
        put(slow, *range(5))
        assert [get(store, number)[0] for number in range(3)] == [LoadOutcome.ERROR] * 3
        before = faulty.injected()[Fault.ERROR]
        prefetch(store, 3, 4)
        assert settled(store, 2) == {DROPPED: 2}
        assert faulty.injected()[Fault.ERROR] == before


def test_a_size_that_is_wrong_costs_the_prefetch(slow):
    with over(memory(), slow) as store:
        put(slow, 1)
        prefetch(store, 1, num_bytes=999)
        assert settled(store, 1) == {DROPPED: 1}
        assert np.array_equal(get(store, 1)[1], payload(1))


def test_it_never_waits_for_a_store_and_closing_ends_it(slow):
    slow.reads.clear()
    store = over(memory(), slow, drain_s=0.05)
    put(slow, *range(8))
    assert prefetch(store, *range(8)) == 8
    eventually(lambda: len(slow.begun) == 2)
    assert prefetch(store, *range(8)) == 8
    assert len(store.stats().tiers) == 2
    threading.Timer(0.2, slow.reads.set).start()
    store.close()
    assert prefetch(store, 1) == 0
    store.close()
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "cacheflow-tier-prefetch"])


def test_a_bug_in_a_store_costs_prefetches_and_not_their_thread(slow, monkeypatch, caplog):
    with over(memory(), slow) as store:
        put(slow, 1, 2)
        with monkeypatch.context() as broken:

            def submit_get(requests, **options):
                raise RuntimeError("a bug")

            broken.setattr(slow, "submit_get", submit_get)
            prefetch(store, 1)
            assert settled(store, 1) == {DROPPED: 1}
        prefetch(store, 1, 2)
        assert settled(store, 3) == {DROPPED: 1, FETCHED: 2}
    assert "a bug" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_tiers_do_what_is_read_is_right(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(prefetcher, "READ_S", 1.0)
    rules = tuple(FaultRule(fault=fault, probability=0.1) for fault in Fault)
    fast = FaultyStore(memory(12), FaultPlan())
    file = FaultyStore(FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False), FaultPlan())
    with over(fast, file, probe_after_s=0.01, drain_s=1.0) as store:
        put(store, *range(30))
        assert store.drain(TIMEOUT_S)
        for number, faulty in enumerate((fast, file)):
            faulty.set_plan(FaultPlan(rules=rules, seed=seed + 9 * number, late_s=0.01))
        read = 0
        for number in range(60):
            wanted = [(number * 7 + each) % 30 for each in range(4)]
            prefetch(store, *wanted, keep_s=LONG_S * (number % 2))
            if number % 5 == 0:
                store.delete([key(wanted[1])])
            if number % 5 == 1:
                store.submit_put([put_request(wanted[0] % 30)]).wait(TIMEOUT_S)
            outcome, buffer = get(store, wanted[2], deadline_s=0.1)
            assert outcome is not OK or np.array_equal(buffer, payload(wanted[2]))
            read += outcome is OK
        for faulty in (fast, file):
            faulty.set_plan(FaultPlan())
        eventually(lambda: all(tier.delivers for tier in store.stats().tiers))
        prefetch(store, *range(30))
        assert all(get(store, n)[0] is OK or not held(store, [n]) for n in range(30))
    assert read > 10
