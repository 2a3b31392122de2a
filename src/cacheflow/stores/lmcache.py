"""Records behind one of LMCache's L2 adapters, two objects each: the header, whose length is known, and the payload."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from typing import Unpack

from lmcache.v1.distributed.api import ObjectKey as LmcacheKey

from cacheflow.stores.base import PutOutcome
from cacheflow.stores.bounded import Bounds
from cacheflow.stores.keys import ObjectKey, namespace_of
from cacheflow.stores.lmcache_adapter import AdapterSource, LmcacheAdapter, key_of_part
from cacheflow.stores.record import HEADER_BYTES, RECORD_VERSION, decode_header
from cacheflow.stores.shared import FoundRecord, SharedStore
from cacheflow.stores.staging import StagingBuffers, copy_out, gather

PREFIX = f"cacheflow{RECORD_VERSION}."
"""Of the ``model_name`` in LMCache's keys, which is free but for it."""

_HEADER, _PAYLOAD = 0, 1
"""Parts of a record, the ``kv_rank`` in LMCache's keys."""

_BATCH = 256
"""Records asked about at once."""


class LmcacheStore(SharedStore):
    """A bounded store behind an adapter.

    An adapter fills a buffer only from an object of its length, and few say how long an object is: so the header comes
    first, and says it. A record is there when both its objects are. Nothing is loaded that was not found a moment
    before, since some adapters never end the load of what is not there.

    Bytes travel through buffers of the store's own: an adapter may still write to one after a task was given up.

    Most adapters cannot list what they hold. Each process then bounds, counts and evicts what it has written or read
    itself (``can_list``).
    """

    name, default_threads = "lmcache", 4

    def __init__(self, source: AdapterSource, **bounds: Unpack[Bounds]) -> None:
        """Create the adapter, and list what it holds where it can.

        Raises:
            ConfigError: A count is below 1.
            StoreError: The adapter cannot be created, or does not answer.
        """
        super().__init__(source.name, **bounds)
        self._staging = StagingBuffers()
        self._adapter: LmcacheAdapter | None = None
        with self.opening():
            self._adapter = LmcacheAdapter(source, num_threads=self._num_threads, clock=self._clock)
            self._adapter.lookup([key_of_part(PREFIX, _HEADER)])
            self.can_list = self._adapter.listing() is not None
        self.log_opened(
            "" if self.can_list else "the adapter cannot list what it holds, so that this is of this process alone"
        )

    def read_record(self, key: ObjectKey, header: memoryview, payload: memoryview) -> int | None:
        """See ``ThreadedStore.read_record``.

        Raises:
            OSError: The adapter failed, or is too slow.
        """
        parts = _parts(key.name)
        if not all(self._open().lookup(parts)):
            self.note_gone(key.name)
            return None
        if not self._load(parts[_HEADER], header):
            return self._unloadable(key.name, parts)
        found = decode_header(header)
        if found is None or found.key_digest != key.digest:
            return payload.nbytes  # damaged: the payload need not be read to see that
        num_found = found.payload_bytes
        if num_found <= payload.nbytes and not self._load(parts[_PAYLOAD], payload[:num_found]):
            return self._unloadable(key.name, parts)
        self.note_read(key.name, HEADER_BYTES + num_found)
        return num_found

    def scan(self, known: Mapping[str, int]) -> list[FoundRecord]:
        """See ``SharedStore.scan``; where the adapter cannot list, those records that are known and still there."""
        listing = self._open().listing()
        if listing is None:
            there = dict(zip(known, self.are_there(list(known)), strict=True))
            sizes = {name: num_bytes for name, num_bytes in known.items() if there[name]}
        else:
            found: dict[str, dict[int, int]] = {}
            for each, num_bytes in listing:
                name = each.model_name.removeprefix(PREFIX)
                if each.model_name.startswith(PREFIX) and namespace_of(name) is not None:
                    found.setdefault(name, {})[each.kv_rank] = num_bytes
            sizes = {
                name: sum(parts.values()) for name, parts in found.items() if len(parts) == len((_HEADER, _PAYLOAD))
            }
        return self.first_seen(sizes)

    def are_there(self, names: Sequence[str]) -> tuple[bool, ...]:
        """See ``SharedStore.are_there``."""
        there: list[bool] = []
        for start in range(0, len(names), _BATCH):
            keys = [key for name in names[start : start + _BATCH] for key in _parts(name)]
            found = self._open().lookup(keys)
            there += map(all, zip(found[::2], found[1::2], strict=True))
        return tuple(there)

    def look_up(self, names: Sequence[str]) -> list[FoundRecord]:
        """See ``SharedStore.look_up``; reads each one's header."""
        found = []
        header = memoryview(bytearray(HEADER_BYTES))
        for name, is_there in zip(names, self.are_there(names), strict=True):
            if is_there and self._load(_parts(name)[_HEADER], header):
                record = decode_header(header)
                if record is not None:
                    found.append(FoundRecord(name, HEADER_BYTES + record.payload_bytes, time.time()))
        return found

    def write_whole(self, name: str, parts: Sequence[memoryview], *, replace: bool) -> PutOutcome:
        """See ``SharedStore.write_whole``; the header comes last.

        Raises:
            OSError: The adapter failed, or is too slow; the record may be there.
        """
        keys = _parts(name)
        if replace:
            self.erase(name)  # adapters leave what is there
        for part, pieces in reversed(list(enumerate(_split(parts)))):
            with self._staging.lend(sum(each.nbytes for each in pieces)) as (staging, give_back):
                gather(pieces, staging)
                self._open().store(keys[part], staging, give_back)
        return PutOutcome.STORED

    def erase(self, name: str) -> bool:
        """See ``SharedStore.erase``.

        Raises:
            OSError: The adapter failed, is too slow, or cannot remove anything.
        """
        adapter, keys = self._open(), _parts(name)
        there = [key for key, is_there in zip(keys, adapter.lookup(keys), strict=True) if is_there]
        if there:
            adapter.delete(there)
            if any(adapter.lookup(there)):
                raise OSError(errno.EOPNOTSUPP, f"{adapter} does not remove what it holds")
        return len(there) == len(keys)

    def close(self) -> None:
        """See ``Store.close``."""
        super().close()
        if self._adapter is not None:
            self._adapter.close()

    def _open(self) -> LmcacheAdapter:
        self.require_open()
        assert self._adapter is not None, "it is made before anybody asks"
        return self._adapter

    def _load(self, key: LmcacheKey, buffer: memoryview) -> bool:
        """Fill a buffer from an object; whether that worked."""
        with self._staging.lend(buffer.nbytes) as (staging, give_back):
            loaded = self._open().load(key, staging, give_back)
            if loaded:
                copy_out(staging, buffer)
        return loaded

    def _unloadable(self, name: str, parts: Sequence[LmcacheKey]) -> int | None:
        """What to return for a record of which a part was found and then not loaded: it went, or is damaged."""
        if all(self._open().lookup(parts)):
            return -1
        self.note_gone(name)
        return None


def _parts(name: str) -> tuple[LmcacheKey, LmcacheKey]:
    """LMCache's keys of a record."""
    return key_of_part(PREFIX + name, _HEADER), key_of_part(PREFIX + name, _PAYLOAD)


def _split(parts: Sequence[memoryview]) -> tuple[list[memoryview], list[memoryview]]:
    """Header and payload of a record, each in pieces."""
    header, payload, left = [], [], HEADER_BYTES
    for part in parts:
        if left:
            header.append(part[:left])
        if part.nbytes > left:
            payload.append(part[left:])
        left = max(0, left - part.nbytes)
    return header, payload
