"""The objects that are read: of one size, each with bytes of its own, in a store as long as they are measured."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import numpy as np

from cacheflow.errors import StoreError
from cacheflow.stores.base import ByteBuffer, PutOutcome, PutRequest, Store, byte_view
from cacheflow.stores.keys import RankKeys, chain_hashes
from cacheflow.types import Bytes

OnRead = Callable[[int, ByteBuffer], None]
"""Called with the number of an object and its payload right after it was read, on any thread; the payload is good until
it returns."""

NAMESPACE = "0" * 32
_SHIFT = 64
"""Bytes by which the payload of one object begins after that of the one before."""
_WRITE_S = 300.0


class Objects:
    """So many objects of one size.

    Attributes:
        keys: Their names, which no other call uses.
        num_bytes: Payload of each.
    """

    def __init__(self, *, num_objects: int, num_bytes: int) -> None:
        """Draw their bytes; nothing is written yet."""
        chain = chain_hashes(range(num_objects), range(1, num_objects + 1), salt=uuid.uuid4().hex)
        self.keys = tuple(RankKeys().kv(NAMESPACE, each.hex(), (0, 1)) for each in chain)
        self.num_bytes = num_bytes
        # They overlap, so that many large ones take little memory.
        total = num_bytes + _SHIFT * (num_objects - 1)
        self._bytes = np.random.default_rng(0).integers(0, 256, total, dtype=np.uint8)

    def __len__(self) -> int:
        """How many they are."""
        return len(self.keys)

    def payload(self, index: int) -> Bytes:
        """The bytes of one of them."""
        return self._bytes[_SHIFT * index :][: self.num_bytes]

    def write(self, store: Store) -> None:
        """Put all of them into a store.

        Raises:
            StoreError: One could not be written.
        """
        requests = [
            PutRequest(key, [self.payload(index)], (self.num_bytes,), "uint8") for index, key in enumerate(self.keys)
        ]
        handle = store.submit_put(requests, deadline_s=_WRITE_S)
        outcomes = handle.wait()
        if set(outcomes) != {PutOutcome.STORED}:
            handle.cancel()
            num_failed = sum(each is not PutOutcome.STORED for each in outcomes)
            raise StoreError(f"{num_failed} of {len(self)} objects of {self.num_bytes} bytes could not be written")

    def equal(self, index: int, found: ByteBuffer) -> bool:
        """Whether these are the bytes of one of them."""
        view = byte_view(found)
        return view.nbytes == self.num_bytes and np.array_equal(np.frombuffer(view, np.uint8), self.payload(index))


def check(read_all: Callable[[OnRead], None], objects: Objects) -> bool:
    """Read every object once; whether each was read, and was what had been written."""
    right: set[int] = set()

    def compare(index: int, found: ByteBuffer) -> None:
        if objects.equal(index, found):
            right.add(index)

    read_all(compare)
    return len(right) == len(objects)


def read_for(read_all: Callable[[OnRead], None], seconds: float) -> tuple[int, float]:
    """Read every object over and over for so long; returns how often, and the seconds it took."""
    num_times, start_s = 0, time.perf_counter()
    while True:
        read_all(_ignore)
        num_times += 1
        took_s = time.perf_counter() - start_s
        if took_s >= seconds:
            return num_times, took_s


def _ignore(index: int, found: ByteBuffer) -> None:
    del index, found
