"""Ways to read a store's objects: as CacheFlow reads them, and the checksum by itself.

Each reads into memory that is used again for the next object, as an engine's staging buffers are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cacheflow.bench.stores.objects import Objects, OnRead
from cacheflow.errors import StoreError
from cacheflow.stores.base import ByteBuffer, GetHandle, GetRequest, Store, byte_view
from cacheflow.stores.record import HEADER_BYTES, encode_header, verify
from cacheflow.types import LoadOutcome

_READ_S = 60.0


class ReadWay(ABC):
    """One way to read all objects.

    Attributes:
        num_reads: Reads under way at once.
    """

    def __init__(self, objects: Objects, *, num_reads: int) -> None:
        """Read nothing yet."""
        self.num_reads = num_reads
        self._objects = objects
        self._buffers = [np.empty(objects.num_bytes, np.uint8) for _ in range(num_reads)]

    @abstractmethod
    def read_all(self, on_read: OnRead) -> None:
        """Read every object once.

        Raises:
            StoreError: One could not be read.
        """

    def close(self) -> None:  # noqa: B027 -- most have nothing to end
        """End threads and connections of its own."""


class StoreWay(ReadWay):
    """A store's own reads; the store stays the caller's to close."""

    def __init__(self, store: Store, objects: Objects, *, num_reads: int) -> None:
        """Read from a store."""
        super().__init__(objects, num_reads=num_reads)
        self._store = store

    def read_all(self, on_read: OnRead) -> None:
        """See ``ReadWay.read_all``."""
        under_way: deque[tuple[int, GetHandle]] = deque()
        try:
            for index, key in enumerate(self._objects.keys):
                if len(under_way) == self.num_reads:
                    self._end(*under_way.popleft(), on_read)
                request = GetRequest(key, self._buffers[index % self.num_reads])
                under_way.append((index, self._store.submit_get([request])))
            while under_way:
                self._end(*under_way.popleft(), on_read)
        finally:
            for _, handle in under_way:
                handle.cancel()

    def _end(self, index: int, handle: GetHandle, on_read: OnRead) -> None:
        (outcome,) = handle.wait(_READ_S)
        if outcome is not LoadOutcome.OK:
            handle.cancel()
            said = outcome.value if outcome else f"still pending after {_READ_S:g} s"
            raise StoreError(f"object {index} of {self._objects.num_bytes} bytes: its read ended as {said}")
        on_read(index, self._buffers[index % self.num_reads])


class ThreadsWay(ReadWay):
    """So many threads, each of which reads every n-th object, one after the other, and does nothing else."""

    def __init__(self, objects: Objects, *, num_reads: int) -> None:
        """Start the threads with the first read."""
        super().__init__(objects, num_reads=num_reads)
        self._pool = ThreadPoolExecutor(num_reads, thread_name_prefix="bench-reader")

    @abstractmethod
    def read_one(self, index: int, thread: int) -> ByteBuffer:
        """The payload of an object; called by one thread at a time for each number of a thread.

        Raises:
            OSError: It could not be read.
        """

    def read_all(self, on_read: OnRead) -> None:
        """See ``ReadWay.read_all``."""

        def read_share(thread: int) -> None:
            for index in range(thread, len(self._objects), self.num_reads):
                on_read(index, self.read_one(index, thread))

        try:
            list(self._pool.map(read_share, range(self.num_reads)))
        except OSError as error:
            raise StoreError(f"{type(self).__name__} of {self._objects.num_bytes} bytes: {error}") from error

    def close(self) -> None:
        """See ``ReadWay.close``."""
        self._pool.shutdown()


class ChecksumWay(ThreadsWay):
    """Verifies records that lie in memory, on one thread: what verification takes where nothing else is to be done."""

    def __init__(self, objects: Objects) -> None:
        """Make their headers."""
        super().__init__(objects, num_reads=1)
        self._headers = [memoryview(bytearray(HEADER_BYTES)) for _ in objects.keys]
        for index, key in enumerate(objects.keys):
            payload = byte_view(objects.payload(index))
            encode_header(self._headers[index], key, [payload], shape=(payload.nbytes,), dtype="uint8")

    def read_one(self, index: int, thread: int) -> ByteBuffer:
        """See ``ThreadsWay.read_one``; an object that does not verify is empty."""
        del thread
        payload = byte_view(self._objects.payload(index))
        if verify(self._headers[index], payload, self._objects.keys[index]) is not LoadOutcome.OK:
            raise OSError(f"object {index} does not verify")
        return payload
