"""Which objects a bounded store holds, in the order of their last use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from cacheflow.errors import ConfigError


class LruIndex:
    """Names and sizes in access order, bounded in bytes; not thread-safe, the owner holds a lock.

    Space is reserved before a record is written and committed when it is visible, so that writers at the same time
    stay within the bound together.
    """

    def __init__(self, capacity_bytes: int) -> None:
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
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self.reserved_bytes = 0
        """Bytes set aside for what is being written."""
        self._pinned_until_s: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the object is held."""
        return name in self._sizes

    def __len__(self) -> int:
        """Number of objects held."""
        return len(self._sizes)

    def touch(self, name: str) -> None:
        """Make a held object the most recently used."""
        if name in self._sizes:
            self._sizes.move_to_end(name)

    def reserve(self, num_bytes: int, *, now_s: float) -> tuple[str, ...] | None:
        """Set ``num_bytes`` aside for an object about to be written.

        Returns:
            The names evicted for it, least recently used first and never a pinned one, just enough; they are no
            longer in the index. None, with nothing changed, when that cannot make room.
        """
        victims = self.evict(self.used_bytes + self.reserved_bytes + num_bytes - self.capacity_bytes, now_s=now_s)
        if victims is not None:
            self.reserved_bytes += num_bytes
        return victims

    def evict(self, num_bytes: int, *, now_s: float) -> tuple[str, ...] | None:
        """Forget objects that hold ``num_bytes`` together; returns what ``reserve`` would."""
        needed = num_bytes
        victims: list[str] = []
        for name, size in self._sizes.items():
            if needed <= 0:
                break
            if self._pinned_until_s.get(name, float("-inf")) <= now_s:
                victims.append(name)
                needed -= size
        if needed > 0:
            return None
        for name in victims:
            self.discard(name)
        self.num_evicted += len(victims)
        return tuple(victims)

    def commit(self, name: str, num_bytes: int) -> None:
        """Turn a reservation into a held object, the most recently used; replaces one of that name."""
        self.release(num_bytes)
        self.add(name, num_bytes)

    def release(self, num_bytes: int) -> None:
        """Give a reservation back."""
        self.reserved_bytes -= num_bytes

    def add(self, name: str, num_bytes: int) -> None:
        """Hold an object that is there already, as the most recently used; may exceed the bound until ``reserve``."""
        self.used_bytes += num_bytes - self._sizes.pop(name, 0)
        self._sizes[name] = num_bytes

    def discard(self, name: str) -> bool:
        """Forget an object and its pin; whether it was held."""
        self._pinned_until_s.pop(name, None)
        size = self._sizes.pop(name, None)
        self.used_bytes -= size or 0
        return size is not None

    def sizes(self) -> dict[str, int]:
        """Bytes of each object held, least recently used first."""
        return dict(self._sizes)

    def rebuild(self, entries: Iterable[tuple[str, int]]) -> None:
        """Replace what is held by ``(name, size)``, least recently used first; pins and reservations stay."""
        self._sizes = OrderedDict(entries)
        self.used_bytes = sum(self._sizes.values())
        self._pinned_until_s = {name: end for name, end in self._pinned_until_s.items() if name in self._sizes}

    def pin(self, name: str, *, until_s: float) -> bool:
        """Exempt a held object from eviction until ``until_s``; False when it is not held."""
        if name not in self._sizes:
            return False
        self._pinned_until_s[name] = until_s
        return True

    def unpin(self, name: str) -> None:
        """End a pin, if there is one."""
        self._pinned_until_s.pop(name, None)
