"""Counts and live estimates of a store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from threading import Lock

from cacheflow.stores.base import PutOutcome, StoreStats
from cacheflow.types import LoadOutcome

_KEEP = 0.8
"""Weight of the past per read: the estimates forget all but a tenth of it within 10 reads."""


class Meter:
    """Thread-safe counts of outcomes, and the bandwidth and latency of recent reads.

    Bandwidth is bytes over *busy* time: of two reads that overlap, the second adds only the time after the first
    ended. (Bytes over the latency of each read, the wrong alternative, would divide by the depth of the pipeline.)
    """

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = Lock()
        self._gets: Counter[LoadOutcome] = Counter(dict.fromkeys(LoadOutcome, 0))
        self._puts: Counter[PutOutcome] = Counter(dict.fromkeys(PutOutcome, 0))
        self._read_bytes = 0
        self._written_bytes = 0
        self._num_lent = 0
        self._last_end_s = float("-inf")
        self._recent_bytes = 0.0
        self._recent_busy_s = 0.0
        self._latency_s: float | None = None

    @property
    def read_latency_s(self) -> float | None:
        """See ``StoreStats``."""
        return self._latency_s

    def record_get(self, outcome: LoadOutcome, num_bytes: int, *, start_s: float, end_s: float) -> None:
        """Count one read of ``num_bytes`` that was submitted at ``start_s`` and ended at ``end_s``."""
        with self._lock:
            self._gets[outcome] += 1
            if outcome is not LoadOutcome.OK:
                return
            self._read_bytes += num_bytes
            self._recent_bytes = _KEEP * self._recent_bytes + num_bytes
            self._recent_busy_s = _KEEP * self._recent_busy_s + max(0.0, end_s - max(start_s, self._last_end_s))
            self._last_end_s = max(self._last_end_s, end_s)
            took_s = end_s - start_s
            self._latency_s = took_s if self._latency_s is None else _KEEP * self._latency_s + (1 - _KEEP) * took_s

    def record_put(self, outcome: PutOutcome, num_bytes: int) -> None:
        """Count one write of ``num_bytes``."""
        with self._lock:
            self._puts[outcome] += 1
            if outcome is PutOutcome.STORED:
                self._written_bytes += num_bytes

    def record_lent(self) -> None:
        """Count one read that was lent its record."""
        with self._lock:
            self._num_lent += 1

    def snapshot(
        self,
        *,
        num_objects: int,
        used_bytes: int,
        num_evicted: int,
        num_lent: int | None = None,
        pinned_bytes: int = 0,
        injected: Mapping[str, int] | None = None,
    ) -> StoreStats:
        """The counts so far, with what the store knows of its content; ``num_lent`` is that of an inner store."""
        with self._lock:
            busy_s = self._recent_busy_s
            return StoreStats(
                get_outcomes=dict(self._gets),
                put_outcomes=dict(self._puts),
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
                read_bytes_per_s=self._recent_bytes / busy_s if busy_s > 0 else None,
                read_latency_s=self._latency_s,
                num_objects=num_objects,
                used_bytes=used_bytes,
                num_evicted=num_evicted,
                num_lent=self._num_lent if num_lent is None else num_lent,
                pinned_bytes=pinned_bytes,
                injected=injected or {},
            )
