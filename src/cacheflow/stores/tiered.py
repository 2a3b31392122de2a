"""Several stores as one: fast ones over slow ones, each of which may hold every object.

A read goes to the fastest tier that has the object, and from one that misses it, fails or hangs to the next; where one
is slow the next is asked meanwhile (``routed``). What came from a slower tier is written to the faster ones afterwards.
A write is done when the fastest tier has it; the slower ones get it afterwards too. Both wait in buffers of bounded
size and are dropped when those are full: every tier is a cache, and may lack anything.

Notes that change (``ObjectKind.NEXT``, ``IDENTITY``) are read from and written to the slowest tier first, which the
most processes share, and not copied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

from cacheflow.errors import ConfigError
from cacheflow.stores.base import (
    Capabilities,
    GetHandle,
    GetRequest,
    PinOutcome,
    PrefetchRequest,
    PutHandle,
    PutRequest,
    Store,
    StoreStats,
    byte_view,
)
from cacheflow.stores.batches import Batches
from cacheflow.stores.breaker import SILENCE_S
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import DeviceReader
from cacheflow.stores.prefetcher import Prefetcher
from cacheflow.stores.routed import RoutedHandle
from cacheflow.stores.routes import ReadRoute, WriteRoute
from cacheflow.stores.tier import CHANGING, Tier
from cacheflow.types import Clock

logger = logging.getLogger(__name__)

COPY_BYTES = 256 << 20
"""What may wait to be written to one tier."""
DRAIN_S = 5.0
"""Longest time for which closing waits until everything is written to every tier."""
PIN_WAIT_S = 5.0
"""Longest time for which pins wait until what they are for is written to every tier."""
_BEST_PIN = (PinOutcome.PINNED, PinOutcome.REFUSED, PinOutcome.MISSING)
"""Of what several tiers say of a pin, the first of these."""


class TieredStore(Store):
    """Stores in the order of their speed, which it owns: closing it closes them."""

    def __init__(
        self,
        stores: Mapping[str, Store],
        *,
        copy_bytes: int = COPY_BYTES,
        drain_s: float = DRAIN_S,
        probe_after_s: float = SILENCE_S,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Put stores over each other.

        Args:
            stores: By name, the fastest first; at least two.
            copy_bytes: What may wait to be written to one tier; more is dropped.
            drain_s: Longest time for which ``close`` waits until it is written.
            probe_after_s: Seconds from a tier's going out of service to its first probe.
            clock: Monotonic clock.

        Raises:
            ConfigError: There are fewer than two stores.
        """
        if len(stores) < 2:
            raise ConfigError(f"a tiered store has at least two tiers, not {len(stores)}")
        self.tiers = tuple(
            Tier(name, store, copy_bytes=copy_bytes, clock=clock, probe_after_s=probe_after_s)
            for name, store in stores.items()
        )
        self._prefetcher = Prefetcher(self.tiers, clock=clock)
        self._drain_s, self._clock = drain_s, clock
        self._batches: Batches[RoutedHandle[Any]] = Batches(clock)
        self._lock = Lock()
        self._closed = False
        logger.info(
            "tiers: %s; what is still to be written to one waits in a buffer of %d bytes",
            ", over ".join(f"{each.name} of {each.store.capabilities().capacity_bytes} bytes" for each in self.tiers),
            copy_bytes,
        )

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``; the capacity is that of the largest tier, since the others hold copies."""
        tiers = [tier.store.capabilities() for tier in self.tiers]
        sizes = [each.capacity_bytes for each in tiers]
        return Capabilities(
            name=f"tiered({', '.join(each.name for each in tiers)})",
            persistent=any(each.persistent for each in tiers),
            shared=any(each.shared for each in tiers),
            capacity_bytes=None if None in sizes else max(size for size in sizes if size is not None),
            max_parallel_reads=sum(each.max_parallel_reads for each in tiers),
        )

    def contains(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``Store.contains``; a tier that is out, or does not answer in time, holds nothing."""
        return tuple(number is not None for number in self._find(keys, self.tiers))

    def locate(self, keys: Sequence[ObjectKey]) -> tuple[int, ...]:
        """See ``Store.locate``; what no other tier has is taken to be in the slowest, without asking it again."""
        last = len(self.tiers) - 1
        return tuple(last if number is None else number for number in self._find(keys, self.tiers[:-1]))

    def _find(self, keys: Sequence[ObjectKey], tiers: Sequence[Tier]) -> list[int | None]:
        """The first of these tiers that has each object."""
        found: list[int | None] = [None] * len(keys)
        for number, tier in enumerate(tiers):
            left = [index for index, each in enumerate(found) if each is None]
            if not left:
                break
            question = partial(tier.store.contains, [keys[index] for index in left])
            for index, there in zip(left, tier.ask(question, (False,) * len(left), num_keys=len(left)), strict=True):
                found[index] = number if there else None
        return found

    def submit_get(
        self, requests: Sequence[GetRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> GetHandle:
        """See ``Store.submit_get``; an item goes on to the next tier when its handle is asked."""
        sizes = [byte_view(request.buffer, writable=True).nbytes for request in requests]
        self._prefetcher.note_read(request.key for request in requests)
        routes = [
            ReadRoute(request, self._tiers_of(request.key), priority=priority, clock=self._clock)
            for request in requests
        ]
        ledger = self._batches.reads(sizes, deadline_s)
        return self._batches.track(RoutedHandle(routes, ledger=ledger, clock=self._clock))

    def submit_put(
        self, requests: Sequence[PutRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> PutHandle:
        """See ``Store.submit_put``; ``EXISTS`` says that the fastest tier has it.

        What the slower tiers get afterwards waits in their queues from now on.
        """
        sizes = [sum(byte_view(buffer).nbytes for buffer in request.buffers) for request in requests]
        routes = [WriteRoute(request, self._tiers_of(request.key), priority=priority) for request in requests]
        ledger = self._batches.writes(sizes, deadline_s)
        return self._batches.track(RoutedHandle(routes, ledger=ledger, clock=self._clock))

    def _tiers_of(self, key: ObjectKey) -> Sequence[Tier]:
        """Where an object is looked for and put, in this order."""
        if self._closed:
            return ()
        return self.tiers[::-1] if key.kind in CHANGING else self.tiers

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[PinOutcome, ...]:
        """See ``Store.pin``; in every tier that has the object, and ``PINNED`` where one of them keeps it.

        Waits a moment for what is still to be written to the slower ones.

        Raises:
            ConfigError: ``ttl_s`` is not above 0.
        """
        if not ttl_s > 0:
            raise ConfigError(f"pin ttl_s is {ttl_s}, must be above 0")
        until_s = time.monotonic() + PIN_WAIT_S
        for tier in self.tiers:
            tier.copies.settle(keys, max(0.0, until_s - time.monotonic()))
        nothing = (PinOutcome.MISSING,) * len(keys)
        pinned = [
            tier.ask(partial(tier.store.pin, keys, ttl_s=ttl_s), nothing, num_keys=len(keys)) for tier in self.tiers
        ]
        return tuple(min(outcomes, key=_BEST_PIN.index) for outcomes in zip(*pinned, strict=True))

    def prefetch(self, requests: Sequence[PrefetchRequest], *, within_s: float, keep_s: float = 0.0) -> int:
        """See ``Store.prefetch``; notes that change are left where they are.

        Raises:
            ConfigError: ``within_s`` is not above 0, or ``keep_s`` below 0.
        """
        if not within_s > 0 or not keep_s >= 0:
            raise ConfigError(
                f"prefetch within_s is {within_s}, must be above 0, and keep_s {keep_s}, must be 0 or more"
            )
        cells = [each for each in requests if each.key.kind not in CHANGING]
        return self._prefetcher.take(cells, within_s=within_s, keep_s=keep_s)

    def claim(self, chain_hashes: Sequence[str], *, tenant: str) -> None:
        """See ``Store.claim``; in every tier."""
        for tier in self.tiers:
            tier.store.claim(chain_hashes, tenant=tenant)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """See ``Store.unpin``."""
        self._prefetcher.unpin(keys)
        for tier in self.tiers:
            tier.tell(partial(tier.store.unpin, keys), None)

    def delete(self, keys: Sequence[ObjectKey]) -> int:
        """See ``Store.delete``; from every tier, and from what waits to be written or brought."""
        self._prefetcher.forget(keys)
        for tier in self.tiers:
            tier.copies.forget(keys)
        nothing = [0] * len(keys)
        deleted = [tier.tell(partial(_delete_each, tier.store, keys), nothing) for tier in self.tiers]
        return sum(map(any, zip(*deleted, strict=True)))

    def codec_identity(self) -> tuple[tuple[str, str], ...]:
        """See ``Store.codec_identity``; of several tiers with one each, all of them count."""
        return tuple(sorted({each for tier in self.tiers for each in tier.store.codec_identity()}))

    def stored_bytes(self, payloads: Sequence[tuple[ObjectKey, int]]) -> tuple[int, ...]:
        """See ``Store.stored_bytes``; the least of what the tiers say."""
        return tuple(map(min, zip(*(tier.store.stored_bytes(payloads) for tier in self.tiers), strict=True)))

    def stats(self) -> StoreStats:
        """See ``Store.stats``: outcomes and speeds as seen by callers, content of the tier that holds the most.

        An operation counts once its handle was asked (``poll``, ``wait`` or ``cancel``) after its end.
        """
        tiers = tuple(tier.stats() for tier in self.tiers)
        fullest = max((each.store for each in tiers), key=lambda each: each.num_objects)
        seen = self._batches.meter.snapshot(
            num_objects=fullest.num_objects, used_bytes=fullest.used_bytes, num_evicted=fullest.num_evicted
        )
        return replace(
            seen,
            tiers=tiers,
            num_lent=tiers[0].store.num_lent,
            pinned_bytes=fullest.pinned_bytes,
            prefetches=self._prefetcher.counts(),
        )

    def census(self) -> Mapping[str, int]:
        """See ``Store.census``; of each namespace the number in the tier that holds the most of it."""
        found: dict[str, int] = {}
        for tier in self.tiers:
            for namespace, number in tier.store.census().items():
                found[namespace] = max(number, found.get(namespace, 0))
        return found

    def lend_to(self, reader: DeviceReader) -> None:
        """See ``Store.lend_to``; the fastest tier lends, the others are copied from."""
        self.tiers[0].store.lend_to(reader)

    def drain(self, timeout_s: float) -> bool:
        """Wait until what was put or promoted is written to every tier; whether that is so."""
        until_s = time.monotonic() + timeout_s
        return all([tier.copies.drain(max(0.0, until_s - time.monotonic())) for tier in self.tiers])  # noqa: C419

    def close(self) -> None:
        """See ``Store.close``; waits a bounded time for what is still to be written to the slower tiers."""
        with self._lock:
            was_closed, self._closed = self._closed, True
        for handle in self._batches.still_open():
            handle.abandon()
        self._prefetcher.close()
        self.drain(0.0 if was_closed else self._drain_s)
        for tier in self.tiers:
            tier.close()
        self._prefetcher.join()


def _delete_each(store: Store, keys: Sequence[ObjectKey]) -> list[int]:
    return [store.delete([key]) for key in keys]
