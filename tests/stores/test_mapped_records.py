"""Shared memory that is lent: mapped from the second read on, verified at each, unmapped when nobody reads it."""

import os

import numpy as np
import pytest

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.opening import open_store
from cacheflow.stores.shm import shm_folder
from cacheflow.types import LoadOutcome
from support.lending import Copy, Reader, borrow
from support.store_kinds import shm_url
from support.store_objects import TIMEOUT_S, get, key, payload, put, put_request

OK, STORED = LoadOutcome.OK, PutOutcome.STORED
RECORD = 4096 + 1000


@pytest.fixture
def url(request):
    return shm_url(request)


def opened(url, reader, *, num_records=100):
    store = open_store(url, capacity_bytes=num_records * RECORD)
    store.lend_to(reader)
    return store


@pytest.fixture
def reader():
    return Reader()


@pytest.fixture
def store(url, reader):
    with opened(url, reader) as store:
        yield store


def lent(store, number):
    """A loan of a record that has been read before."""
    borrow(store, number)[1].end()
    outcome, loan, buffer = borrow(store, number)
    assert outcome is OK
    assert loan.payload is not None
    assert not buffer.any()
    return loan


def file_of(url, number):
    [path] = shm_folder(url.removeprefix("shm://")).glob(f"objects/*/*/{key(number).name}")
    return path


def test_what_is_read_again_is_mapped_and_page_locked_once(store, reader):
    put(store, 1)
    outcome, loan, buffer = borrow(store, 1)
    assert (outcome, loan.payload, reader.pinned) == (OK, None, {})
    assert np.array_equal(buffer, payload(1))
    loans = [lent(store, 1) for _ in range(3)]
    assert len(reader.pinned) == 1
    [pinned] = reader.pinned.values()
    assert all(np.shares_memory(loan.payload, pinned) for loan in loans)
    assert np.array_equal(loans[0].payload, payload(1))


def test_another_process_that_removes_it_takes_nothing_from_the_reader(url, store, reader):
    put(store, 1)
    loan, copy = lent(store, 1), Copy()
    bytes_ = loan.payload
    with open_store(url, capacity_bytes=100 * RECORD) as other:
        assert other.delete([key(1)]) == 1
        put(other, *range(2, 8))
    loan.end(after=copy)
    assert borrow(store, 1)[0] is LoadOutcome.MISS
    assert np.array_equal(bytes_, payload(1))
    assert len(reader.pinned) == 1
    copy.is_done = True
    borrow(store, 2)
    assert not reader.pinned


def test_what_another_process_has_replaced_is_mapped_anew(url, store, reader):
    put(store, 1)
    old = lent(store, 1)
    with open_store(url, capacity_bytes=100 * RECORD) as other:
        request = put_request(1, payload(99), replace=True)
        assert other.submit_put([request]).wait(TIMEOUT_S) == (STORED,)
    new = lent(store, 1)
    assert np.array_equal(old.payload, payload(1))
    assert np.array_equal(new.payload, payload(99))
    old.end()
    borrow(store, 1)
    assert len(reader.pinned) == 1


def test_damage_is_found_at_every_read_and_mended(url, store):
    put(store, 1)
    lent(store, 1).end()
    with file_of(url, 1).open("r+b") as file:
        file.seek(4096 + 77)
        file.write(bytes([payload(1)[77] ^ 1]))
    outcome, loan, _ = borrow(store, 1)
    assert (outcome, loan.payload) == (LoadOutcome.CORRUPT, None)
    assert not store.contains([key(1)])[0]
    assert put(store, 1) == (STORED,)
    assert np.array_equal(lent(store, 1).payload, payload(1))


def test_a_file_that_was_cut_short_is_not_looked_at(url, store):
    put(store, 1)
    lent(store, 1).end()
    os.truncate(file_of(url, 1), RECORD - 1)
    outcome, loan, _ = borrow(store, 1)
    assert (outcome, loan.payload) == (LoadOutcome.CORRUPT, None)


def test_what_this_process_evicts_is_unmapped_once_nobody_reads_it(url, reader):
    copy = Copy()
    with opened(url, reader, num_records=4) as store:
        put(store, 1)
        loan = lent(store, 1)
        bytes_ = loan.payload
        put(store, *range(2, 10))
        assert not store.contains([key(1)])[0]
        assert len(reader.pinned) == 1
        loan.end(after=copy)
        put(store, *range(10, 12))
        assert len(reader.pinned) == 1
        assert np.array_equal(bytes_, payload(1))
        copy.is_done = True
        put(store, *range(12, 14))
        assert not reader.pinned


def test_what_others_removed_is_noticed_as_this_process_reads(url, store, reader):
    put(store, 1, 2, 3)
    for number in (1, 2, 3):
        lent(store, number).end()
    with open_store(url, capacity_bytes=100 * RECORD) as other:
        other.delete([key(1), key(2)])
    for _ in range(4):
        get(store, 3)
        borrow(store, 3)[1].end()
    assert len(reader.pinned) == 1


def test_half_of_the_capacity_is_mapped_at_most(url, reader):
    with opened(url, reader, num_records=8) as store:
        put(store, *range(8))
        loans = [borrow(store, number)[1] for _ in range(3) for number in range(8)]
        assert len(reader.pinned) == 4
        assert sum(loan.payload is not None for loan in loans[8:]) == 8
        for number in range(8):
            assert np.array_equal(get(store, number)[1], payload(number))


def test_where_nothing_can_be_page_locked_records_are_copied(url, caplog):
    with opened(url, Reader(most_bytes=0)) as store:
        put(store, 1)
        for _ in range(3):
            outcome, loan, buffer = borrow(store, 1)
            assert (outcome, loan.payload) == (OK, None)
            assert np.array_equal(buffer, payload(1))
    assert caplog.text.count("no more page-locked memory") == 1


def test_closing_ends_every_page_lock(url, reader):
    store = opened(url, reader)
    put(store, 1, 2)
    lent(store, 1).end()
    lent(store, 2).end()
    store.close()
    store.close()
    assert not reader.pinned


def test_reading_it_so_is_use(url, reader):
    """The least recently used goes first."""
    with opened(url, reader, num_records=4) as store:
        for number in (1, 2, 3):
            put(store, number)
        lent(store, 1).end()
        put(store, 4)
        put(store, 5)
        assert store.contains([key(1), key(2)]) == (True, False)


def test_no_more_records_are_mapped_than_files_may_be_open(url, reader, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (8, 8))
    with opened(url, reader) as store:
        put(store, 1, 2, 3)
        for number in (1, 2, 3, 3):
            borrow(store, number)[1].end()
            borrow(store, number)[1].end()
        outcome, loan, buffer = borrow(store, 3)
        assert (outcome, loan.payload, len(reader.pinned)) == (OK, None, 2)
        assert np.array_equal(buffer, payload(3))
        assert store.delete([key(1)]) == 1
        lent(store, 3).end()


def test_records_that_cannot_be_mapped_are_copied(url, store, reader, monkeypatch):
    def mapped(descriptor, num_bytes):
        raise OSError("too many open files")

    put(store, 1)
    monkeypatch.setattr("mmap.mmap", mapped)
    for _ in range(3):
        outcome, loan, buffer = borrow(store, 1)
        assert (outcome, loan.payload, reader.pinned) == (OK, None, {})
        assert np.array_equal(buffer, payload(1))


def test_a_loan_that_ends_after_the_store_is_closed_is_unmapped(url, reader):
    store = opened(url, reader)
    put(store, 1)
    loan = lent(store, 1)
    store.close()
    assert len(reader.pinned) == 1
    loan.end()
    assert not reader.pinned
