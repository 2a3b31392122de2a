"""What wrappers around a store share: the methods that only pass through, and the handles to cancel at the end."""

from __future__ import annotations

import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

from cacheflow.stores.base import Capabilities, PinOutcome, PrefetchRequest, Store, StoreStats
from cacheflow.stores.handle import Ledger, O, Verdicts
from cacheflow.stores.held import HeldHandle
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.loan import DeviceReader
from cacheflow.stores.meter import Meter
from cacheflow.types import Clock


class WrapperStore(Store):
    """A store in front of another, which it owns: closing it closes the inner one."""

    def __init__(self, inner: Store, *, clock: Clock = time.perf_counter) -> None:
        """Wrap ``inner``."""
        self.inner = inner
        self._clock = clock
        self._meter = Meter()
        self._open: weakref.WeakSet[HeldHandle[Any]] = weakref.WeakSet()
        self._open_lock = Lock()
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
        seen = self._meter.snapshot(
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
        with self._open_lock:
            still_open = tuple(self._open)
        for handle in still_open:
            handle.cancel()
        self.inner.close()

    def _track(self, handle: HeldHandle[O]) -> HeldHandle[O]:
        """Remember a handle for ``close``."""
        with self._open_lock:
            self._open.add(handle)
        return handle

    def _ledger(
        self,
        num_items: int,
        verdicts: Verdicts[O],
        deadline_s: float | None,
        on_outcome: Callable[[int, O, float], None],
    ) -> Ledger[O]:
        deadline_at_s = float("inf") if deadline_s is None else self._clock() + deadline_s
        return Ledger(num_items, verdicts, deadline_at_s=deadline_at_s, on_outcome=on_outcome)
