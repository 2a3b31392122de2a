"""Which objects a bounded store holds, in the order of their last use, and which of them go first."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cacheflow.errors import ConfigError
from cacheflow.stores.base import PinOutcome
from cacheflow.stores.retention import DEFAULT_RETENTION, Retention

_SPARE_ENDS = 64
"""Of pins as many ends as are worth no clearing up."""


@dataclass(frozen=True, slots=True)
class HeldObject:
    """One object: the bytes of its record, when it was last used, and the tenant it is counted for, if that is known.

    ``used_s`` is on the clock of whoever calls, and may lie ahead of it: then the object is kept until that time.
    """

    num_bytes: int
    used_s: float
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class _Pin:
    until_s: float
    num_bytes: int
    tenant: str | None


class LruIndex:
    """Names and sizes in access order, bounded in bytes; not thread-safe, the owner holds a lock.

    Space is reserved before a record is written and committed when it is visible, so that writers at the same time
    stay within the bound together.

    With a ``tenant_quota``, tenants that hold more than it make room first, each from its least recently used object
    on; one that would exceed it by what it writes makes room from its own objects alone. What is being written does not
    count yet, so a tenant may exceed its quota by that. Objects of no known tenant have no quota.
    """

    def __init__(self, capacity_bytes: int, *, retention: Retention = DEFAULT_RETENTION) -> None:
        """Create an empty index; ``capacity_bytes`` may be changed later, the next ``reserve`` evicts what is over it.

        Raises:
            ConfigError: ``capacity_bytes`` is below 1.
        """
        if capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes is {capacity_bytes}, must be at least 1")
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        """Bytes held, without reservations."""
        self.num_evicted = 0
        self.reserved_bytes = 0
        """Bytes set aside for what is being written."""
        self.pinned_bytes = 0
        """Bytes of pinned objects, of pins that have ended only until the next one is made."""
        self._retention = retention
        self._held: OrderedDict[str, HeldObject] = OrderedDict()
        self._names_of: dict[str, OrderedDict[str, None]] = {}  # of tenants, in access order
        self._bytes_of: Counter[str] = Counter()
        self._pins: dict[str, _Pin] = {}
        self._pinned_bytes_of: Counter[str] = Counter()
        self._pin_ends: list[tuple[float, str]] = []  # a heap; an entry whose pin has another end by now means nothing

    def __contains__(self, name: str) -> bool:
        """Whether the object is held."""
        return name in self._held

    def __len__(self) -> int:
        """Number of objects held."""
        return len(self._held)

    def size_of(self, name: str) -> int | None:
        """Bytes of an object's record; None where it is not held."""
        found = self._held.get(name)
        return None if found is None else found.num_bytes

    def touch(self, name: str, *, now_s: float, tenant: str | None = None) -> None:
        """Make a held object the most recently used; counts it for the tenant, if one is given."""
        if name in self._held:
            self.add(name, self._held[name].num_bytes, now_s=now_s, tenant=tenant)

    def reserve(self, num_bytes: int, *, now_s: float, tenant: str | None = None) -> tuple[str, ...] | None:
        """Set ``num_bytes`` aside for an object about to be written, of a tenant or of nobody known.

        Returns:
            The names evicted for it, those that go first at the front and never a pinned one, just enough; they are no
            longer in the index. None, with nothing changed, when that cannot make room.
        """
        needed = self.used_bytes + self.reserved_bytes + num_bytes - self.capacity_bytes
        victims = self._evict(needed, adding=num_bytes, now_s=now_s, tenant=tenant)
        if victims is not None:
            self.reserved_bytes += num_bytes
        return victims

    def evict(self, num_bytes: int, *, now_s: float, tenant: str | None = None) -> tuple[str, ...] | None:
        """Forget objects that hold ``num_bytes`` together, for a tenant's object; returns what ``reserve`` would."""
        return self._evict(num_bytes, adding=num_bytes, now_s=now_s, tenant=tenant)

    def _evict(self, needed: int, *, adding: int, now_s: float, tenant: str | None) -> tuple[str, ...] | None:
        victims: dict[str, None] = {}
        for name in self._go_first(needed, adding=adding, now_s=now_s, tenant=tenant):
            needed -= self._held[name].num_bytes
            victims[name] = None
        if needed > 0 and self._excess(tenant, adding, victims) <= 0:
            for name in self._held:
                if needed <= 0:
                    break
                if name not in victims and not self._is_pinned(name, now_s):
                    needed -= self._held[name].num_bytes
                    victims[name] = None
        if needed > 0:
            return None
        for name in victims:
            self.discard(name)
        self.num_evicted += len(victims)
        return tuple(victims)

    def _go_first(self, needed: int, *, adding: int, now_s: float, tenant: str | None) -> Iterator[str]:
        """What tenants hold beyond their quota, the writer's first, until enough goes."""
        quota_bytes = self._quota_bytes
        if quota_bytes is None or needed <= 0:
            return
        others = (each for each, held in self._bytes_of.items() if held > quota_bytes and each != tenant)
        by_excess = sorted(others, key=lambda each: (-self._bytes_of[each], each))
        for each in (*(() if tenant is None else (tenant,)), *by_excess):
            excess = self._excess(each, adding if each == tenant else 0, ())
            for name in self._names_of.get(each, ()):
                if needed <= 0 or excess <= 0:
                    break
                if not self._is_pinned(name, now_s):
                    needed -= self._held[name].num_bytes
                    excess -= self._held[name].num_bytes
                    yield name
            if each == tenant and excess > 0:
                return  # what is left of its own is pinned, or too little

    def _excess(self, tenant: str | None, adding: int, without: Iterable[str]) -> int:
        """Bytes by which a tenant would exceed its quota with so many more and without some of its objects."""
        quota_bytes = self._quota_bytes
        if tenant is None or quota_bytes is None:
            return 0
        own = (self._held[name] for name in without)
        return self._bytes_of[tenant] + adding - sum(e.num_bytes for e in own if e.tenant == tenant) - quota_bytes

    @property
    def _quota_bytes(self) -> int | None:
        share = self._retention.tenant_quota
        return None if share is None else int(share * self.capacity_bytes)

    def expire(self, *, now_s: float) -> tuple[str, ...]:
        """Forget what was not used for the ``ttl_s`` of the retention and is not pinned; returns the names."""
        ttl_s = self._retention.ttl_s
        if ttl_s is None:
            return ()
        expired = []
        for name, held in self._held.items():
            if held.used_s > now_s - ttl_s:
                break
            if not self._is_pinned(name, now_s):
                expired.append(name)
        for name in expired:
            self.discard(name)
        return tuple(expired)

    def commit(self, name: str, num_bytes: int, *, now_s: float, tenant: str | None = None) -> None:
        """Turn a reservation into a held object, the most recently used; replaces one of that name."""
        self.release(num_bytes)
        self.add(name, num_bytes, now_s=now_s, tenant=tenant)

    def release(self, num_bytes: int) -> None:
        """Give a reservation back."""
        self.reserved_bytes -= num_bytes

    def add(self, name: str, num_bytes: int, *, now_s: float, tenant: str | None = None) -> None:
        """Hold an object that is there already, as the most recently used; may exceed the bound until ``reserve``.

        Where no tenant is given, one that is known stays.
        """
        before = self._forget(name)
        if tenant is None and before is not None:
            tenant = before.tenant
        self._hold(name, HeldObject(num_bytes, now_s, tenant))

    def discard(self, name: str) -> bool:
        """Forget an object and its pin; whether it was held."""
        self.unpin(name)
        return self._forget(name) is not None

    def _hold(self, name: str, held: HeldObject) -> None:
        self._held[name] = held
        self.used_bytes += held.num_bytes
        if held.tenant is not None:
            self._names_of.setdefault(held.tenant, OrderedDict())[name] = None
            self._bytes_of[held.tenant] += held.num_bytes

    def _forget(self, name: str) -> HeldObject | None:
        held = self._held.pop(name, None)
        if held is None:
            return None
        self.used_bytes -= held.num_bytes
        if held.tenant is not None:
            self._bytes_of[held.tenant] -= held.num_bytes
            names = self._names_of[held.tenant]
            del names[name]
            if not names:
                del self._names_of[held.tenant], self._bytes_of[held.tenant]
        return held

    def sizes(self) -> dict[str, int]:
        """Bytes of each object held, least recently used first."""
        return {name: held.num_bytes for name, held in self._held.items()}

    def rebuild(self, entries: Iterable[tuple[str, HeldObject]]) -> None:
        """Replace what is held, least recently used first; pins and reservations stay, and tenants that are known."""
        before = self._held
        self._held, self.used_bytes = OrderedDict(), 0
        self._names_of, self._bytes_of = {}, Counter()
        for name, held in entries:
            known = before.get(name)
            tenant = held.tenant if known is None or held.tenant is not None else known.tenant
            self._hold(name, HeldObject(held.num_bytes, held.used_s, tenant))
        for name in [name for name in self._pins if name not in self._held]:
            self.unpin(name)

    def pin(self, name: str, *, until_s: float, now_s: float) -> PinOutcome:
        """Exempt a held object from eviction and expiry until ``until_s``, or longer where it is pinned for longer."""
        self._end_pins(now_s)
        held, before = self._held.get(name), self._pins.get(name)
        if held is None:
            return PinOutcome.MISSING
        if before is not None:
            if before.until_s >= until_s:
                return PinOutcome.PINNED
            self._pins[name] = replace(before, until_s=until_s)
        elif self._may_pin(held):
            self._pins[name] = pin = _Pin(until_s, held.num_bytes, held.tenant)
            self._count_pin(pin, 1)
        else:
            return PinOutcome.REFUSED
        heapq.heappush(self._pin_ends, (until_s, name))
        if len(self._pin_ends) > 2 * len(self._pins) + _SPARE_ENDS:  # of pins that were renewed or ended early
            self._pin_ends = [(each.until_s, other) for other, each in self._pins.items()]
            heapq.heapify(self._pin_ends)
        return PinOutcome.PINNED

    def _may_pin(self, held: HeldObject) -> bool:
        share, quota_bytes = self._retention.pinned_share, self._quota_bytes
        if self.pinned_bytes + held.num_bytes > share * self.capacity_bytes:
            return False
        if held.tenant is None or quota_bytes is None:
            return True
        return self._pinned_bytes_of[held.tenant] + held.num_bytes <= share * quota_bytes

    def unpin(self, name: str) -> bool:
        """End a pin; whether there was one."""
        pin = self._pins.pop(name, None)
        if pin is not None:
            self._count_pin(pin, -1)
        return pin is not None

    def _count_pin(self, pin: _Pin, sign: int) -> None:
        self.pinned_bytes += sign * pin.num_bytes
        if pin.tenant is not None:
            self._pinned_bytes_of[pin.tenant] += sign * pin.num_bytes
            if not self._pinned_bytes_of[pin.tenant]:
                del self._pinned_bytes_of[pin.tenant]

    def _end_pins(self, now_s: float) -> None:
        while self._pin_ends and self._pin_ends[0][0] <= now_s:
            until_s, name = heapq.heappop(self._pin_ends)
            pin = self._pins.get(name)
            if pin is not None and pin.until_s == until_s:
                self.unpin(name)

    def pin_left_s(self, name: str, *, now_s: float) -> float:
        """Seconds for which an object is pinned; 0 for one that is not."""
        pin = self._pins.get(name)
        return 0.0 if pin is None else max(0.0, pin.until_s - now_s)

    def _is_pinned(self, name: str, now_s: float) -> bool:
        pin = self._pins.get(name)
        return pin is not None and pin.until_s > now_s
