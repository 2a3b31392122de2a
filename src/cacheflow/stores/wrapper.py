"""What wrappers around a store share: the methods that only pass through, and the batches to cancel at the end."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cacheflow.stores.base import Capabilities, PinOutcome, PrefetchRequest, Store, StoreStats
from cacheflow.stores.batches import Batches
from cacheflow.stores.held import HeldHandle
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import DeviceReader
from cacheflow.types import Clock


class WrapperStore(Store):
    """A store in front of another, which it owns: closing it closes the inner one."""

    def __init__(self, inner: Store, *, clock: Clock = time.perf_counter) -> None:
        """Wrap ``inner``."""
        self.inner = inner
        self._clock = clock
        self._batches: Batches[HeldHandle[Any]] = Batches(clock)
        self._closed = False

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``."""

    def contains(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """See ``Store.contains``."""
        return self.inner.contains(keys)

    def locate(self, keys: Sequence[ObjectKey]) -> tuple[int, ...]:
        """See ``Store.locate``."""
        return self.inner.locate(keys)

    def tier_rates(self) -> tuple[float | None, ...]:
        """See ``Store.tier_rates``."""
        return self.inner.tier_rates()

    def prefetch(self, requests: Sequence[PrefetchRequest], *, within_s: float, keep_s: float = 0.0) -> int:
        """See ``Store.prefetch``; what it moves does not pass through this wrapper."""
        return self.inner.prefetch(requests, within_s=within_s, keep_s=keep_s)

    def pin(self, keys: Sequence[ObjectKey], *, ttl_s: float) -> tuple[PinOutcome, ...]:
        """See ``Store.pin``."""
        return self.inner.pin(keys, ttl_s=ttl_s)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """See ``Store.unpin``."""
        self.inner.unpin(keys)

    def claim(self, chain_hashes: Sequence[str], *, tenant: str) -> None:
        """See ``Store.claim``."""
        self.inner.claim(chain_hashes, tenant=tenant)

    def delete(self, keys: Sequence[ObjectKey]) -> int:
        """See ``Store.delete``."""
        return self.inner.delete(keys)

    def lend_to(self, reader: DeviceReader) -> None:
        """See ``Store.lend_to``."""
        self.inner.lend_to(reader)

    def codec_identity(self) -> tuple[tuple[str, str], ...]:
        """See ``Store.codec_identity``."""
        return self.inner.codec_identity()

    def stored_bytes(self, payloads: Sequence[tuple[ObjectKey, int]]) -> tuple[int, ...]:
        """See ``Store.stored_bytes``."""
        return self.inner.stored_bytes(payloads)

    def stats(self) -> StoreStats:
        """See ``Store.stats``: outcomes and speeds as seen through this wrapper, content of the inner store.

        An operation counts once its handle was asked (``poll``, ``wait`` or ``cancel``) after its end.
        """
        inner = self.inner.stats()
        seen = self._batches.meter.snapshot(
            num_objects=inner.num_objects,
            used_bytes=inner.used_bytes,
            num_evicted=inner.num_evicted,
            num_lent=inner.num_lent,
            pinned_bytes=inner.pinned_bytes,
            injected=inner.injected,
        )
        return replace(seen, tiers=inner.tiers, prefetches=inner.prefetches)

    def census(self) -> Mapping[str, int]:
        """See ``Store.census``."""
        return self.inner.census()

    def close(self) -> None:
        """See ``Store.close``."""
        self._closed = True
        for handle in self._batches.still_open():
            handle.cancel()
        self.inner.close()
