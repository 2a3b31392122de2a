"""Objects whose record is of no use (damaged, or nothing that this process can decode): they count as absent."""

from __future__ import annotations

from threading import Lock

from cacheflow.stores.keys import ObjectKey

MAX_SUSPECTS = 1 << 14


class Suspects:
    """The newest of them, until each is written again, deleted or found gone. Thread-safe.

    One that is forgotten before that counts as held again: the next read finds out, and it is noted anew.
    """

    def __init__(self) -> None:
        self._keys: dict[ObjectKey, None] = {}  # the oldest first
        self._lock = Lock()

    def __contains__(self, key: ObjectKey) -> bool:
        """Whether it is one; without the lock, since every read and every question passes here."""
        return bool(self._keys) and key in self._keys

    def __len__(self) -> int:
        """How many there are."""
        return len(self._keys)

    def add(self, key: ObjectKey) -> None:
        """Take an object for one; the oldest goes where there are too many."""
        with self._lock:
            self._keys.pop(key, None)
            self._keys[key] = None
            if len(self._keys) > MAX_SUSPECTS:
                del self._keys[next(iter(self._keys))]

    def discard(self, key: ObjectKey) -> None:
        """It is one no longer, if it was."""
        if key in self:
            with self._lock:
                self._keys.pop(key, None)
