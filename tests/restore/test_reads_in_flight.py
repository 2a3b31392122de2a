"""How many reads the live driver keeps under way of a store that really is slow to answer; no torch."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from cacheflow.plan.grid import Cell
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.read_window import MAX_BYTES, ReadSample, ReadWindow
from cacheflow.policies.registry import make_policy
from cacheflow.restore.executor import execute
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.reads import Read, Reads
from cacheflow.state.restoration import RestoreState
from cacheflow.stores.base import GetRequest, Priority
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.probe import measure_link
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeBuffer, FakeCompute, FakeTicket, expected_value
from support.patience import PATIENT
from support.problems import transformer_problem
from support.store_objects import key, payload, put
from support.waiting import PATIENCE_S, eventually

NUM_BYTES = 1000
PROBLEM = transformer_problem(num_tokens=8192, suffix_tokens=0, num_blocks=8, chunk_tokens=512)
LEAST = 3


class CountingStore(ThrottledStore):
    """Counts the reads that nobody has the outcome of."""

    def __init__(self, *, service_s, latency_s):
        super().__init__(MemoryStore(capacity_bytes=64 << 20), NUM_BYTES / service_s, latency_s)
        self.most = 0
        self._handles = []

    def submit_get(self, requests, **options):
        self._handles = [handle for handle in self._handles if None in handle.poll()]
        handle = super().submit_get(requests, **options)
        self._handles.append(handle)
        self.most = max(self.most, len(self._handles))
        return handle


class StoreTransfer:
    """A transfer port over a real store."""

    def __init__(self, store, buffer):
        self.store, self.buffer = store, buffer

    def start(self, piece, *, deadline_s):
        ticket = FakeTicket(piece, NUM_BYTES, 0.0, LoadOutcome.OK)
        ticket.bytes = np.zeros(NUM_BYTES, np.uint8)
        request = GetRequest(key(number_of(piece)), ticket.bytes)
        ticket.handle = self.store.submit_get([request], priority=Priority.READ, deadline_s=deadline_s)
        return ticket

    def wait(self, ticket, *, timeout_s):
        return ticket.handle.wait(timeout_s)[0]

    def place(self, ticket):
        assert np.array_equal(ticket.bytes, payload(number_of(ticket.piece), NUM_BYTES))
        self.buffer.cells[ticket.piece] = expected_value(*ticket.piece)

    def cancel(self, ticket):
        ticket.handle.cancel()


def number_of(piece):
    return 100 * piece.chunk + piece.block


def most_under_way(store, *, times, options=None):
    """Of several restorations, each of which knows what those before it have learned."""
    grid = PROBLEM.grid
    put(store.inner, *(100 * chunk + block for chunk in range(grid.num_chunks) for block in range(grid.num_blocks)))
    rates, found = LiveRates(bytes_per_s=store.bytes_per_s), []
    for _ in range(times):
        store.most = 0
        buffer = FakeBuffer(grid)
        state = RestoreState(PROBLEM, make_policy("load").plan(PROBLEM), rates)
        transfer = StoreTransfer(store, buffer)
        execute(state, FakeCompute(buffer), transfer, options=options or PATIENT)
        assert buffer.is_right()
        found.append(store.most)
    return found


def test_a_store_that_takes_long_to_answer_gets_as_many_reads_as_deliver_its_bandwidth():
    """40 ms and 4 ms an object: 11 deliver it, and so many times a half and two at most are asked for."""
    with CountingStore(service_s=0.004, latency_s=0.04) as store:
        first, second = most_under_way(store, times=2)
    assert first > LEAST
    assert 10 <= second <= 30  # 18, and more where a busy machine adds to the latency


def test_a_throttled_link_gets_no_more_than_before():
    with CountingStore(service_s=0.04, latency_s=0.0) as store:
        assert max(most_under_way(store, times=1)) <= LEAST + 1


def test_a_number_that_the_user_has_fixed_stays():
    options = replace(PATIENT, max_reads_in_flight=2)
    with CountingStore(service_s=0.001, latency_s=0.005) as store:
        assert most_under_way(store, times=1, options=options) == [2]


def test_what_is_under_way_is_bounded_by_its_bytes():
    window, options = ReadWindow(), ExecutorOptions()
    window.learn(ReadSample(took_s=1.0, width=1, reads_per_s=80.0))
    while (width := options.reads_in_flight(window, 0)) < 12:
        window.learn(ReadSample(took_s=1.0, width=width, reads_per_s=80.0 * width))
    assert options.reads_in_flight(window, MAX_BYTES - 1) == 12
    assert options.reads_in_flight(window, MAX_BYTES) == LEAST


@pytest.mark.parametrize(
    ("service_s", "latency_s", "num_objects", "least", "most"), [(0.004, 0.04, 40, 8, 40), (0.02, 0.0, 10, 3, 4)]
)
def test_a_link_is_measured_with_as_many_reads_as_are_used(service_s, latency_s, num_objects, least, most):
    with CountingStore(service_s=service_s, latency_s=latency_s) as store:
        measure_link(store, object_bytes=NUM_BYTES, num_objects=num_objects, rounds=2)
    assert least <= store.most <= most


class NotingOwner:
    """Counts what its one read comes to; ``wants`` says whether it is still to be placed."""

    def __init__(self, transfer, *, wants):
        self.transfer, self.wants, self.ends = transfer, wants, []

    def begin_place(self, read):
        if not self.wants:
            self.ends.append("unwanted")
        return self.wants

    def end_place(self, read, *, now_s, failed):
        self.ends.append("placed")

    def fail_read(self, read, outcome):
        self.ends.append(outcome)

    def drop_read(self, read):
        self.ends.append("dropped")


class OneRead:
    """A source of one read."""

    idle_s = None

    def __init__(self):
        self.changed, self.read = threading.Condition(threading.RLock()), None

    def next_read(self, num_reads, num_bytes):
        read, self.read = self.read, None
        return read

    def close_link(self):
        raise AssertionError("the I/O thread failed")


@pytest.mark.parametrize(
    ("wants", "there", "end"), [(False, True, "unwanted"), (True, False, LoadOutcome.MISS), (True, True, "placed")]
)
def test_a_read_that_has_ended_is_not_dropped_while_its_ticket_is_handed_back(wants, there, end, monkeypatch):
    """Compute drops reads of the cells it takes back, at any time: also of one whose end was told a moment ago."""
    with MemoryStore(capacity_bytes=1 << 20) as store:
        if there:
            put(store, number_of(Cell(0, 0)))
        owner, source = NotingOwner(StoreTransfer(store, FakeBuffer(PROBLEM.grid)), wants=wants), OneRead()
        reads = Reads(source, clock=time.perf_counter, poll_s=0.01)
        forget = Reads._forget  # noqa: SLF001 -- the moment between a read's end and its last trace

        def drop_first(self, read):
            self.drop(owner)
            forget(self, read)

        monkeypatch.setattr(Reads, "_forget", drop_first)
        source.read = Read(owner, Cell(0, 0), claimed_at_s=time.perf_counter(), allowed_s=PATIENCE_S)
        reads.wake()
        eventually(lambda: owner.ends and not reads.under_way)
        reads.close(wait=True)
        assert owner.ends == [end]
