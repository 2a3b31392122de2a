"""Reading a record where it lies: a store lends it to a device, which copies it, and has it back after that copy.

Any other read fills the reader's buffer. One that brings a ``Loan`` fills it too unless the store can lend the record,
so readers need not know which stores can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cacheflow.types import Bytes, Passing

_POLL_S = 1e-3


class DeviceReader(Protocol):
    """A device that copies page-locked host memory by itself, while the host goes on."""

    def new_memory(self, num_bytes: int) -> Bytes:
        """Page-locked memory, which lives as long as a view of it; slow to get.

        Raises:
            MemoryError: There is no more.
        """
        ...

    def pin(self, memory: Bytes) -> bool:
        """Page-lock memory that is there, in whole pages, until ``unpin``; whether it could be. Slow."""
        ...

    def unpin(self, memory: Bytes) -> None:
        """End that; the device copies from it no more."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LentRecord:
    """A record in page-locked memory, which stays as it is until ``end`` is called.

    Attributes:
        header: Its header.
        payload: Its payload; nobody writes to it.
        is_sound: Whether it needs no verification before it is used.
        end: Called once: nobody reads it any more, or nobody once what is passed in has passed.
    """

    header: Bytes
    payload: Bytes
    is_sound: bool
    end: Callable[[Passing | None], None]


class Loan:
    """Takes a record that a store lends; one for each read, made by its reader, who always calls ``end``."""

    __slots__ = ("_record",)

    def __init__(self) -> None:
        """Nothing was lent yet."""
        self._record: LentRecord | None = None

    @property
    def payload(self) -> Bytes | None:
        """After the outcome ``OK``: the payload, to be read only; None where it is in the request's buffer."""
        return None if self._record is None else self._record.payload

    def take(self, record: LentRecord) -> None:
        """Called by the store, at most once and before the outcome."""
        self._record = record

    def move_to(self, other: Loan) -> None:
        """Leave what was lent to another reader's loan, which ends it."""
        if self._record is not None:
            other.take(self._record)
            self._record = None

    def end(self, *, after: Passing | None = None) -> None:
        """Give back what was lent, if anything; again, nothing.

        Called by the reader once nobody reads it any more, or nobody after ``after``, and where the read was not ``OK``
        once ``Handle.cancel`` has returned.
        """
        record, self._record = self._record, None
        if record is not None:
            record.end(after)


def wait_until_passed(copies: Sequence[Passing], *, timeout_s: float = 5.0) -> bool:
    """Wait for copies of what was lent before its memory goes; whether all have passed in time."""
    until_s = time.monotonic() + timeout_s
    while not all(copy.done() for copy in copies):
        if time.monotonic() >= until_s:
            return False
        time.sleep(_POLL_S)
    return True
