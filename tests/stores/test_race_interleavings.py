"""Whatever tiers, poller and canceller do in whatever order: bytes are right, buffers have one writer, nothing is left.

Reads go on step by step, by a clock of the test. One thread makes them go on, one polls and waits, one cancels.
"""

import itertools
import random
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

import cacheflow.stores.tier as tiers
from cacheflow.stores.base import GetRequest
from cacheflow.stores.loan import Loan
from cacheflow.stores.tier import Tier
from cacheflow.stores.tiered import TieredStore
from cacheflow.types import LoadOutcome
from support.manual_clock import ManualClock
from support.stepped_store import SteppedStore
from support.store_objects import TIMEOUT_S, key, payload
from support.waiting import eventually

NUM_CASES = 500
FAILURES = (LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR)
UNTOUCHED = 7
LEAVING = "cacheflow-tier-leave"


@pytest.fixture(autouse=True)
def _many_races(monkeypatch):
    monkeypatch.setattr(tiers, "RACE_READS", 1)
    monkeypatch.setattr(tiers, "RACE_SHARE", 1.0)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(interval_s)


class CountedTiers:
    """How many reads begun in tiers have not ended, and those that ended twice."""

    def __init__(self, monkeypatch):
        self.open, self.wrong, self.lock = Counter(), 0, threading.Lock()
        begin, end = Tier.begin_read, Tier.end_read

        def begin_read(tier, num_bytes):
            with self.lock:
                self.open[tier] += 1
            return begin(tier, num_bytes)

        def end_read(tier, *args, **options):
            with self.lock:
                self.open[tier] -= 1
                self.wrong += self.open[tier] < 0
            end(tier, *args, **options)

        monkeypatch.setattr(Tier, "begin_read", begin_read)
        monkeypatch.setattr(Tier, "end_read", end_read)

    def are_idle(self, store):
        return not any(self.open.values()) and all(tier.wait_until_unread(0.0) for tier in store.tiers)


class Case:
    """One batch over two or three tiers."""

    def __init__(self, seed, counted):
        self.random, self.counted = random.Random(seed), counted
        choose, self.clock, self.every_read = self.random, ManualClock(100.0), []
        self.numbers = list(range(choose.choice((1, 1, 2, 3))))
        self.stores = [self.new_store(seed + 1000 * index) for index in range(choose.choice((2, 2, 3)))]
        names = ("fast", "middle", "slow")
        self.store = TieredStore(
            dict(zip(names, self.stores, strict=False)), clock=self.clock, drain_s=0.0, probe_after_s=1e9
        )
        for tier in self.store.tiers:
            start_s, patience_s = self.clock(), tier.begin_read(1000)
            self.clock.sleep(0.001)
            tier.end_read(key(0), 1000, LoadOutcome.OK, start_s=start_s, patience_s=patience_s)
            if choose.random() < 0.3:
                tier.begin_race()  # from now on it is read apart
        self.buffers = [np.full(200 + 10 * number, UNTOUCHED, np.uint8) for number in self.numbers]
        self.loans = [Loan() if choose.random() < 0.3 else None for _ in self.numbers]
        self.deadline_s = choose.choice((None, 0.05, 0.5, 5.0))
        requests = [
            GetRequest(key(number), buffer, loan=loan)
            for number, buffer, loan in zip(self.numbers, self.buffers, self.loans, strict=True)
        ]
        self.handle = self.store.submit_get(requests, deadline_s=self.deadline_s)
        self.seen = [None] * len(requests)
        self.seen_lock = threading.Lock()
        self.errors = []
        self.may_cancel, self.is_over = threading.Event(), threading.Event()
        self.after_cancel = None

    def new_store(self, seed):
        fates = {number: self.random.choice(FAILURES) for number in self.numbers if self.random.random() < 0.3}
        return SteppedStore(
            self.clock,
            seed=seed,
            fates=fates,
            shared=self.random.random() < 0.7,
            numbers={key(number): number for number in self.numbers},
            every_read=self.every_read,
        )

    def run(self):
        poller, canceller = (threading.Thread(target=self.guarded, args=(each,)) for each in (self.poll, self.cancel))
        poller.start()
        canceller.start()
        try:
            self.guarded(self.drive)
            self.guarded(self.end_by_itself)
        finally:
            self.may_cancel.set()
            self.is_over.set()
            until_s = time.monotonic() + TIMEOUT_S
            while canceller.is_alive() or poller.is_alive():
                self.step_all()
                self.clock.sleep(0.01)
                assert time.monotonic() < until_s, "poll, wait or cancel hangs"
            self.guarded(self.check_the_end)
            self.store.close()
        assert not self.errors, self.errors

    def guarded(self, act):
        try:
            act()
        except Exception as error:  # noqa: BLE001 -- of a thread, for the test's own
            self.errors.append(repr(error))

    # The three threads.

    def drive(self):
        num_steps = self.random.randint(3, 40)
        cancel_at = self.random.choice((None, self.random.randrange(num_steps)))
        for step in range(num_steps):
            if step == cancel_at:
                self.may_cancel.set()
            drawn = self.random.random()
            if drawn < 0.5 and self.every_read:
                self.random.choice(self.every_read[-4:]).step()
            elif drawn < 0.7:
                self.clock.sleep(self.random.choice((0.005, 0.03, 0.03, 0.3, 1.5)))
            elif drawn < 0.9:
                self.look(self.handle.poll())
            else:
                time.sleep(0)

    def end_by_itself(self):
        """Where nobody has cancelled: by the deadline, though every store hangs, else when the stores have answered."""
        if self.may_cancel.is_set():
            return
        if self.deadline_s is not None and self.random.random() < 0.5:
            self.clock.sleep(self.deadline_s)
            found = self.handle.poll()
            self.look(found)
            assert None not in found, f"not late at its deadline: {found}"
        until_s = time.monotonic() + TIMEOUT_S
        while None in (found := self.handle.poll()):
            self.step_all()
            self.clock.sleep(0.001)
            assert time.monotonic() < until_s, f"every store has answered, and still {found}"
        assert self.counted.are_idle(self.store), "a read counts as under way in its tier, and nobody waits for it"

    def step_all(self):
        for read in tuple(self.every_read):
            read.step()

    def poll(self):
        for number in itertools.count():
            found = self.handle.poll() if number % 3 else self.handle.wait(0.001)
            self.look(found)
            if None not in found or self.is_over.is_set():
                return

    def cancel(self):
        assert self.may_cancel.wait(TIMEOUT_S)
        self.handle.cancel()
        found = self.handle.poll()
        self.look(found)
        assert None not in found, found
        assert self.counted.are_idle(self.store), "a cancelled read counts as under way in its tier"
        held = any(read.holds(buffer) for read in tuple(self.every_read) for buffer in self.buffers)
        assert not held, "cancel has returned, and a store may still write to a buffer"
        for loan, outcome in zip(self.loans, found, strict=True):
            if loan is not None and outcome is not LoadOutcome.OK:
                loan.end()
        self.after_cancel = [buffer.copy() for buffer in self.buffers]

    # What has to be so.

    def look(self, found):
        """What ``poll`` or ``wait`` has just said."""
        with self.seen_lock:
            before, self.seen = self.seen, [old or new for old, new in zip(self.seen, found, strict=True)]
        for old, new in zip(before, found, strict=True):
            assert old is None or new is None or old is new, f"an outcome changed from {old} to {new}"
        for number, outcome in enumerate(found):
            if outcome is LoadOutcome.OK:
                self.check_bytes(number)

    def check_bytes(self, number):
        buffer, loan = self.buffers[number], self.loans[number]
        assert not any(read.holds(buffer) for read in tuple(self.every_read)), "a store may still write to it"
        lent = None if loan is None else loan.payload
        assert np.array_equal(buffer if lent is None else lent, payload(number, buffer.nbytes)), "wrong bytes"

    def is_left(self):
        leaving = any(each.name == LEAVING for each in threading.enumerate())
        return not leaving and not any(read.touches for read in self.every_read)

    def check_the_end(self):
        eventually(lambda: self.is_left() or bool(self.step_all()))
        found = self.handle.poll()
        self.look(found)
        for buffer, copy in zip(self.buffers, self.after_cancel, strict=True):
            assert np.array_equal(buffer, copy), "somebody wrote to a buffer after cancel had returned"
        assert self.counted.are_idle(self.store)
        assert not self.counted.wrong, "a read ended twice in its tier"
        for loan in self.loans:
            if loan is not None:
                loan.end()
        assert not any(store.clashes for store in self.stores), "two reads filled one buffer, or a loan ended twice"
        assert all(store.num_lent == store.num_ended for store in self.stores), "a loan was not ended"
        assert self.store.drain(TIMEOUT_S)
        for number, store in itertools.product(self.numbers, self.stores):
            buffer = np.zeros_like(self.buffers[number])
            if store.holds([key(number)])[0]:
                assert store.read_back(GetRequest(key(number), buffer)).wait(TIMEOUT_S) == (LoadOutcome.OK,)
                assert np.array_equal(buffer, payload(number, buffer.nbytes)), "what was promoted is wrong"


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, 4 * NUM_CASES, NUM_CASES))
def test_whatever_happens_in_whatever_order(first_seed, monkeypatch):
    counted, outcomes, raced, overtaken, promoted = CountedTiers(monkeypatch), Counter(), 0, 0, 0
    for seed in range(first_seed, first_seed + NUM_CASES):
        case = Case(seed, counted)
        try:
            case.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        outcomes.update(case.seen)
        for each in case.store.stats().tiers:
            raced += each.num_raced
            overtaken += each.num_overtaken
            promoted += each.num_promoted
    assert outcomes[None] == 0
    assert min(outcomes[each] for each in (LoadOutcome.OK, LoadOutcome.LATE, LoadOutcome.CANCELLED)) > NUM_CASES / 20
    assert overtaken > NUM_CASES / 50
    assert raced > overtaken
    assert promoted > NUM_CASES / 50
