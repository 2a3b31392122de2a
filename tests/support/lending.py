"""A device that stores lend their records to, and copies of which a test says when they are done; no torch."""

import numpy as np

from cacheflow.stores.base import GetRequest
from cacheflow.stores.loan import Loan
from support.store_objects import TIMEOUT_S, key


class Reader:
    """``DeviceReader`` over ordinary memory, of which there is no more after ``most_bytes``.

    Attributes:
        slabs: What it was asked for.
        pinned: What was pinned where it was, by address; a view of it.
    """

    def __init__(self, *, most_bytes=1 << 62):
        self.slabs, self.pinned, self.most_bytes = [], {}, most_bytes

    def new_memory(self, num_bytes):
        if sum(slab.nbytes for slab in self.slabs) + num_bytes > self.most_bytes:
            raise MemoryError
        self.slabs.append(np.zeros(num_bytes, np.uint8))
        return self.slabs[-1]

    def pin(self, memory):
        assert memory.ctypes.data not in self.pinned
        if sum(each.nbytes for each in self.pinned.values()) + memory.nbytes > self.most_bytes:
            return False
        self.pinned[memory.ctypes.data] = memory
        return True

    def unpin(self, memory):
        del self.pinned[memory.ctypes.data]


class Copy:
    """A copy by a device."""

    def __init__(self):
        self.is_done = False

    def done(self):
        return self.is_done


def lending(store):
    """The store, which lends from now on."""
    store.lend_to(Reader())
    return store


def borrow(store, number, num_bytes=1000):
    """Outcome, loan and buffer of one read that may be lent its record."""
    loan, buffer = Loan(), np.zeros(num_bytes, np.uint8)
    (outcome,) = store.submit_get([GetRequest(key(number), buffer, loan=loan)]).wait(TIMEOUT_S)
    return outcome, loan, buffer
