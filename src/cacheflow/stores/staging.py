"""Buffers that a library may still write to after its call was given up: never a caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock

import numpy as np

from cacheflow.stores.base import ByteBuffer
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.timed_calls import GivenUpError
from cacheflow.types import Bytes

_STEP_BYTES = 1 << 20
"""What a buffer's size is a multiple of."""


class StagingBuffers:
    """A pool of buffers, each for one transfer at a time; as many as there were transfers at once. Thread-safe.

    A transfer that is given up keeps its buffer until it ends, whenever that is.
    """

    def __init__(
        self,
        *,
        register: Callable[[Bytes], None] = lambda _: None,
        unregister: Callable[[Bytes], None] = lambda _: None,
    ) -> None:
        """Make no buffer yet.

        Args:
            register: Called with each buffer before its first use; may raise ``OSError``.
            unregister: Called with a buffer that is dropped, when a larger one takes its place.
        """
        self._register, self._unregister = register, unregister
        self._idle: list[Bytes] = []
        self._lock = Lock()

    @contextmanager
    def lend(self, num_bytes: int) -> Iterator[tuple[Bytes, Callable[[], None]]]:
        """A buffer of exactly so many bytes, and what gives it back.

        It is given back at the end, but after ``GivenUpError``: then by the transfer, by calling the second value.

        Raises:
            OSError: It could not be registered.
        """
        whole = self._take(num_bytes)
        give_back = partial(self._give_back, whole)
        try:
            yield whole[:num_bytes], give_back
        except GivenUpError:
            raise
        except BaseException:
            give_back()
            raise
        else:
            give_back()

    def _take(self, num_bytes: int) -> Bytes:
        with self._lock:
            fitting = [number for number, each in enumerate(self._idle) if each.nbytes >= num_bytes]
            if fitting:
                return self._idle.pop(min(fitting, key=lambda number: self._idle[number].nbytes))
            too_small = self._idle.pop() if self._idle else None
        if too_small is not None:
            self._unregister(too_small)
        whole = np.empty(-(-num_bytes // _STEP_BYTES) * _STEP_BYTES, np.uint8)
        self._register(whole)
        return whole

    def _give_back(self, whole: Bytes) -> None:
        with self._lock:
            self._idle.append(whole)


def gather(parts: Sequence[memoryview], staging: Bytes) -> None:
    """Copy parts into a buffer of their length, one after the other; without the GIL."""
    start = 0
    for part in parts:
        np.copyto(staging[start : start + part.nbytes], np.frombuffer(part, np.uint8))
        start += part.nbytes


def copy_out(staging: Bytes, buffer: memoryview) -> None:
    """Copy bytes to the start of a buffer that is as long or longer; without the GIL."""
    np.copyto(np.frombuffer(buffer, np.uint8)[: staging.nbytes], staging)


def copy_record(record: ByteBuffer, header: memoryview, payload: memoryview) -> int:
    """Copy a record as ``ThreadedStore.read_record`` promises, and return what it returns; without the GIL."""
    found = np.frombuffer(record, np.uint8)
    num_payload = found.nbytes - HEADER_BYTES
    if num_payload >= 0:
        copy_out(found[:HEADER_BYTES], header)
    if 0 < num_payload <= payload.nbytes:
        copy_out(found[HEADER_BYTES:], payload)
    return num_payload
