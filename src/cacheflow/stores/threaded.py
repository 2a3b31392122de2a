"""Base of stores whose backend reads and writes one record at a time: a small pool of threads does the rest.

A backend implements five methods on whole records; queueing, priorities, deadlines, cancellation, checksums, codecs,
statistics and the repair of damaged objects live here. Calls that release the GIL (file and socket I/O,
``numpy.copyto``, xxHash) leave the compute thread alone; ``memoryview`` assignment does not and is for headers only.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any, Generic, TypeVar

from cacheflow.errors import ConfigError
from cacheflow.stores.base import (
    GetHandle,
    GetRequest,
    PutHandle,
    PutOutcome,
    PutRequest,
    Store,
    StoreStats,
    byte_view,
)
from cacheflow.stores.codec import Codec, TensorForm
from cacheflow.stores.codecs import Coding
from cacheflow.stores.handle import READS, WRITES, O, OperationHandle, Verdicts
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import LentRecord, Loan
from cacheflow.stores.meter import Meter
from cacheflow.stores.record import (
    HEADER_BYTES,
    ChecksumAlgorithm,
    check_description,
    decode_header,
    encode_header,
    is_encoded,
    matches,
    verify,
)
from cacheflow.stores.suspects import Suspects
from cacheflow.threads import start_thread
from cacheflow.types import Clock, LoadOutcome

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 5.0
_PURGE_LENGTH = 1024
"""Operations that wait, from which on those are looked for that nobody waits for any more."""

T = TypeVar("T")
_Queued = tuple[int, int, "_Transfer[Any]"]
"""Negative priority, sequence number (ties are first come, first served), what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a backend holds: objects, bytes of their records and of those pinned, and how many objects it evicted."""

    num_objects: int = 0
    used_bytes: int = 0
    num_evicted: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Transfer(Generic[O]):
    """One item of a batch; ``carry_out`` takes the index and the thread's header scratch."""

    store: ThreadedStore
    handle: OperationHandle[O]
    index: int
    carry_out: Callable[[int, memoryview], O]
    verdicts: Verdicts[O]

    @property
    def is_pending(self) -> bool:
        """Whether somebody waits for it still."""
        return self.handle.is_pending(self.index)

    def run(self, header: memoryview) -> None:
        if self.handle.begin(self.index):
            outcome = _guarded(self.store, lambda: self.carry_out(self.index, header), self.verdicts.error)
            self.handle.finish(self.index, outcome)


def _guarded(store: ThreadedStore, call: Callable[[], T], failed: T) -> T:
    """The door between a backend and its callers: a failure of the backend is a value."""
    try:
        return call()
    except OSError as error:
        logger.debug("%s: an operation failed: %s", store, error)
    except Exception:  # a bug in a backend must not kill the pool or a request
        logger.exception("%s: bug in a store backend", store)
    return failed


class ThreadedStore(Store):
    """A store on a pool of daemon threads, each started when an operation finds all others busy.

    The five backend methods are called from several threads at once and may raise ``OSError``, which becomes
    ``ERROR``.
    """

    def __init__(self, *, num_threads: int, algorithm: ChecksumAlgorithm, clock: Clock = time.perf_counter) -> None:
        """Prepare the pool.

        Args:
            num_threads: Reads and writes carried out at the same time.
            algorithm: Checksum of the records written.
            clock: Monotonic clock, for deadlines, pins and statistics.

        Raises:
            ConfigError: ``num_threads`` is below 1.
        """
        if num_threads < 1:
            raise ConfigError(f"num_threads is {num_threads}, must be at least 1")
        self._num_threads = num_threads
        self._algorithm = algorithm
        self._clock = clock
        self._meter = Meter()
        self._coding = Coding()
        self._queue: list[_Queued] = []
        self._purge_length = _PURGE_LENGTH
        self._under_way: set[_Transfer[Any]] = set()
        self._queue_changed = Condition()
        self._sequence = itertools.count()
        self._threads: list[Thread] = []
        self._process = os.getpid()
        self._num_idle = 0
        self._closed = False
        self._suspects = Suspects()
        self._num_damaged = 0
        self._damage_lock = Lock()

    def __str__(self) -> str:
        """What log lines call the store."""
        return f"{self.capabilities().name} store"

    def encode_with(self, codec: Codec) -> None:
        """Encode what is written from now on; before the first write, with a codec whose package is installed."""
        self._coding = Coding(codec)

    def codec_identity(self) -> tuple[tuple[str, str], ...]:
        """See ``Store.codec_identity``."""
        codec = self._coding.codec
        return (("codec", codec.name),) if codec is not None and codec.lossy else ()

    @abstractmethod
    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """Fill the two buffers from a record and return how many payload bytes it has; None when it is not there.

        ``header`` has ``HEADER_BYTES`` bytes. A record that has fewer payload bytes than asked for (it is encoded)
        fills the front of ``payload``, and what is beyond it is left alone. One with more need not be copied beyond its
        header, one shorter than a header not at all (return a negative count).
        """

    @abstractmethod
    def write_record(self, key: ObjectKey, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """Make a record of ``parts`` (the header first) visible under ``key``, whole or not at all."""

    @abstractmethod
    def holds(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """Whether each record is there; asked for many at once, since a question may be a round trip."""

    @abstractmethod
    def remove(self, key: ObjectKey) -> bool:
        """Remove a record; whether it was there."""

    @abstractmethod
    def usage(self) -> Usage:
        """What the backend holds."""

    def lend_record(self, key: ObjectKey, num_bytes: int) -> LentRecord | None:
        """A record whose payload has so many bytes, for a device to copy; None: it is read as any other is."""
        del key, num_bytes
        return None

    def contains(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``Store.contains``; an object whose last read was ``CORRUPT`` counts as absent."""
        nothing = (False,) * len(keys)
        found = _guarded(self, partial(self.holds, keys), nothing) if keys else nothing
        return tuple(there and key not in self._suspects for key, there in zip(keys, found, strict=True))

    def delete(self, keys: Sequence[ObjectKey]) -> int:
        """See ``Store.delete``."""
        for key in keys:
            self._suspects.discard(key)
        return sum(_guarded(self, partial(self.remove, key), False) for key in keys)

    def stats(self) -> StoreStats:
        """See ``Store.stats``."""
        usage = self.usage()
        return self._meter.snapshot(
            num_objects=usage.num_objects,
            used_bytes=usage.used_bytes,
            num_evicted=usage.num_evicted,
            pinned_bytes=usage.pinned_bytes,
        )

    def submit_get(
        self, requests: Sequence[GetRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> GetHandle:
        """See ``Store.submit_get``."""
        payloads = [byte_view(request.buffer, writable=True) for request in requests]
        start_s = self._clock()

        def count(index: int, outcome: LoadOutcome, end_s: float) -> None:
            self._meter.record_get(outcome, payloads[index].nbytes, start_s=start_s, end_s=end_s)

        def carry_out(index: int, header: memoryview) -> LoadOutcome:
            return self._get(requests[index], payloads[index], header)

        handle = OperationHandle(len(requests), READS, deadline_s=deadline_s, clock=self._clock, on_outcome=count)
        self._enqueue(handle, len(requests), carry_out, READS, priority)
        return handle

    def submit_put(
        self, requests: Sequence[PutRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> PutHandle:
        """See ``Store.submit_put``."""
        payloads = [[byte_view(buffer) for buffer in request.buffers] for request in requests]
        for request, parts in zip(requests, payloads, strict=True):
            check_description(request.shape, request.dtype, request.token_axes)
            if not parts:
                raise ValueError(f"put of {request.key.name} has no buffer; an object has at least one byte")

        def count(index: int, outcome: PutOutcome, _end_s: float) -> None:
            self._meter.record_put(outcome, sum(part.nbytes for part in payloads[index]))

        def carry_out(index: int, header: memoryview) -> PutOutcome:
            return self._put(requests[index], payloads[index], header)

        handle = OperationHandle(len(requests), WRITES, deadline_s=deadline_s, clock=self._clock, on_outcome=count)
        self._enqueue(handle, len(requests), carry_out, WRITES, priority)
        return handle

    def close(self) -> None:
        """See ``Store.close``; threads hung in the backend are abandoned after 5 s, with a warning."""
        with self._queue_changed:
            was_closed, self._closed = self._closed, True
            abandoned, self._queue = self._queue, []
            self._queue_changed.notify_all()
        for _, _, transfer in abandoned:
            transfer.handle.abandon(transfer.verdicts.cancelled)
        until_s = time.monotonic() + _JOIN_TIMEOUT_S
        for thread in self._threads_to_join():
            thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s: a thread is hung in the backend and was left behind", self)
        self._threads = []
        for transfer in tuple(self._under_way):
            transfer.handle.abandon(transfer.verdicts.cancelled)
        if self._num_damaged > 1 and not was_closed:
            logger.warning("%s: %d reads found a damaged record since it was opened", self, self._num_damaged)

    def _threads_to_join(self) -> list[Thread]:
        """Those that end because the store is closed; a subclass adds its own."""
        return self._threads

    def _enqueue(
        self,
        handle: OperationHandle[O],
        num_items: int,
        carry_out: Callable[[int, memoryview], O],
        verdicts: Verdicts[O],
        priority: int,
    ) -> None:
        if os.getpid() != self._process:  # a fork has none of the threads, and its locks may be held for ever
            handle.abandon(verdicts.error)
            return
        with self._queue_changed:
            carried_out = not self._closed
            if carried_out:
                self._purge()
                for index in range(num_items):
                    transfer = _Transfer(self, handle, index, carry_out, verdicts)
                    heapq.heappush(self._queue, (-priority, next(self._sequence), transfer))
                self._start_threads()
                self._queue_changed.notify(num_items)
                carried_out = bool(self._threads)
                if not carried_out:
                    self._queue.clear()
        if not carried_out:
            handle.abandon(verdicts.error)

    def _purge(self) -> None:
        """Drop what nobody waits for any more, where the threads hang and much of it has come together."""
        if len(self._queue) >= self._purge_length:
            self._queue = [each for each in self._queue if each[2].is_pending]
            heapq.heapify(self._queue)
            self._purge_length = max(_PURGE_LENGTH, 2 * len(self._queue))

    def _start_threads(self) -> None:
        num_wanted = min(self._num_threads, len(self._threads) + len(self._queue) - self._num_idle)
        while len(self._threads) < num_wanted:
            thread = start_thread(self._work, name=f"cacheflow-store-{len(self._threads)}")
            if thread is None:
                return
            self._threads.append(thread)

    def _work(self) -> None:
        header = memoryview(bytearray(HEADER_BYTES))
        while True:
            with self._queue_changed:
                while not self._queue and not self._closed:
                    self._num_idle += 1
                    self._queue_changed.wait()
                    self._num_idle -= 1
                if self._closed:
                    return
                _, _, transfer = heapq.heappop(self._queue)
                self._under_way.add(transfer)
            transfer.run(header)
            self._under_way.discard(transfer)
            del transfer  # or the buffers of the last transfer would live until the next one

    def _get(self, request: GetRequest, payload: memoryview, header: memoryview) -> LoadOutcome:
        if request.loan is not None and request.tap is None:
            lent = self.lend_record(request.key, payload.nbytes)
            if lent is not None and is_encoded(byte_view(lent.header)):
                lent.end(None)  # its length is by chance that of the buffer
            elif lent is not None:
                return self._lend(request.key, lent, request.loan)
        num_found = self.read_record(request.key, header, payload)
        if num_found is None:
            self._suspects.discard(request.key)
            return LoadOutcome.MISS
        if request.tap is not None:
            request.tap.apply(header, payload[: max(num_found, 0)])
        return self._noted(request.key, self._take(request, payload, header, num_found))

    def _take(self, request: GetRequest, payload: memoryview, header: memoryview, num_found: int) -> LoadOutcome:
        """Verify and decode a record that was read."""
        key, found = request.key, decode_header(header) if num_found >= 0 else None
        if found is None or found.key_digest != key.digest or found.payload_bytes != num_found:
            return LoadOutcome.CORRUPT
        if found.raw_bytes != payload.nbytes:
            logger.warning("%s holds %d bytes, a buffer of %d was passed", key.name, found.raw_bytes, payload.nbytes)
            return LoadOutcome.ERROR
        if not matches(found, payload[:num_found]):
            return LoadOutcome.CORRUPT
        outcome = self._coding.decode(found, payload, name=str(self)) if found.codec else LoadOutcome.OK
        if outcome is LoadOutcome.MISS:
            self._suspects.add(key)  # it counts as absent, and what is recomputed instead of it is written over it
        elif outcome is LoadOutcome.OK and request.tell is not None:
            request.tell(found)
        return outcome

    def _lend(self, key: ObjectKey, lent: LentRecord, loan: Loan) -> LoadOutcome:
        outcome = LoadOutcome.ERROR
        try:
            sound = lent.is_sound and key not in self._suspects
            outcome = LoadOutcome.OK if sound else verify(byte_view(lent.header), byte_view(lent.payload), key)
        finally:
            if outcome is LoadOutcome.OK:
                loan.take(lent)
                self._meter.record_lent()
            else:
                lent.end(None)
        return self._noted(key, outcome)

    def _noted(self, key: ObjectKey, outcome: LoadOutcome) -> LoadOutcome:
        if outcome is LoadOutcome.CORRUPT:
            self._note_damage(key)
        elif outcome is LoadOutcome.OK and self._suspects:
            self._suspects.discard(key)
        return outcome

    def _note_damage(self, key: ObjectKey) -> None:
        self._suspects.add(key)
        with self._damage_lock:
            self._num_damaged += 1
            is_first = self._num_damaged == 1
        if is_first:
            logger.warning(
                "%s: the record of %s is damaged and counts as absent; what it held is recomputed and written again. "
                "Further damage is only counted", self, key.name,
            )  # fmt: skip

    def _put(self, request: PutRequest, parts: Sequence[memoryview], header: memoryview) -> PutOutcome:
        replace = request.replace or request.key in self._suspects
        if not replace and self.holds([request.key])[0]:
            return PutOutcome.EXISTS
        form = TensorForm(request.shape, request.dtype, request.token_axes)
        stored, encoding = self._coding.encode(request.key.kind, parts, form)
        encode_header(
            header, request.key, stored, shape=request.shape, dtype=request.dtype, algorithm=self._algorithm,
            token_axes=request.token_axes, encoding=encoding,
        )  # fmt: skip
        outcome = self.write_record(request.key, (header, *stored), replace=replace)
        if outcome is PutOutcome.STORED:
            self._suspects.discard(request.key)
        return outcome
