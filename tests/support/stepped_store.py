"""A store whose reads go on step by step, as a test says: they wait in a queue, write, hang in the system, and end."""

from __future__ import annotations

import random
from dataclasses import replace
from threading import Condition

import numpy as np

from cacheflow.stores.base import byte_view
from cacheflow.stores.loan import LentRecord
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from support.store_objects import TIMEOUT_S, payload


class SteppedRead:
    """The handle of a read, and what its store does for it. Thread-safe.

    As with a store's: what waits in the queue is let go of at once when it is cancelled, what has begun is not, and
    writes on until it has ended, whatever its outcome is by then.
    """

    def __init__(self, store, request, *, number, deadline_at_s):
        self._store, self._request, self._number, self._deadline_at_s = store, request, number, deadline_at_s
        self._buffer = np.frombuffer(byte_view(request.buffer, writable=True), np.uint8)
        self._changed = Condition()
        self._outcome = None
        self._steps_left = store.random.randint(1, 4)
        self._has_begun = False
        self.touches = True

    def holds(self, buffer):
        """Whether it may write to this buffer."""
        return self.touches and self._buffer.ctypes.data == buffer.ctypes.data

    def fills(self, other):
        """Whether it may write to the buffer that another read fills."""
        return self.holds(other._buffer)  # noqa: SLF001

    def poll(self):
        with self._changed:
            if self._outcome is None and self._store.clock() >= self._deadline_at_s:
                self._outcome = LoadOutcome.LATE
            return (self._outcome,)

    def wait(self, timeout_s=None):
        with self._changed:
            self._changed.wait_for(lambda: self.poll() != (None,), timeout_s)
            return self.poll()

    def cancel(self):
        with self._changed:
            if self.poll() == (None,):
                self._outcome = LoadOutcome.CANCELLED
            self.touches = self.touches and self._has_begun
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: not self.touches, TIMEOUT_S)

    def step(self):
        """Go on a bit."""
        with self._changed:
            if not self.touches:
                return
            if not self._has_begun and self.poll() != (None,):
                self.touches = False  # late in the queue
            elif self._steps_left:
                self._has_begun = True
                self._steps_left -= 1
                first = self._store.random.randrange(self._buffer.nbytes)
                self._buffer[first:] = self._store.random.randrange(256)
            else:
                self._end(self._store.fate(self._number))
            self._changed.notify_all()

    def _end(self, outcome):
        data = payload(self._number, self._buffer.nbytes)
        if outcome is LoadOutcome.OK and self._request.loan is not None:
            self._request.loan.take(self._store.lend(data))
        elif outcome is LoadOutcome.OK:
            self._buffer[:] = data
        self._outcome = self._outcome or outcome
        self.touches = False


class SteppedStore(MemoryStore):
    """Writes as its base does; what it has to read is what ``fates`` says, ``OK`` where it says nothing.

    Attributes:
        reads: All reads so far.
        num_lent: Records that were lent.
        num_ended: ... of which the loan was ended.
        clashes: Reads that began while another one might have written to their buffer.
    """

    def __init__(self, clock, *, seed, fates, shared, numbers, every_read):
        super().__init__(capacity_bytes=1 << 20)
        self.clock, self.random, self._fates, self._shared = clock, random.Random(seed), fates, shared
        self._numbers, self._every_read = numbers, every_read
        self.num_lent = self.num_ended = self.clashes = 0

    def fate(self, number):
        return self._fates.get(number, LoadOutcome.OK)

    def capabilities(self):
        return replace(super().capabilities(), shared=self._shared)

    def contains(self, keys):
        return tuple(self.fate(self._numbers[key]) is not LoadOutcome.MISS for key in keys)

    def submit_get(self, requests, *, priority=0, deadline_s=None):
        (request,) = requests
        deadline_at_s = float("inf") if deadline_s is None else self.clock() + deadline_s
        read = SteppedRead(self, request, number=self._numbers[request.key], deadline_at_s=deadline_at_s)
        self.clashes += any(read.fills(other) and other.touches for other in self._every_read)
        self._every_read.append(read)
        return read

    def read_back(self, request):
        """What was written to it."""
        return super().submit_get([request])

    def lend(self, data):
        ended = []

        def end(_after):
            ended.append(True)
            self.num_ended += len(ended) == 1
            self.clashes += len(ended) > 1

        self.num_lent += 1
        return LentRecord(header=data[:0], payload=data, is_sound=True, end=end)
