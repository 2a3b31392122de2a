"""Wrappers that are slow or fail on purpose."""

import threading

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.stores.base import GetRequest, PutOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.types import LoadOutcome
from support.kv_like import kv_payload, put_kv
from support.store_objects import TIMEOUT_S, get, key, payload, put, put_request
from support.waiting import eventually

OK, LATE, CANCELLED = LoadOutcome.OK, LoadOutcome.LATE, LoadOutcome.CANCELLED
FOREVER = 1e-3  # bytes per second


@pytest.fixture
def inner():
    with MemoryStore(capacity_bytes=1 << 22) as store:
        put(store, *range(8))
        yield store


def read(store, *numbers, **options):
    buffers = [np.zeros(1000, np.uint8) for _ in numbers]
    requests = [GetRequest(key(number), buffer) for number, buffer in zip(numbers, buffers, strict=True)]
    return store.submit_get(requests, **options), buffers


# Throttled.


def test_a_slow_read_is_pending_then_late_then_never_ok(inner):
    store = ThrottledStore(inner, FOREVER)
    handle, _ = read(store, 1, deadline_s=0.03)
    assert handle.poll() == (None,)
    assert handle.wait(0.001) == (None,)
    assert handle.wait() == (LATE,)
    assert store.stats().get_outcomes[LATE] == 1


def test_misses_and_failures_do_not_wait_for_the_link(inner):
    store = ThrottledStore(inner, FOREVER)
    slow, _ = read(store, 1)
    missing, _ = read(store, 99)
    assert missing.wait(TIMEOUT_S) == (LoadOutcome.MISS,)
    assert slow.poll() == (None,)


def test_reads_pass_in_the_order_of_submission_and_free_the_link_when_cancelled(inner):
    store = ThrottledStore(inner, FOREVER)
    first, _ = read(store, 1)
    second, (buffer,) = read(store, 2)
    eventually(lambda: inner.stats().get_outcomes[OK] == 2)  # from now on the link alone holds them back
    assert (first.poll(), second.poll()) == ((None,), (None,))
    store.set_bandwidth(1e9, after_bytes=0)
    assert second.wait(TIMEOUT_S) == (OK,)
    assert first.poll() == (OK,)
    assert np.array_equal(buffer, payload(2))
    store.set_bandwidth(FOREVER)
    stuck, _ = read(store, 3)
    stuck.cancel()
    assert stuck.poll() == (CANCELLED,)
    store.set_bandwidth(1e9)
    assert get(store, 4)[0] is OK


def test_a_change_of_bandwidth_wakes_who_waits(inner):
    store = ThrottledStore(inner, FOREVER)
    handle, _ = read(store, 1, 2, 3)
    outcomes = []
    waiter = threading.Thread(target=lambda: outcomes.append(handle.wait(TIMEOUT_S)))
    waiter.start()
    assert handle.wait(0.01) == (None,) * 3
    store.set_bandwidth(1e9)
    waiter.join(TIMEOUT_S)
    assert outcomes == [(OK,) * 3]


def test_bandwidth_drops_after_so_many_bytes(inner):
    store = ThrottledStore(inner, 1e9)
    store.set_bandwidth(FOREVER, after_bytes=2500)
    handle, _ = read(store, 1, 2, 3, deadline_s=0.3)
    assert handle.wait(TIMEOUT_S) == (OK, OK, LATE)
    assert store.bytes_per_s == FOREVER


def test_cancelling_from_another_thread_wakes_who_waits(inner):
    store = ThrottledStore(inner, FOREVER)
    handle, _ = read(store, 1)
    outcomes = []
    waiter = threading.Thread(target=lambda: outcomes.append(handle.wait()))
    waiter.start()
    handle.cancel()
    waiter.join(TIMEOUT_S)
    assert outcomes == [(CANCELLED,)]


def test_closing_cancels_what_is_held_back(inner):
    store = ThrottledStore(inner, FOREVER)
    handle, _ = read(store, 1)
    store.close()
    assert handle.wait() == (CANCELLED,)


def test_writes_are_throttled_only_on_request(inner):
    assert put(ThrottledStore(inner, FOREVER), 20) == (PutOutcome.STORED,)
    throttled = ThrottledStore(inner, FOREVER, throttle_puts=True)
    handle = throttled.submit_put([put_request(21)], deadline_s=0.02)
    assert handle.wait() == (PutOutcome.LATE,)


def test_a_throttled_write_costs_what_is_stored_of_it():
    raw_bytes = kv_payload(1).nbytes
    with ThrottledStore(open_store("memory?codec=int8", capacity_bytes=1 << 20), 1e9, throttle_puts=True) as store:
        store.set_bandwidth(FOREVER, after_bytes=int(0.6 * raw_bytes))
        assert put_kv(store, 1) is PutOutcome.STORED
        assert store.stats().written_bytes == raw_bytes
        handle = store.submit_put([put_request(21, payload(21, raw_bytes))])
        assert handle.wait(0.05) == (None,), "no codec makes this one shorter"


def test_the_measured_bandwidth_is_that_of_the_schedule(inner):
    store = ThrottledStore(inner, 200_000.0)
    handle, _ = read(store, 1, 2, 3)
    assert handle.wait(TIMEOUT_S) == (OK,) * 3
    assert store.stats().read_bytes_per_s <= 200_000 * 1.001  # never above, however late this test was scheduled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes_per_s": 0.0}, "bytes_per_s"),
        ({"bytes_per_s": -5.0}, "bytes_per_s"),
        ({"bytes_per_s": 1.0, "latency_s": -1.0}, "latency_s"),
        ({"bytes_per_s": 1.0, "jitter_s": -1.0}, "jitter_s"),
    ],
)
def test_bad_links_are_refused(inner, options, message):
    with pytest.raises(ConfigError, match=message):
        ThrottledStore(inner, **options)


def test_a_bad_change_of_bandwidth_is_refused(inner):
    with pytest.raises(ConfigError):
        ThrottledStore(inner, 1.0).set_bandwidth(0.0)


# Faulty.


def faulty(inner, *rules, **options):
    return FaultyStore(inner, FaultPlan(rules=rules, **options))


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.MISS, LoadOutcome.MISS),
        (Fault.ERROR, LoadOutcome.ERROR),
        (Fault.CORRUPT, LoadOutcome.CORRUPT),
        (Fault.LATE, LATE),
        (Fault.HANG, LATE),
    ],
)
def test_a_fault_strikes_the_matching_key_alone_and_is_counted(inner, fault, outcome):
    store = faulty(inner, FaultRule(fault=fault, matches=lambda each: each == key(2)))
    deadline_s = 0.3 if outcome is LATE else None
    handle, buffers = read(store, 1, 2, 3, deadline_s=deadline_s)
    assert handle.wait(TIMEOUT_S) == (OK, outcome, OK)
    assert np.array_equal(buffers[2], payload(3))
    assert store.injected() == dict.fromkeys(Fault, 0) | {fault: 1}
    assert store.stats().injected[fault.value] == 1
    assert store.stats().get_outcomes[outcome] == 1


def test_corruption_is_a_flipped_bit_that_verification_finds(inner):
    store = faulty(inner, FaultRule(fault=Fault.CORRUPT))
    for number in range(8):
        assert get(store, number)[0] is LoadOutcome.CORRUPT
    assert inner.stats().get_outcomes[LoadOutcome.CORRUPT] == 8
    assert get(inner, 1)[0] is OK  # on the way, not on the medium


def test_corruption_reaches_through_a_link(inner):
    store = faulty(ThrottledStore(inner, 1e9), FaultRule(fault=Fault.CORRUPT))
    assert get(store, 1)[0] is LoadOutcome.CORRUPT


def test_a_hang_lasts_until_it_is_cancelled_and_touches_nothing(inner):
    store = faulty(inner, FaultRule(fault=Fault.HANG))
    handle, (buffer,) = read(store, 1)
    assert handle.wait(0.01) == (None,)
    handle.cancel()
    assert handle.poll() == (CANCELLED,)
    assert not buffer.any()


def test_a_hang_ends_with_the_store(inner):
    store = faulty(inner, FaultRule(fault=Fault.HANG))
    handle, _ = read(store, 1)
    store.close()
    assert handle.wait() == (CANCELLED,)
    assert get(store, 1)[0] is LoadOutcome.ERROR


def test_late_without_a_deadline_is_only_delayed(inner):
    store = faulty(inner, FaultRule(fault=Fault.LATE), late_s=0.02)
    handle, (buffer,) = read(store, 1)
    assert handle.poll() == (None,)
    assert handle.wait(TIMEOUT_S) == (OK,)
    assert np.array_equal(buffer, payload(1))


def test_every_nth_and_limit(inner):
    store = faulty(inner, FaultRule(fault=Fault.MISS, every=3, limit=2))
    outcomes = [get(store, 1)[0] for _ in range(12)]
    struck = [index for index, outcome in enumerate(outcomes) if outcome is LoadOutcome.MISS]
    assert struck == [2, 5]


def test_a_store_that_fails_and_works_by_turns(inner):
    store = faulty(inner, FaultRule(fault=Fault.ERROR, every=4, in_a_row=2))
    outcomes = [get(store, 1)[0] for _ in range(13)]
    struck = [number for number, outcome in enumerate(outcomes, 1) if outcome is LoadOutcome.ERROR]
    assert struck == [4, 5, 8, 9, 12, 13]


def test_probability_is_seeded(inner):
    def run(seed):
        store = faulty(inner, FaultRule(fault=Fault.ERROR, probability=0.5), seed=seed)
        return [get(store, 1)[0] for _ in range(30)]

    assert run(1) == run(1) != run(2)
    assert 3 < run(1).count(OK) < 27


def test_the_first_rule_that_strikes_decides(inner):
    store = faulty(
        inner,
        FaultRule(fault=Fault.MISS, matches=lambda each: each == key(1)),
        FaultRule(fault=Fault.ERROR),
    )
    handle, _ = read(store, 1, 2)
    assert handle.wait(TIMEOUT_S) == (LoadOutcome.MISS, LoadOutcome.ERROR)


def test_put_errors_store_nothing(inner):
    store = faulty(inner, FaultRule(fault=Fault.PUT_ERROR, every=2))
    assert put(store, 30, 31, 32) == (PutOutcome.STORED, PutOutcome.ERROR, PutOutcome.STORED)
    assert store.contains([key(30), key(31)]) == (True, False)


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"probability": 1.5}, {"probability": -0.1}, {"in_a_row": 0}, {"in_a_row": 2}]
)
def test_bad_rules_are_refused(options):
    with pytest.raises(ConfigError, match="fault rule"):
        FaultRule(fault=Fault.MISS, **options)
