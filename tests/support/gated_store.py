"""A store in memory that a test can make hang."""

import threading
from collections.abc import Sequence
from dataclasses import replace

from cacheflow.stores.memory import MemoryStore

CAPACITY = 64 << 20
LONG_S = 60.0


class GatedStore(MemoryStore):
    """As a server that hangs: reads, writes or questions wait until the test lets them go on."""

    def __init__(self, *, reads=False, writes=False, questions=False):
        super().__init__(capacity_bytes=CAPACITY)
        self.reads, self.writes, self.questions = (threading.Event() for _ in range(3))
        for gate, is_closed in ((self.reads, reads), (self.writes, writes), (self.questions, questions)):
            if not is_closed:
                gate.set()
        self.num_reads_begun = 0

    def capabilities(self):
        return replace(super().capabilities(), shared=True)

    def read_record(self, key, header, payload):
        self.num_reads_begun += 1
        assert self.reads.wait(LONG_S)
        return super().read_record(key, header, payload)

    def lend_record(self, key, num_bytes):
        self.num_reads_begun += 1
        assert self.reads.wait(LONG_S)
        return super().lend_record(key, num_bytes)

    def write_record(self, key, parts: Sequence[memoryview], *, replace):
        assert self.writes.wait(LONG_S)
        return super().write_record(key, parts, replace=replace)

    def holds(self, keys):
        assert self.questions.wait(LONG_S)
        return super().holds(keys)

    def open_gates(self):
        for gate in (self.reads, self.writes, self.questions):
            gate.set()
