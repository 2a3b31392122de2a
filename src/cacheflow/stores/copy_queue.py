"""Copies of objects on their way into a store, in the background, from a buffer of bounded size."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from threading import Condition, Thread

import numpy as np
import numpy.typing as npt

from cacheflow.stores.base import ByteBuffer, Priority, PutOutcome, PutRequest, Store, byte_view
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import RecordHeader
from cacheflow.threads import start_thread

logger = logging.getLogger(__name__)

WRITE_S = 30.0
"""Deadline of one write."""
BATCH = 4
"""Copies written at once."""
FORGET_S = 1.0
"""Longest wait for a write of an object that is being deleted; after that it is deleted when it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCounts:
    """What became of the copies that were offered.

    Attributes:
        num_written: Objects that were put into a faster tier first, and are in this one too.
        num_dropped: Those that are not: too much was waiting, or the write failed.
        num_promoted: Objects that were read from a slower tier, and are in this one too.
        num_unpromoted: Those that are not.
    """

    num_written: int = 0
    num_dropped: int = 0
    num_promoted: int = 0
    num_unpromoted: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    request: PutRequest
    buffer: npt.NDArray[np.uint8]
    promotes: bool


class CopyQueue:
    """One store's, written by one daemon thread, which is started with the first copy. Thread-safe.

    What is offered is copied at once, so that its owner may go on. One key waits once: what comes later replaces it.
    """

    def __init__(self, name: str, store: Store, *, capacity_bytes: int, delivers: Callable[[], bool]) -> None:
        """Write into ``store``, which messages call ``name``.

        Args:
            name: What messages call the store.
            store: Where the copies go; not owned.
            capacity_bytes: Bound on what waits or is being written; further copies are dropped.
            delivers: Whether to write at all; copies whose turn comes while not are dropped.
        """
        self._name, self._store, self._capacity_bytes, self._delivers = name, store, capacity_bytes, delivers
        self._changed = Condition()
        self._waiting: OrderedDict[ObjectKey, _Copy] = OrderedDict()
        self._under_way: frozenset[ObjectKey] = frozenset()
        self._doomed: set[ObjectKey] = set()
        self._free: list[npt.NDArray[np.uint8]] = []
        self._used_bytes = 0
        self._counts = CopyCounts()
        self._thread: Thread | None = None
        self._closed = self._warned = False
        self._counts_in_vain: CopyCounts | None = None

    def counts(self) -> CopyCounts:
        """What became of the copies so far."""
        with self._changed:
            return self._counts

    def offer(self, request: PutRequest, *, promotes: bool) -> None:
        """Copy an object and write it later, or drop it where too much waits; returns without waiting for the store.

        Args:
            request: What to write; its buffers may change after the return.
            promotes: It was read from a slower tier.
        """
        parts = [np.frombuffer(part, np.uint8) for part in request.buffers]
        num_bytes = sum(part.nbytes for part in parts)
        with self._changed:
            fits = not self._closed and self._used_bytes + num_bytes <= self._capacity_bytes
            buffer = self._take(num_bytes) if fits else None
            if buffer is None:
                self._count(promotes=promotes, written=False)
            else:
                self._used_bytes += num_bytes
        if buffer is None:
            lacks = "there is no memory for a copy" if fits else f"{self._capacity_bytes} may"
            self._warn_once(f"{self._used_bytes} bytes are waiting, {lacks}")
            return
        np.concatenate(parts, out=buffer)
        copy = _Copy(replace(request, buffers=[buffer]), buffer, promotes)
        with self._changed:
            replaced = self._waiting.pop(request.key, None)
            if replaced is not None:
                self._give(replaced.buffer)
            self._waiting[request.key] = copy
            if self._thread is None:
                self._thread = start_thread(self._work, name="cacheflow-tier-copies")
            self._changed.notify_all()

    def forget(self, keys: Collection[ObjectKey]) -> None:
        """Write none of these, and let none of them appear later; waits a moment for those being written."""
        with self._changed:
            for key in keys:
                copy = self._waiting.pop(key, None)
                if copy is not None:
                    self._give(copy.buffer)
            self._changed.wait_for(lambda: self._under_way.isdisjoint(keys), FORGET_S)
            self._doomed.update(self._under_way.intersection(keys))

    def settle(self, keys: Collection[ObjectKey], timeout_s: float) -> bool:
        """Wait until none of these waits or is being written; whether that is so.

        Does not wait again where it did so in vain and no write has ended since: the store hangs.
        """
        wanted = frozenset(keys)
        with self._changed:
            settled = self._changed.wait_for(
                lambda: wanted.isdisjoint(self._waiting) and wanted.isdisjoint(self._under_way),
                0.0 if self._counts is self._counts_in_vain else timeout_s,
            )
            self._counts_in_vain = None if settled else self._counts
            return settled

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits or is being written; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._under_way), timeout_s)

    def close(self) -> None:
        """Drop what waits, and end the thread once the write under way has ended; does not wait for it."""
        with self._changed:
            self._closed = True
            left = list(self._waiting.values())
            self._waiting.clear()
            for copy in left:
                self._count(promotes=copy.promotes, written=False)
            self._changed.notify_all()
        lost = sum(not copy.promotes for copy in left)
        if lost:
            logger.warning("tier %s: closed with %d objects not yet written to it", self._name, lost)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._end(batch, self._write(batch) if self._delivers() else (None,) * len(batch))

    def _write(self, batch: Sequence[_Copy]) -> tuple[PutOutcome | None, ...]:
        try:
            handle = self._store.submit_put(
                [copy.request for copy in batch], priority=Priority.SAVE, deadline_s=WRITE_S
            )  # fmt: skip
            outcomes = handle.wait()
            handle.cancel()  # a write that is late has its buffer still
        except Exception:  # a bug in a store must cost copies, not their thread
            logger.exception("tier %s: %d objects could not be written to it", self._name, len(batch))
            return (None,) * len(batch)
        return outcomes

    def _next_batch(self) -> list[_Copy]:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            batch = [self._waiting.popitem(last=False)[1] for _ in range(min(BATCH, len(self._waiting)))]
            self._under_way = frozenset(copy.request.key for copy in batch)
            return batch

    def _end(self, batch: Sequence[_Copy], outcomes: Sequence[PutOutcome | None]) -> None:
        failed = 0
        with self._changed:
            for copy, outcome in zip(batch, outcomes, strict=True):
                written = outcome in (PutOutcome.STORED, PutOutcome.EXISTS)
                failed += not written and not copy.promotes
                self._count(promotes=copy.promotes, written=written)
                self._give(copy.buffer, reusable=outcome is not None)  # or it may be written still
            doomed = self._doomed
            self._doomed = set()
        try:
            if doomed:
                self._store.delete(list(doomed))
        except Exception:
            logger.exception("tier %s: %d objects could not be deleted from it", self._name, len(doomed))
        with self._changed:
            self._under_way = frozenset()
            # What was added meanwhile had been written by then, and whoever adds it deletes it himself; it must not go
            # when it is written again.
            self._doomed.clear()
            self._changed.notify_all()
        if failed:
            self._warn_once(f"a write ended as {[each.value if each else 'not begun' for each in outcomes]}")

    def _count(self, *, promotes: bool, written: bool) -> None:
        old = self._counts
        self._counts = CopyCounts(
            num_written=old.num_written + (written and not promotes),
            num_dropped=old.num_dropped + (not written and not promotes),
            num_promoted=old.num_promoted + (written and promotes),
            num_unpromoted=old.num_unpromoted + (not written and promotes),
        )

    def _take(self, num_bytes: int) -> npt.NDArray[np.uint8] | None:
        """A buffer, one that was used before where it fits: new memory costs as much as the copy; None without any."""
        for index, buffer in enumerate(self._free):
            if buffer.nbytes == num_bytes:
                return self._free.pop(index)
        del self._free[: max(0, len(self._free) - BATCH)]  # of sizes that are not asked for any more
        try:
            return np.empty(num_bytes, np.uint8)
        except MemoryError:
            return None

    def _give(self, buffer: npt.NDArray[np.uint8], *, reusable: bool = True) -> None:
        self._used_bytes -= buffer.nbytes
        if reusable and len(self._free) < 2 * BATCH:
            self._free.append(buffer)

    def _warn_once(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "tier %s: an object was not written to it, further ones are only counted: %s", self._name, why
            )


def copy_of(key: ObjectKey, buffer: ByteBuffer, record: RecordHeader | None) -> PutRequest:
    """What writes an object that was read to another store: described, and so encoded, as its record was.

    Without the record, as bytes.
    """
    if record is None:
        return PutRequest(key, [buffer], (byte_view(buffer).nbytes,), "uint8")
    return PutRequest(key, [buffer], record.shape, record.dtype, token_axes=record.token_axes)
