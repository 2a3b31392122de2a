"""A store read through a slow link: real bytes, delivered on the schedule of the link asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Condition

from cacheflow.errors import ConfigError
from cacheflow.stores.base import (
    Capabilities,
    GetHandle,
    GetRequest,
    Handle,
    PutHandle,
    PutRequest,
    Store,
    byte_view,
)
from cacheflow.stores.handle import Ledger, O
from cacheflow.stores.held import FixedGate, Gate, Held, HeldHandle
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.link import LinkSchedule
from cacheflow.stores.wrapper import WrapperStore


@dataclass(frozen=True, slots=True, kw_only=True)
class _LinkGate:
    """Lets an item pass when its bytes are over the link, plus the latency; a failed one moves no bytes."""

    link: LinkSchedule
    tickets: tuple[int, ...]
    submitted_at_s: float
    latencies_s: tuple[float, ...]
    note_done: Callable[[int], None]

    def release_at_s(self, index: int, *, done: bool | None) -> float:
        if done:
            self.note_done(index)
        sent_s = self.submitted_at_s if done is False else self.link.done_at_s(self.tickets[index])
        return sent_s + self.latencies_s[index]

    def forget(self, index: int, now_s: float) -> None:
        self.link.forget(self.tickets[index], now_s=now_s)


class ThrottledStore(WrapperStore):
    """A link of a given bandwidth, shared by all reads of a store.

    The inner store reads and copies at its own speed; an outcome becomes known when the link would have delivered
    its payload as it lies in the store (a codec makes it shorter): transfers pass one at a time, by priority and then
    in the order of submission, each after the end of the last, plus a latency that overlaps with other transfers. Ends
    are points of an absolute schedule, so with two reads or more in flight the link is busy all the time and late
    wake-ups do not add up. Misses and failures cost the latency alone. ``contains``, ``pin`` and ``delete`` are not
    slowed down.
    """

    def __init__(
        self,
        inner: Store,
        bytes_per_s: float,
        latency_s: float = 0.0,
        jitter_s: float = 0.0,
        seed: int = 0,
        *,
        throttle_puts: bool = False,
    ) -> None:
        """Put a link in front of ``inner``.

        Args:
            inner: The store; closed with this one.
            bytes_per_s: Bandwidth, payload bytes as they are stored.
            latency_s: Added to every operation.
            jitter_s: Upper end of a uniform random addition to the latency, drawn per item.
            seed: Of the jitter.
            throttle_puts: Whether writes use the link too.

        Raises:
            ConfigError: The bandwidth is not above 0, or a time is below 0.
        """
        super().__init__(inner)
        if latency_s < 0 or jitter_s < 0:
            raise ConfigError(f"latency_s is {latency_s} and jitter_s {jitter_s}, both must be 0 or more")
        self._link = LinkSchedule(bytes_per_s)
        self._latency_s = latency_s
        self._jitter_s = jitter_s
        self._random = random.Random(seed)
        self._throttle_puts = throttle_puts
        self._changed = Condition()

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth as of the last operation."""
        with self._changed:
            return self._link.bytes_per_s

    def set_bandwidth(self, bytes_per_s: float, *, after_bytes: int = 0) -> None:
        """Change the bandwidth, for transfers under way too.

        Args:
            bytes_per_s: The new bandwidth.
            after_bytes: Payload bytes the link delivers before the change takes effect, counted from now.

        Raises:
            ConfigError: The bandwidth is not above 0, or ``after_bytes`` is below 0.
        """
        with self._changed:
            self._link.set_bandwidth(bytes_per_s, now_s=self._clock(), after_bytes=after_bytes)
            self._changed.notify_all()

    def capabilities(self) -> Capabilities:
        """See ``Store.capabilities``; one transfer at a time makes progress."""
        inner = self.inner.capabilities()
        return replace(inner, name=f"throttled({inner.name})", max_parallel_reads=1)

    def tier_rates(self) -> tuple[float | None, ...]:
        """See ``Store.tier_rates``; all tiers are behind the one link."""
        return ()

    def submit_get(
        self, requests: Sequence[GetRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> GetHandle:
        """See ``Store.submit_get``."""
        sizes = [byte_view(request.buffer).nbytes for request in requests]
        ledger = self._batches.reads(sizes, deadline_s)
        on_link = self.inner.stored_bytes([(each.key, size) for each, size in zip(requests, sizes, strict=True)])
        inner = self.inner.submit_get(requests, priority=priority, deadline_s=deadline_s)
        return self._over_link(inner, ledger, on_link, priority)

    def submit_put(
        self, requests: Sequence[PutRequest], *, priority: int = 0, deadline_s: float | None = None
    ) -> PutHandle:
        """See ``Store.submit_put``; at the inner store's speed unless writes are throttled."""
        sizes = [sum(byte_view(buffer).nbytes for buffer in request.buffers) for request in requests]
        ledger = self._batches.writes(sizes, deadline_s)
        inner = self.inner.submit_put(requests, priority=priority, deadline_s=deadline_s)
        if self._throttle_puts:
            return self._over_link(inner, ledger, sizes, priority, written=[request.key for request in requests])
        return self._held(inner, ledger, FixedGate((float("-inf"),) * len(sizes)))

    def _over_link(
        self,
        inner: Handle[O],
        ledger: Ledger[O],
        sizes: Sequence[int],
        priority: int,
        written: Sequence[ObjectKey] = (),
    ) -> HeldHandle[O]:
        with self._changed:
            now_s = self._clock()
            tickets = tuple(self._link.submit(size, now_s=now_s, priority=priority) for size in sizes)
            unknown = dict(enumerate(written))

            def note_done(index: int) -> None:
                """What was written is as long as it lies in the store: known from now on."""
                if (key := unknown.pop(index, None)) is not None:
                    (num_stored,) = self.inner.stored_bytes([(key, sizes[index])])
                    self._link.shorten(tickets[index], sizes[index] - num_stored, now_s=self._clock())
                    self._changed.notify_all()

            gate = _LinkGate(
                link=self._link,
                tickets=tickets,
                submitted_at_s=now_s,
                latencies_s=tuple(self._latency_s + self._jitter_s * self._random.random() for _ in sizes),
                note_done=note_done,
            )
            self._changed.notify_all()  # a larger priority moves the others back
        return self._held(inner, ledger, gate)

    def _held(self, inner: Handle[O], ledger: Ledger[O], gate: Gate) -> HeldHandle[O]:
        items: list[Held[O]] = [Held(index) for index in range(len(ledger.outcomes))]
        handle = HeldHandle(inner, items, gate, ledger=ledger, condition=self._changed, clock=self._clock)
        return self._batches.track(handle)
