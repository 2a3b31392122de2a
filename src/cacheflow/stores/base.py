"""What a store promises: whole objects in, verified whole objects out, every item with its own outcome.

An object is one cell of the grid (one chunk in one layer block), so there are no partial reads: the checksum covers a
whole payload, and a part of it could not be verified.

Buffers: between submission and an item's outcome the store owns the item's buffer. ``OK``, ``MISS``, ``CORRUPT`` and
``ERROR`` give it back at once. ``LATE`` and ``CANCELLED`` tell the caller not to wait any longer, but a transfer may
still be under way: the buffer may be reused, or freed, only after ``Handle.cancel()`` returned. After anything but
``OK`` its content is undefined. What was lent instead is the reader's until it ends the loan, see ``loan``.

Threads: every method of a store and of its handles may be called from any thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, cast

import numpy.typing as npt

from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import DeviceReader, Loan
from cacheflow.stores.record import RecordHeader
from cacheflow.types import LoadOutcome

ByteBuffer = bytes | bytearray | memoryview | npt.NDArray[Any]
"""A C-contiguous, non-empty buffer; dtypes Python's buffer protocol lacks (bfloat16) are passed viewed as uint8."""


class PutOutcome(Enum):
    """How one write ended; everything but ``STORED`` and ``EXISTS`` means the key may not be there, and is counted."""

    STORED = "stored"
    """The object is visible under its key (unless evicted or deleted since)."""
    EXISTS = "exists"
    """The key was there already and nothing was written."""
    FULL = "full"
    """It does not fit: larger than the store, or too little that is not pinned could be evicted. Nothing is visible
    under the key."""
    ERROR = "error"
    """The disk failed, the connection broke, the store is closed. Nothing is visible under the key."""
    LATE = "late"
    CANCELLED = "cancelled"


class Priority(IntEnum):
    """What goes first in a store's queue; what has begun is never interrupted."""

    SAVE = -2
    """Writes: nobody waits for them."""
    AHEAD = -1
    """Reads for requests that are not restored yet."""
    READ = 0
    """Reads of a restoration, which come in the sequence in which they are needed; and what says nothing."""
    AWAITED = 1
    """Reads without which compute cannot begin."""


class PinOutcome(Enum):
    """What came of asking for one pin."""

    PINNED = "pinned"
    MISSING = "missing"
    """The object is not held, as far as this process knows."""
    REFUSED = "refused"
    """Pins hold as much as they may (``Retention.pinned_share``), of the whole store or of the object's tenant."""


class PrefetchOutcome(Enum):
    """What became of one object that was to be in the fastest tier before it is read."""

    FETCHED = "fetched"
    """It was brought there; later it counts as one of the next two as well."""
    USED = "used"
    """It was there when it was read."""
    WASTED = "wasted"
    """It had gone from there before anybody read it."""
    DROPPED = "dropped"
    """It was not brought: there was no room, a tier failed or was busy for too long, or too many waited."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadTap:
    """For fault injection only: what a read does to a record before it is verified."""

    flip_byte: int
    """Position in header plus payload, modulo their length, of the byte in which one bit is flipped."""

    def apply(self, header: memoryview, payload: memoryview) -> None:
        """Flip the bit, in place."""
        position = self.flip_byte % (header.nbytes + payload.nbytes)
        if position < header.nbytes:
            header[position] ^= 1
        else:
            payload[position - header.nbytes] ^= 1


@dataclass(frozen=True, slots=True, eq=False)
class GetRequest:
    """One object to read.

    Attributes:
        key: The object.
        buffer: Receives the payload alone, without the record's header; writable, as long as the payload.
        tap: Fault injection; None in production.
        loan: Takes the record where the store lends it; the buffer is then left alone. None: always fill the buffer.
        tell: Is given the record's header before a read ends ``OK``, on any thread; not of what is lent.
    """

    key: ObjectKey
    buffer: ByteBuffer
    tap: ReadTap | None = None
    loan: Loan | None = None
    tell: Callable[[RecordHeader], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PutRequest:
    """One object to write.

    Attributes:
        key: The object.
        buffers: Its payload in parts, stored one after the other.
        shape: Shape of the tensor, for people, tools and codecs; at most 8 dimensions.
        dtype: Name of its dtype, at most 16 ASCII characters.
        replace: Overwrite an existing object; for ``ObjectKind.NEXT`` and ``IDENTITY``, since the others never change.
        token_axes: Axes of the shape along which the tokens of keys and values lie. Empty: not known, or no keys and
            values; then no lossy codec touches it.
    """

    key: ObjectKey
    buffers: Sequence[ByteBuffer]
    shape: tuple[int, ...]
    dtype: str
    replace: bool = False
    token_axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefetchRequest:
    """One object to be brought into the fastest tier, and the bytes of its payload."""

    key: ObjectKey
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What kind of store this is.

    Attributes:
        name: For people and metrics.
        persistent: Objects survive the process.
        shared: Other processes may see and change the same objects.
        capacity_bytes: Bound on records held, headers included; None when the store itself does not bound them. Less
            than the store was opened with while its medium has less room.
        max_parallel_reads: Reads that make progress at the same time; more than that queue up.
    """

    name: str
    persistent: bool
    shared: bool
    capacity_bytes: int | None
    max_parallel_reads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier of a ``TieredStore``.

    Attributes:
        name: For people, logs and metrics.
        delivers: It is in service; a tier that under-delivers is taken out of reads and plans.
        num_outages: Times it was taken out.
        bytes_per_s: Bandwidth of recent reads, or what was measured at the start; None when neither is known.
        num_copied: Objects put into a faster tier that were written to this one too.
        num_dropped: Those that were not.
        num_promoted: Objects read from a slower tier that were written to this one too.
        num_unpromoted: Those that were not.
        num_raced: Of its reads, those that were asked of a slower tier too, because they took much longer than others.
        num_overtaken: ... of which the slower tier brought the object sooner.
        store: Of its store.
    """

    name: str
    delivers: bool
    num_outages: int
    bytes_per_s: float | None
    num_copied: int
    num_dropped: int
    num_promoted: int
    num_unpromoted: int
    num_raced: int
    num_overtaken: int
    store: StoreStats


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counts since the store was opened, and live estimates.

    Attributes:
        get_outcomes: Reads that ended, by outcome; every outcome is a key.
        put_outcomes: Writes that ended, by outcome; every outcome is a key.
        read_bytes: Payload bytes of the reads that were ``OK``.
        written_bytes: Payload bytes of the writes that were ``STORED``.
        read_bytes_per_s: Recent bandwidth while at least one read was under way (EWMA); None before the first.
        read_latency_s: Recent time from submission to outcome of one read, queueing included (EWMA); None before.
        num_objects: Objects held, as far as this process knows.
        used_bytes: Bytes of their records.
        num_evicted: Objects evicted by this process.
        num_lent: Of the reads that were ``OK``, those that were lent the record instead of a copy.
        pinned_bytes: Bytes of objects that this process has pinned.
    """

    get_outcomes: Mapping[LoadOutcome, int]
    put_outcomes: Mapping[PutOutcome, int]
    read_bytes: int = 0
    written_bytes: int = 0
    read_bytes_per_s: float | None = None
    read_latency_s: float | None = None
    num_objects: int = 0
    used_bytes: int = 0
    num_evicted: int = 0
    num_lent: int = 0
    pinned_bytes: int = 0
    injected: Mapping[str, int] = field(default_factory=dict)
    """Faults injected by a ``FaultyStore``, by kind; empty in production."""
    tiers: tuple[TierStats, ...] = ()
    """Of a ``TieredStore``, the fastest first."""
    prefetches: Mapping[PrefetchOutcome, int] = field(default_factory=dict)
    """Objects of a ``TieredStore`` by what became of their prefetch; empty of others."""


O_co = TypeVar("O_co", bound=Enum, covariant=True)


class Handle(Protocol[O_co]):
    """A batch of reads or writes under way."""

    def poll(self) -> tuple[O_co | None, ...]:
        """Outcome of each item in the order of the requests, None while it is pending; an outcome never changes.

        An item is ``LATE`` from its deadline on, even while a hung transfer still holds its buffer.
        """
        ...

    def wait(self, timeout_s: float | None = None) -> tuple[O_co | None, ...]:
        """Wait until every item has an outcome, or for ``timeout_s`` seconds; returns what ``poll`` would."""
        ...

    def cancel(self) -> None:
        """Give up what is pending (``CANCELLED``); returns once no transfer touches any of the buffers.

        Calling it again, or after everything ended, does nothing.
        """
        ...


GetHandle = Handle[LoadOutcome]
PutHandle = Handle[PutOutcome]


class Store(ABC):
    """A key-value store of KV-cache objects; see the module's docstring for buffers and threads.

    A failing store costs time, never correctness: once it is open, none of its methods raises for a failure of the
    disk or the network. ``ValueError`` is for bugs of the caller.
    """

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What kind of store this is; constant but for ``capacity_bytes``."""

    @abstractmethod
    def contains(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """Whether each object is there: a hint, a read may still miss. A failing store holds nothing."""

    def locate(self, keys: Sequence[ObjectKey]) -> tuple[int, ...]:
        """In which of its tiers each object is, of those that ``contains`` has just found: a hint, by number.

        The numbers are those of ``StoreStats.tiers``; 0 in a store that has none.
        """
        return (0,) * len(keys)

    def tier_rates(self) -> tuple[float | None, ...]:
        """Bandwidth of each of its tiers now, the fastest first, None where that is not known; asks no medium.

        Empty where reading from several of them at once brings no more: of a store without tiers, and of one whose
        tiers all lie behind one link.
        """
        return tuple(tier.bytes_per_s for tier in self.stats().tiers)

    @abstractmethod
    def submit_get(
        self, requests: Sequence[GetRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> GetHandle:
        """Start reading objects into the callers' buffers and return at once.

        Items start in order within a priority and may end in any order. An item is ``OK`` only if the payload in its
        buffer verified against the record written for this key; of what is lent instead the store says when it is.

        Args:
            requests: What to read; no two may share a buffer.
            priority: Larger values start before what is still queued.
            deadline_s: Seconds from now after which an item without outcome is ``LATE``; None for no deadline.

        Raises:
            ValueError: A buffer is read-only, empty or not contiguous.
        """

    def prefetch(self, requests: Sequence[PrefetchRequest], *, within_s: float, keep_s: float = 0.0) -> int:
        """Bring objects into the fastest of the store's tiers before they are read, in the background.

        Returns at once, and yields to everything else; a store without tiers does nothing. What cannot be brought is
        dropped, as is what somebody reads meanwhile.

        Args:
            requests: Which, in the order in which they are brought.
            within_s: Seconds after which one whose turn has not come is dropped.
            keep_s: Seconds from now for which they are pinned in the fastest tier once they are there; 0 for not.

        Returns:
            How many it has taken on; those that are there already are among them.

        Raises:
            ConfigError: ``within_s`` is not above 0, or ``keep_s`` below 0.
        """
        del requests, within_s, keep_s
        return 0

    @abstractmethod
    def submit_put(
        self, requests: Sequence[PutRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> PutHandle:
        """Start writing objects and return at once; the buffers must not change until their outcome.

        An object becomes visible whole, after its write succeeded, or not at all. A key that is there is not written
        again (``EXISTS``) unless the request says ``replace`` or the last read of it was ``CORRUPT``.

        Args:
            requests: What to write.
            priority: Larger values start before what is still queued.
            deadline_s: Seconds from now after which an item without outcome is ``LATE``; it may become visible later.

        Raises:
            ValueError: A buffer is empty or not contiguous, or shape or dtype do not fit the record's header.
        """

    @abstractmethod
    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[PinOutcome, ...]:
        """Keep objects from being evicted, and from expiring, for ``ttl_s`` seconds from now.

        Pinning again moves the end further away, never nearer. A pin binds this process, and not ``delete``; whether
        other processes heed it is for each store to say. May ask the medium.

        Raises:
            ConfigError: ``ttl_s`` is not above 0.
        """

    @abstractmethod
    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """End pins early; keys without a pin are ignored."""

    @abstractmethod
    def claim(self, chain_hashes: Sequence[str], *, tenant: str) -> None:
        """Count the objects of these chunks (hex, as in their keys) for a tenant from their next use on.

        Asks no medium, and tells it nothing: ``tenant`` stays in this process. Without a tenant quota it does nothing.
        """

    @abstractmethod
    def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Remove objects; returns how many were there. Reads under way end as if the object were still there."""

    def lend_to(self, reader: DeviceReader) -> None:
        """From now on, lay records where a device can copy them, and lend them to reads that bring a ``Loan``.

        Once, before the reader's first read; most stores cannot, and do nothing.
        """
        del reader

    def codec_identity(self) -> tuple[tuple[str, str], ...]:
        """What a namespace has to say of a lossy codec that KV goes through here; nothing without one."""
        return ()

    def stored_bytes(self, payloads: Sequence[tuple[ObjectKey, int]]) -> tuple[int, ...]:
        """Bytes of payloads as they lie in the store, encoded or not: what its medium and its link carry.

        As far as this process knows; asks no medium.

        Args:
            payloads: Each object, and the bytes that its payload has for whoever reads it; what is not known is that.
        """
        return tuple(num_bytes for _, num_bytes in payloads)

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts since the store was opened, and live estimates."""

    @abstractmethod
    def census(self) -> Mapping[str, int]:
        """Number of objects held by namespace (``ObjectKey.namespace``), as far as this process knows; asks no medium.

        Only namespaces of which an object is held are keys; what is not named like an ``ObjectKey`` is left out.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel what is pending and end the threads; later operations end as ``ERROR``. Closing again does nothing."""

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()


def byte_view(buffer: ByteBuffer, *, writable: bool = False) -> memoryview:
    """A buffer as a flat ``memoryview`` of bytes.

    Raises:
        ValueError: It is empty, not C-contiguous, of objects or of a dtype without buffer format, or read-only where
            ``writable`` is asked for.
    """
    try:
        typed = memoryview(cast("bytes", buffer))  # numpy's types miss the buffer protocol before 3.12
        view = typed.cast("B")
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a non-empty contiguous buffer of plain numbers: {error}; pass a uint8 view") from error
    if "O" in typed.format:
        raise ValueError("the buffer holds Python objects, whose bytes mean nothing elsewhere")
    if view.nbytes == 0:
        raise ValueError("the buffer is empty; an object has at least one byte")
    if writable and view.readonly:
        raise ValueError(f"the buffer of {view.nbytes} bytes is read-only; a read needs a writable one")
    return view
