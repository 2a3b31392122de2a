"""Two tiers asked for one object: who wins, whose buffer is whose, how often it may happen; by a clock of the test."""

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import cacheflow.stores.tier as tiers
from cacheflow.stores.base import GetRequest
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.loan import Loan
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.tier import APART_READS, LEAST_RACE_S, RACE_BURST, RACE_READS, RACE_SHARE, Tier
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.gated_store import CAPACITY, GatedStore
from support.lending import Reader
from support.manual_clock import ManualClock
from support.store_objects import TIMEOUT_S, get, key, payload, put
from support.waiting import eventually

OK = LoadOutcome.OK
SLOW_S = 5 * LEAST_RACE_S
UNTOUCHED = 7


class Tiers:
    """A fast tier that can hang, over another, after as many reads as it takes to know how long one lasts."""

    def __init__(self, slow, *, fast=None):
        self.clock = ManualClock(100.0)
        self.fast, self.slow = GatedStore() if fast is None else fast, slow
        self.store = TieredStore({"fast": self.fast, "slow": slow}, clock=self.clock, drain_s=0.0, probe_after_s=1e9)
        put(self.store, *range(RACE_READS))
        assert self.store.drain(TIMEOUT_S)
        self.read_quickly(RACE_READS)

    def read_quickly(self, num_reads):
        for number in range(num_reads):
            assert get(self.store, number % RACE_READS)[0] is OK

    def begin(self, number, *, deadline_s=None, **options):
        """A read that the fast tier has begun and does not end."""
        self.fast.reads.clear()
        buffer = np.full(1000, UNTOUCHED, np.uint8)
        handle = self.store.submit_get([GetRequest(key(number), buffer, **options)], deadline_s=deadline_s)
        assert handle.poll() == (None,)
        return handle, buffer

    def begin_overtaken(self, number):
        """A read of which the slow tier has brought the object; the fast one still holds the buffer."""
        seen, num_before = self.seen, num_ok(self.slow)
        handle, buffer = self.begin(number)
        assert self.seen == seen, "it is not slow yet"
        self.clock.sleep(SLOW_S)
        handle.poll()
        eventually(lambda: num_ok(self.slow) == num_before + 1)
        assert handle.poll() == (None,)
        return handle, buffer

    def become_apart(self):
        """Have the fast tier be slow once, and forgive it the race."""
        handle, _ = self.begin_overtaken(0)
        self.fast.open_gates()
        eventually(lambda: handle.poll() == (OK,))
        self.read_quickly(round(1 / RACE_SHARE))

    @property
    def seen(self):
        fast = self.store.stats().tiers[0]
        return fast.num_raced, fast.num_overtaken


@pytest.fixture
def opened():
    made = []

    def make(slow=None, **options):
        made.append(Tiers(MemoryStore(capacity_bytes=CAPACITY) if slow is None else slow, **options))
        return made[-1]

    yield make
    for each in made:
        for store in (each.fast, each.slow):
            if isinstance(store, GatedStore):
                store.open_gates()
        each.store.close()


def num_ok(store):
    return store.stats().get_outcomes[OK]


def test_a_slow_read_is_asked_of_the_next_tier_which_waits_for_the_buffer(opened):
    both = opened()
    handle, buffer = both.begin_overtaken(1)
    for _ in range(5):
        assert handle.poll() == (None,), "the fast tier may still write into the buffer"
    assert (buffer == UNTOUCHED).all()
    both.fast.open_gates()
    eventually(lambda: handle.poll() == (OK,))
    assert np.array_equal(buffer, payload(1))
    assert both.seen == (1, 1)
    assert both.store.stats().tiers[0].num_promoted == 0, "the fast tier has it"


def test_a_read_that_cannot_be_begun_takes_back_those_before_it(opened, monkeypatch):
    """Nobody gets a handle: so nobody may write into a buffer any more once that is said."""
    both, raised = opened(), []
    buffers = [np.full(1000, UNTOUCHED, np.uint8) for _ in range(2)]
    submit, read_record = both.fast.submit_get, both.fast.read_record
    is_second, begun = iter((False, True)), threading.Event()

    def submit_or_not(*args, **options):
        if next(is_second):
            assert begun.wait(TIMEOUT_S)
            raise MemoryError("no buffer")
        return submit(*args, **options)

    def note_and_read(*args):
        begun.set()
        return read_record(*args)

    def read():
        try:
            both.store.submit_get([GetRequest(key(number), buffers[number]) for number in range(2)])
        except MemoryError as error:
            raised.append(error)

    both.fast.reads.clear()
    monkeypatch.setattr(both.fast, "submit_get", submit_or_not)
    monkeypatch.setattr(both.fast, "read_record", note_and_read)
    reader = threading.Thread(target=read)
    reader.start()
    reader.join(0.2)
    assert reader.is_alive(), "the first one still may be written to"
    both.fast.open_gates()
    reader.join(TIMEOUT_S)
    assert len(raised) == 1
    assert both.store.tiers[0].wait_until_unread(0.0)


def test_who_waits_hears_of_it_when_the_next_tier_cannot_be_asked(opened, monkeypatch, caplog):
    both, outcomes = opened(), []
    handle, _ = both.begin(1)

    def fail(*args, **options):
        raise RuntimeError("no thread")

    monkeypatch.setattr(both.slow, "submit_get", fail)
    monkeypatch.setattr(both.store.tiers[0], "begin_race", lambda: False)
    both.clock.sleep(1e6)
    assert handle.poll() == (None,), "it is left, and its store has not let go"
    waiter = threading.Thread(target=lambda: outcomes.append(handle.wait()))
    waiter.start()
    both.fast.open_gates()
    waiter.join(TIMEOUT_S)
    assert outcomes == [(LoadOutcome.ERROR,)], "worse than that the first one was given up"
    assert "could not go on to the next tier" in caplog.text


def test_a_lender_that_fails_to_take_back_what_it_lent_too_late_holds_up_nobody(opened, monkeypatch, caplog):
    class Lender(GatedStore):
        def lend_record(self, key, num_bytes):
            lent = super().lend_record(key, num_bytes)
            return None if lent is None else replace(lent, end=self.fail)

        def fail(self, after):
            raise RuntimeError("no such slab")

    fast = Lender()
    fast.lend_to(Reader())
    both = opened(fast=fast)
    num_before = fast.num_reads_begun
    handle, buffer = both.begin(1, loan=Loan())
    eventually(lambda: fast.num_reads_begun > num_before)  # what has not begun is given up and lends nothing
    monkeypatch.setattr(both.store.tiers[0], "begin_race", lambda: False)
    both.clock.sleep(1e6)
    assert handle.poll() == (None,), "it is left, and its store has not let go"
    both.fast.open_gates()
    eventually(lambda: handle.poll() == (OK,))
    assert np.array_equal(buffer, payload(1))
    assert "no such slab" in caplog.text


def test_a_tier_that_was_slow_is_read_apart_and_holds_up_nobody(opened):
    both = opened()
    both.become_apart()
    handle, buffer = both.begin(2)
    both.clock.sleep(SLOW_S)
    eventually(lambda: handle.poll() == (OK,))
    assert np.array_equal(buffer, payload(2))
    assert both.seen == (2, 2)
    handle.cancel()  # returns, though the fast tier is still at it
    buffer[:] = UNTOUCHED
    read = num_ok(both.fast)
    both.fast.open_gates()
    both.read_quickly(3)
    assert num_ok(both.fast) >= read + 3
    assert (buffer == UNTOUCHED).all()


def test_waiting_is_enough_for_a_race(opened):
    both = opened()
    both.become_apart()
    handle, buffer = both.begin(2)
    threading.Timer(0.05, both.clock.sleep, [SLOW_S]).start()
    assert handle.wait(TIMEOUT_S) == (OK,)
    assert np.array_equal(buffer, payload(2))


def test_apart_or_not_what_is_quick_is_read_as_ever(opened):
    both = opened()
    both.become_apart()
    for number in range(2 * APART_READS):
        outcome, buffer = get(both.store, number % RACE_READS)
        assert outcome is OK
        assert np.array_equal(buffer, payload(number % RACE_READS))
        assert both.store.tiers[0].reads_apart == (number < APART_READS - round(1 / RACE_SHARE) - 1)
    assert both.seen == (1, 1)


def test_a_cancelled_read_apart_does_not_wait_for_a_tier_that_hangs(opened):
    both = opened(GatedStore())
    both.become_apart()
    both.slow.reads.clear()
    handle, buffer = both.begin(3)
    both.clock.sleep(SLOW_S)
    handle.poll()
    assert both.seen[0] == 2
    handle.cancel()  # neither has answered
    assert handle.poll() == (LoadOutcome.CANCELLED,)
    assert all(tier.wait_until_unread(0.0) for tier in both.store.tiers)
    both.slow.open_gates()
    both.fast.open_gates()
    both.read_quickly(3)
    assert (buffer == UNTOUCHED).all()
    assert num_ok(both.slow) == 1, "it was given up before it was read, but for the one of before"


def test_the_first_read_may_still_win(opened):
    both = opened(GatedStore())
    both.slow.reads.clear()
    handle, buffer = both.begin(4)
    both.clock.sleep(SLOW_S)
    assert handle.poll() == (None,)
    both.fast.open_gates()
    assert handle.wait(TIMEOUT_S) == (OK,)
    handle.cancel()  # though the rival hangs
    assert np.array_equal(buffer, payload(4))
    both.slow.open_gates()
    assert both.seen == (1, 0)


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.ERROR])
def test_a_rival_that_brings_nothing_changes_nothing(opened, fault):
    slow = FaultyStore(GatedStore(), FaultPlan())
    both = opened(slow)
    slow.set_plan(FaultPlan(rules=(FaultRule(fault=fault),)))
    handle, buffer = both.begin(5)
    both.clock.sleep(SLOW_S)
    eventually(lambda: handle.poll() == (None,) and slow.injected()[fault] == 1)
    assert handle.poll() == (None,)
    both.fast.open_gates()
    assert handle.wait(TIMEOUT_S) == (OK,)
    assert np.array_equal(buffer, payload(5))
    assert both.seen == (1, 0)


def test_what_the_first_one_turns_out_to_lack_is_promoted_from_its_rival(opened):
    both = opened()
    handle, buffer = both.begin_overtaken(6)
    both.fast.delete([key(6)])
    both.fast.open_gates()
    eventually(lambda: handle.poll() == (OK,))
    assert np.array_equal(buffer, payload(6))


def test_no_tier_is_asked_that_does_not_have_it(opened):
    both = opened()
    both.slow.delete([key(7)])
    handle, _ = both.begin(7)
    both.clock.sleep(SLOW_S)
    assert handle.poll() == (None,)
    assert both.seen == (0, 0)
    both.fast.open_gates()
    assert handle.wait(TIMEOUT_S) == (OK,)


def test_a_tier_that_hangs_is_left_for_the_rival_that_is_under_way(opened):
    """Which is not asked a second time, however long it takes."""
    both = opened(GatedStore())
    both.become_apart()
    both.slow.reads.clear()
    handle, buffer = both.begin(8)
    both.clock.sleep(SLOW_S)
    handle.poll()
    both.clock.sleep(30.0)
    handle.poll()
    eventually(lambda: not both.store.tiers[0].delivers)
    both.slow.open_gates()
    eventually(lambda: handle.poll() == (OK,))
    assert np.array_equal(buffer, payload(8))
    assert sum(both.slow.stats().get_outcomes.values()) == 2, "of which one made the fast tier be read apart"


def test_a_tier_that_hangs_and_was_overtaken_is_not_left_a_second_time(opened):
    """Nor is anybody else asked: the rival has what is wanted, and waits for the buffer alone."""
    both = opened(GatedStore())
    handle, buffer = both.begin_overtaken(1)
    both.clock.sleep(30.0)
    assert handle.poll() == (None,)
    assert sum(each.name == "cacheflow-tier-leave" for each in threading.enumerate()) == 1
    both.fast.open_gates()
    eventually(lambda: handle.poll() == (OK,))
    assert np.array_equal(buffer, payload(1))
    assert both.seen == (1, 1)
    assert sum(both.slow.stats().get_outcomes.values()) == 1


def test_who_waits_hears_of_it_when_a_slow_tier_lets_go(opened):
    both = opened()
    handle, buffer = both.begin_overtaken(1)
    found = []
    waiter = threading.Thread(target=lambda: found.append(handle.wait()), daemon=True)
    waiter.start()
    both.fast.open_gates()
    waiter.join(TIMEOUT_S)
    assert found == [(OK,)]
    assert np.array_equal(buffer, payload(1))


def test_an_item_that_is_late_leaves_no_read_under_way_in_any_tier(opened):
    """Though nobody has cancelled it: the rival's store is told, and nothing of it counts in its tier."""
    both = opened(GatedStore())
    both.slow.reads.clear()
    handle, _ = both.begin(1, deadline_s=0.5)
    both.clock.sleep(SLOW_S)
    assert handle.poll() == (None,)
    assert both.seen == (1, 0)
    both.clock.sleep(0.5)
    assert handle.poll() == (LoadOutcome.LATE,)
    assert all(tier.wait_until_unread(0.0) for tier in both.store.tiers)
    eventually(lambda: sum(both.slow.stats().get_outcomes.values()) == 1)
    both.slow.open_gates()
    both.fast.open_gates()
    handle.cancel()


def test_what_overtook_one_tier_is_promoted_to_those_before_it():
    clock, first, slow = ManualClock(100.0), MemoryStore(capacity_bytes=CAPACITY), GatedStore()
    last = MemoryStore(capacity_bytes=CAPACITY)
    tiers_ = {"first": first, "slow": slow, "last": last}
    with TieredStore(tiers_, clock=clock, drain_s=0.0, probe_after_s=1e9) as store:
        put(store, *range(RACE_READS))
        assert store.drain(TIMEOUT_S)
        first.delete([key(number) for number in range(RACE_READS)])
        for number in range(RACE_READS):
            assert get(store, number)[0] is OK
        assert store.drain(TIMEOUT_S)
        first.delete([key(1)])
        slow.reads.clear()
        handle = store.submit_get([GetRequest(key(1), np.full(1000, UNTOUCHED, np.uint8))])
        assert handle.poll() == (None,)
        clock.sleep(SLOW_S)
        handle.poll()
        eventually(lambda: num_ok(last) == 1)
        handle.poll()
        slow.open_gates()
        eventually(lambda: handle.poll() == (OK,))
        assert store.stats().tiers[1].num_overtaken == 1
        assert store.drain(TIMEOUT_S)
        assert first.contains([key(1)]) == (True,)


def test_a_slow_lender_is_overtaken_and_has_back_what_it_lends_too_late(opened):
    class Lender(GatedStore):
        num_lent = num_ended = 0

        def lend_record(self, key, num_bytes):
            lent = super().lend_record(key, num_bytes)
            if lent is None:
                return None
            self.num_lent += 1

            def end(after):
                self.num_ended += 1
                lent.end(after)

            return replace(lent, end=end)

    fast = Lender()
    fast.lend_to(Reader())
    both = opened(fast=fast)
    both.become_apart()
    loan = Loan()
    num_before = fast.num_reads_begun
    handle, buffer = both.begin(9, loan=loan)
    eventually(lambda: fast.num_reads_begun > num_before)  # what has not begun is given up and lends nothing
    both.clock.sleep(SLOW_S)
    eventually(lambda: handle.poll() == (OK,))
    assert loan.payload is None
    assert np.array_equal(buffer, payload(9))
    fast.open_gates()
    eventually(lambda: fast.num_lent == fast.num_ended == 1)
    quick, buffer = Loan(), np.full(1000, UNTOUCHED, np.uint8)
    assert both.store.submit_get([GetRequest(key(9), buffer, loan=quick)]).wait(TIMEOUT_S) == (OK,)
    assert np.array_equal(quick.payload, payload(9))
    assert (buffer == UNTOUCHED).all()
    quick.end()
    assert fast.num_lent == fast.num_ended == 2


def test_few_reads_are_doubled_however_slow_a_tier_is():
    tier = Tier("slow", MemoryStore(capacity_bytes=CAPACITY), copy_bytes=0, clock=ManualClock())
    num_raced = 0
    for number in range(1, 1001):
        tier.begin_read(10)
        num_raced += tier.begin_race()
        assert num_raced <= 1 + RACE_SHARE * number
    assert num_raced >= 0.9 * RACE_SHARE * 1000
    for _ in range(1000):
        tier.begin_read(10)
    assert sum(tier.begin_race() for _ in range(100)) == RACE_BURST
    tier.close()


def test_nobody_races_before_it_is_known_how_long_reads_take():
    fast = GatedStore()
    clock = ManualClock()
    with TieredStore({"fast": fast, "slow": MemoryStore(capacity_bytes=CAPACITY)}, clock=clock, drain_s=0.0) as store:
        put(store, *range(RACE_READS))
        assert store.drain(TIMEOUT_S)
        for number in range(RACE_READS - 1):
            assert get(store, number)[0] is OK
        fast.reads.clear()
        handle = store.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
        clock.sleep(SLOW_S)
        assert handle.poll() == (None,)
        assert store.stats().tiers[0].num_raced == 0
        fast.open_gates()
        assert handle.wait(TIMEOUT_S) == (OK,)


class JitteryStore(GatedStore):
    """Now quick, now slow."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    def read_record(self, key, header, payload):
        time.sleep(self.random.choice((0.0, 0.0, 0.0, 0.002, 0.01)))
        return super().read_record(key, header, payload)


@pytest.mark.parametrize("seed", range(3))
def test_whoever_wins_bytes_are_right_and_nobody_writes_afterwards(seed, monkeypatch):
    """With races at every turn, over stores that sometimes fail too."""
    for name, value in (("LEAST_RACE_S", 0.0005), ("RACE_TIMES", 0.1), ("RACE_SHARE", 1.0), ("RACE_READS", 1)):
        monkeypatch.setattr(tiers, name, value)
    rules = (FaultRule(fault=Fault.CORRUPT, probability=0.05), FaultRule(fault=Fault.MISS, probability=0.05))
    fast, slow = (FaultyStore(JitteryStore(seed + n), FaultPlan(rules=rules, seed=seed + n)) for n in (0, 7))
    chosen, held, patient = random.Random(seed), [], []
    with TieredStore({"fast": fast, "slow": slow}, drain_s=1.0) as store:
        put(store, *range(20))
        assert store.drain(TIMEOUT_S)
        for _ in range(150):
            numbers = chosen.sample(range(20), 3)
            buffers = [np.full(1000, UNTOUCHED, np.uint8) for _ in numbers]
            deadline_s = chosen.choice((0.003, TIMEOUT_S))
            handle = store.submit_get(
                [GetRequest(key(number), buffer) for number, buffer in zip(numbers, buffers, strict=True)],
                deadline_s=deadline_s,
            )
            found = handle.wait(TIMEOUT_S)
            handle.cancel()
            for number, buffer, outcome in zip(numbers, buffers, found, strict=True):
                assert outcome is not OK or np.array_equal(buffer, payload(number))
                held.append((buffer, buffer.copy()))
            patient += found if deadline_s == TIMEOUT_S else ()
        stats = store.stats().tiers[0]
    assert all(np.array_equal(buffer, copy) for buffer, copy in held)
    assert patient.count(OK) > 0.95 * len(patient), "what one tier does not bring the other one does"
    assert stats.num_raced > 20
    assert 0 < stats.num_overtaken < stats.num_raced
