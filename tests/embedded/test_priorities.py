"""What goes first in a store's queue."""

import pytest

from cacheflow.stores.base import Priority
from cacheflow.stores.memory import MemoryStore
from support.embedded_cases import answer, assert_same, make_engine, never_evicted, sampling_of, tiny, turns


class NotingStore(MemoryStore):
    """Notes how urgent reads and writes of cells are said to be."""

    def __init__(self):
        super().__init__(capacity_bytes=64 << 20)
        self.reads, self.writes = set(), set()

    def submit_get(self, requests, *, priority=0, deadline_s=None):
        self.reads.add(priority)
        return super().submit_get(requests, priority=priority, deadline_s=deadline_s)

    def submit_put(self, requests, *, priority=0, deadline_s=None):
        if not any(request.replace for request in requests):  # a note, which is written at once
            self.writes.add(priority)
        return super().submit_put(requests, priority=priority, deadline_s=deadline_s)


@pytest.mark.parametrize("policy", ["load", "cacheflow"])
def test_reads_of_a_restoration_go_before_all_that_is_saved(policy):
    model = tiny("llama", "bfloat16")
    with NotingStore() as store:
        session = make_engine(model, store, policy=policy).session()
        answer(session, turns()[0])
        store.reads.clear()
        session.evict()
        assert_same(answer(session, turns()[1], sampling=sampling_of(1)), never_evicted(model)[1])
    assert Priority.READ in store.reads
    assert store.writes == {Priority.SAVE}
    assert Priority.SAVE < Priority.AHEAD < Priority.READ < Priority.AWAITED
