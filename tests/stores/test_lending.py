"""Records that a store lends: they stay as they are until the last copy of them is done, whatever happens meanwhile."""

import logging
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.base import GetRequest, PutOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.loan import Loan
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.lending import Copy, Reader, borrow, lending
from support.store_objects import TIMEOUT_S, get, key, payload, put, put_request

OK, STORED = LoadOutcome.OK, PutOutcome.STORED
RECORD = 5120
"""Bytes that a payload of 1,000 takes of a slab."""


def new_store(*, num_records=100, **options):
    return MemoryStore(capacity_bytes=num_records * RECORD, **options)


def damage(reader, data):
    """Flip a bit of every record with this payload."""
    for slab in reader.slabs:
        at = slab.tobytes().find(data.tobytes())
        if at >= 0:
            slab[at] ^= 1


def test_a_record_is_lent_where_it_lies_and_the_buffer_left_alone():
    reader = Reader()
    with new_store() as store:
        store.lend_to(reader)
        put(store, 1)
        outcome, loan, buffer = borrow(store, 1)
        assert outcome is OK
        assert np.array_equal(loan.payload, payload(1))
        assert any(np.shares_memory(loan.payload, slab) for slab in reader.slabs)
        assert not buffer.any()
        loan.end()
        loan.end()
        assert loan.payload is None
        stats = store.stats()
        assert (stats.get_outcomes[OK], stats.read_bytes, stats.num_lent) == (1, 1000, 1)


def test_any_other_read_is_copied():
    with new_store() as store:
        put(store, 1)
        outcome, loan, buffer = borrow(store, 1)
        assert (outcome, loan.payload) == (OK, None), "nobody asked the store to lend"
        assert np.array_equal(buffer, payload(1))
        lending(store)
        outcome, loan, buffer = borrow(store, 1)
        assert (outcome, loan.payload) == (OK, None), "it was written before"
        assert np.array_equal(buffer, payload(1))
        put(store, 2)
        assert np.array_equal(get(store, 2)[1], payload(2))
        outcome, loan, _ = borrow(store, 2, 999)
        assert (outcome, loan.payload) == (LoadOutcome.ERROR, None)
        outcome, loan, _ = borrow(store, 3)
        assert (outcome, loan.payload) == (LoadOutcome.MISS, None)
        assert store.stats().num_lent == 0


@pytest.mark.parametrize("how", ["evicted", "deleted", "replaced"])
def test_what_is_lent_stays_until_its_copy_is_done(how):
    copy = Copy()
    with lending(new_store(num_records=2)) as store:
        put(store, 1)
        _, loan, _ = borrow(store, 1)
        lent = loan.payload
        if how == "deleted":
            assert store.delete([key(1)]) == 1
        elif how == "replaced":
            request = put_request(1, payload(99), replace=True)
            assert store.submit_put([request]).wait(TIMEOUT_S) == (STORED,)
            assert np.array_equal(get(store, 1)[1], payload(99))
        for number in range(2, 12):
            put(store, number)
            assert np.array_equal(lent, payload(1))
            if number == 6:
                loan.end(after=copy)
        assert not store.contains([key(1)])[0]
        copy.is_done = True
        outcomes = [put(store, number)[0] for number in range(12, 20)]
        assert set(outcomes) == {STORED}
        assert not np.array_equal(lent, payload(1)), "and is used again then"


def test_a_store_whose_whole_memory_is_lent_is_full_until_it_has_it_back():
    with lending(new_store(num_records=1)) as store:
        put(store, 1)
        loan = borrow(store, 1)[1]
        lent = loan.payload
        assert put(store, 2) == (PutOutcome.FULL,)
        assert np.array_equal(lent, payload(1))
        loan.end()
        assert put(store, 3) == (STORED,)
        assert store.stats().num_objects == 1


def test_objects_that_are_not_lent_go_before_a_write_fails():
    with lending(new_store(num_records=2)) as store:
        put(store, 1, 2)
        loans = [borrow(store, number)[1] for number in (1, 2)]
        held = [loan.payload for loan in loans]
        # Its slab, the power of two above, has room for one more.
        assert [put(store, number)[0] for number in range(3, 9)] == [STORED] * 6
        assert [np.array_equal(each, payload(number)) for number, each in enumerate(held, 1)] == [True, True]
        assert store.stats().num_objects == 1


def test_a_read_that_is_late_or_given_up_gives_back_what_it_was_lent():
    plan = FaultPlan(rules=(FaultRule(fault=Fault.LATE),))
    with FaultyStore(lending(new_store(num_records=1)), plan) as store:
        for number in range(20):
            assert put(store, number) == (STORED,)
            loan = Loan()
            handle = store.submit_get([GetRequest(key(number), np.zeros(1000, np.uint8), loan=loan)], deadline_s=0.02)
            assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,)
            handle.cancel()
            loan.end()


def test_wrappers_lend_what_they_wrap_lends():
    with ThrottledStore(FaultyStore(new_store(), FaultPlan()), 1e12) as store:
        lending(store)
        put(store, 1)
        outcome, loan, _ = borrow(store, 1)
        assert outcome is OK
        assert np.array_equal(loan.payload, payload(1))
        assert store.stats().num_lent == 1


def test_an_injected_fault_leaves_the_record_as_it_is():
    plan = FaultPlan(rules=(FaultRule(fault=Fault.CORRUPT, limit=1),))
    with FaultyStore(lending(new_store()), plan) as store:
        put(store, 1)
        outcome, loan, _ = borrow(store, 1)
        assert (outcome, loan.payload) == (LoadOutcome.CORRUPT, None)
        outcome, loan, _ = borrow(store, 1)
        assert outcome is OK
        assert np.array_equal(loan.payload, payload(1))


class TestVerification:
    def lent(self, **options):
        reader, store = Reader(), new_store(**options)
        store.lend_to(reader)
        put(store, 1, 2)
        return reader, store

    def test_with_all_reads_verified_damage_is_found_at_once_and_mended(self):
        reader, store = self.lent(verified_share=1.0)
        with store:
            damage(reader, payload(1))
            outcome, loan, _ = borrow(store, 1)
            assert (outcome, loan.payload) == (LoadOutcome.CORRUPT, None)
            assert not store.contains([key(1)])[0]
            assert put(store, 1) == (STORED,)
            assert borrow(store, 1)[0] is OK

    def test_with_none_verified_it_is_not(self):
        reader, store = self.lent(verified_share=0.0)
        with store:
            damage(reader, payload(1))
            outcome, loan, _ = borrow(store, 1)
            assert outcome is OK
            assert not np.array_equal(loan.payload, payload(1))
            assert get(store, 1)[0] is LoadOutcome.CORRUPT, "a copied read is always verified"

    def test_once_damage_was_found_every_read_is_verified(self):
        reader, store = self.lent(verified_share=0.0)
        with store:
            damage(reader, payload(1))
            damage(reader, payload(2))
            assert get(store, 1)[0] is LoadOutcome.CORRUPT
            assert borrow(store, 2)[0] is LoadOutcome.CORRUPT

    def test_by_default_some_of_the_reads_find_it(self):
        reader, store = self.lent()
        with store:
            damage(reader, payload(1))
            outcomes = []
            while LoadOutcome.CORRUPT not in outcomes and len(outcomes) < 2000:
                outcomes.append(borrow(store, 1)[0])
            assert set(outcomes) <= {OK, LoadOutcome.CORRUPT}
            assert outcomes[-1] is LoadOutcome.CORRUPT

    def test_a_record_that_was_written_wrongly_is_never_seen(self, monkeypatch):
        _, store = self.lent()
        copyto = np.copyto

        def lose_a_bit(target, source):
            copyto(target, source)
            target[-1] ^= 1

        with store:
            monkeypatch.setattr(np, "copyto", lose_a_bit)
            assert put(store, 3) == (PutOutcome.ERROR,)
            monkeypatch.undo()
            assert not store.contains([key(3)])[0]
            assert store.stats().num_objects == 2
            assert put(store, 3) == (STORED,)

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_a_share_is_from_0_to_1(self, share):
        with pytest.raises(ConfigError, match="must be from 0 to 1"):
            new_store(verified_share=share)


def test_without_page_locked_memory_records_are_copied_and_that_is_said(caplog):
    with new_store() as store, caplog.at_level(logging.WARNING):
        store.lend_to(Reader(most_bytes=0))
        put(store, 1)
        outcome, loan, buffer = borrow(store, 1)
    assert (outcome, loan.payload) == (OK, None)
    assert np.array_equal(buffer, payload(1))
    assert "no page-locked memory" in caplog.text


def test_closing_waits_for_copies():
    copy, closed = Copy(), threading.Event()
    store = lending(new_store())
    put(store, 1)
    loan = borrow(store, 1)[1]
    loan.end(after=copy)
    closer = threading.Thread(target=lambda: (store.close(), closed.set()))
    closer.start()
    assert not closed.wait(0.05)
    copy.is_done = True
    assert closed.wait(TIMEOUT_S)
    closer.join()


class Crowd:
    """A store that is always full, and those who read, write and delete in it, played by one thread."""

    def __init__(self, store, picks):
        self.store, self.picks = store, picks
        self.lent = []  # payload as it was lent, what it must be, loan until it is ended, copy

    def read(self):
        number = self.picks.randrange(8)
        outcome, loan, _ = borrow(self.store, number)
        assert outcome in (OK, LoadOutcome.MISS)
        if loan.payload is not None:
            self.lent.append((loan.payload, payload(number), loan, Copy()))

    def write(self):
        number = self.picks.randrange(8)
        request = put_request(number, payload(number), replace=self.picks.random() < 0.3)
        outcomes = self.store.submit_put([request]).wait(TIMEOUT_S)
        assert outcomes[0] in (STORED, PutOutcome.EXISTS, PutOutcome.FULL)

    def delete(self):
        self.store.delete([key(self.picks.randrange(8))])

    def end(self):
        """An upload is queued."""
        if self.lent:
            _, _, loan, copy = self.picks.choice(self.lent)
            loan.end(after=copy)

    def finish(self):
        """The device has done one."""
        if ended := [each for each in self.lent if each[2].payload is None]:
            done = self.picks.choice(ended)
            done[3].is_done = True
            self.lent = [each for each in self.lent if each is not done]

    def finish_all(self):
        for _, _, loan, copy in self.lent:
            loan.end(after=copy)
            copy.is_done = True

    @property
    def is_right(self):
        return all(np.array_equal(lent, expected) for lent, expected, _, _ in self.lent)


@settings(deadline=None, max_examples=examples(25))
@given(picks=st.randoms(use_true_random=False), num_records=st.integers(2, 6))
def test_under_any_interleaving_no_lent_record_changes(picks, num_records):
    with lending(new_store(num_records=num_records, num_threads=1)) as store:
        crowd = Crowd(store, picks)
        for _ in range(60):
            picks.choice([crowd.read, crowd.write, crowd.write, crowd.end, crowd.finish, crowd.delete])()
            assert crowd.is_right
        crowd.finish_all()
        assert [put(store, number)[0] for number in range(100, 110)] == [STORED] * 10, "no room was lost"
