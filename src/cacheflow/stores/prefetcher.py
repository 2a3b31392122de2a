"""Objects that are brought from slower tiers into the fastest one before anybody reads them.

A prefetch is a promotion that nobody waits for, so it yields to whoever waits. It reads from a tier only while no one
else does, after all other reads that are queued there and ``WINDOW`` objects at a time; it waits until nothing is to be
written to the fastest tier; and what it has brought there unread takes at most ``SHARE`` of what pins leave. What finds
no room, is nowhere or waits too long is dropped.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Condition, Thread

import numpy as np
import numpy.typing as npt

from cacheflow.stores.base import GetRequest, PinOutcome, PrefetchOutcome, PrefetchRequest, Priority, PutRequest
from cacheflow.stores.copy_queue import copy_of
from cacheflow.stores.keys import ObjectKey
from cacheflow.stores.record import HEADER_BYTES, RecordHeader
from cacheflow.stores.tier import Tier
from cacheflow.threads import start_thread
from cacheflow.types import Clock, LoadOutcome

logger = logging.getLogger(__name__)

WINDOW = 2
"""Objects read at once: so many at most are in the way of a read that comes now."""
SHARE = 0.5
"""Of the fastest tier without its pins, for what was brought there and not read yet. So what is used again and again
stays: at least half of the tier is left to it, and it goes last."""
MAX_WANTED = 1 << 14
"""Objects that may wait; more are dropped."""
PROBE = 64
"""Objects whose tier is asked for at once."""
READ_S = 30.0
"""Deadline of one read; one that waits for the reads of others all that time is given up."""
WRITE_S = 30.0
"""Longest wait until the fastest tier has it."""
SLICE_S = 0.1
"""Longest wait for a tier to be left alone before it is looked whether that is still wanted."""
UNUSED_S = 300.0
"""What was not read for so long, and is not pinned, counts as what others have left there."""
SWEEP_S = 5.0
"""Time between two looks at what is left of what was not read yet."""
_JOIN_S = 1.0


@dataclass(slots=True, eq=False)
class _Wanted:
    """An object to bring; ``until_s`` is when that is given up, ``keep_until_s`` the end of its pin, 0 without one."""

    num_bytes: int
    until_s: float
    keep_until_s: float


@dataclass(slots=True, eq=False)
class _Unread:
    """One that was brought, and the bytes of its record; counted until it is read, gone, or ``until_s``.

    What is ``pinned`` counts among pins.
    """

    num_bytes: int
    until_s: float
    pinned: bool = False


_Item = tuple[ObjectKey, _Wanted]


class Prefetcher:
    """Serves one ``TieredStore``, on a daemon thread that is started with the first prefetch. Thread-safe.

    None of its methods waits for a store.
    """

    def __init__(self, tiers: Sequence[Tier], *, clock: Clock) -> None:
        """Bring objects from ``tiers[1:]`` into ``tiers[0]``.

        Args:
            tiers: The fastest first; not owned.
            clock: Monotonic clock.
        """
        self._fast, self._slower, self._clock = tiers[0], tuple(tiers[1:]), clock
        self._changed = Condition()
        self._wanted: OrderedDict[ObjectKey, _Wanted] = OrderedDict()
        self._unread: dict[ObjectKey, _Unread] = {}
        self._unread_bytes = 0  # of what is not pinned
        self._counts: Counter[PrefetchOutcome] = Counter(dict.fromkeys(PrefetchOutcome, 0))
        self._buffers = [np.empty(0, np.uint8) for _ in range(WINDOW)]
        self._thread: Thread | None = None
        self._closed = False

    def counts(self) -> Mapping[PrefetchOutcome, int]:
        """Objects by what became of their prefetch; every outcome is a key."""
        with self._changed:
            return dict(self._counts)

    def take(self, requests: Sequence[PrefetchRequest], *, within_s: float, keep_s: float) -> int:
        """Bring objects in this order, after what waits already; see ``Store.prefetch``.

        What waits already waits for as long, and is kept for as long, as the longer of both says.
        """
        now_s = self._clock()
        until_s, keep_until_s = now_s + within_s, now_s + keep_s if keep_s else 0.0
        num_taken = 0
        with self._changed:
            for each in requests if not self._closed else ():
                wanted = self._wanted.get(each.key)
                if wanted is not None:
                    wanted.until_s = max(wanted.until_s, until_s)
                    wanted.keep_until_s = max(wanted.keep_until_s, keep_until_s)
                elif len(self._wanted) < MAX_WANTED:
                    self._wanted[each.key] = _Wanted(each.num_bytes, until_s, keep_until_s)
                else:
                    break
                num_taken += 1
            self._counts[PrefetchOutcome.DROPPED] += len(requests) - num_taken
            if self._wanted and self._thread is None:
                self._thread = start_thread(self._work, name="cacheflow-tier-prefetch")
            self._changed.notify_all()
        return num_taken

    def note_read(self, keys: Iterable[ObjectKey]) -> None:
        """Somebody reads these: what waits need not be brought any more, and what was brought was of use."""
        if not self._wanted and not self._unread:  # every read passes here
            return
        with self._changed:
            brought = []
            for key in keys:
                self._wanted.pop(key, None)
                if self._forget_unread(key):
                    brought.append(key)
        if not brought:
            return
        # Only of this process's memory is that known at once; of another tier it is taken to be there.
        there = (True,) * len(brought) if self._fast.may_hang else self._fast.store.contains(brought)
        with self._changed:
            self._counts[PrefetchOutcome.USED] += sum(there)
            self._counts[PrefetchOutcome.WASTED] += len(there) - sum(there)

    def forget(self, keys: Collection[ObjectKey]) -> None:
        """Bring none of these, and let none of them appear later: they are being deleted."""
        with self._changed:
            for key in keys:
                self._wanted.pop(key, None)
                self._forget_unread(key)

    def unpin(self, keys: Collection[ObjectKey]) -> None:
        """Pin none of these once they are there."""
        with self._changed:
            for key in keys:
                if (wanted := self._wanted.get(key)) is not None:
                    wanted.keep_until_s = 0.0
                unread = self._unread.get(key)
                if unread is not None and unread.pinned:
                    unread.pinned, unread.until_s = False, self._clock() + UNUSED_S
                    self._unread_bytes += unread.num_bytes

    def close(self) -> None:
        """Drop what waits, and end the thread once a read under way has ended; does not wait for that."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait a moment for the thread, once it and the tiers were closed; one that hangs is left behind."""
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    # The thread.

    def _work(self) -> None:
        while (items := self._next_items()) is not None:
            try:
                if items:
                    self._bring_all(items)
                else:
                    self._sweep()
            except Exception:  # a bug in a store must cost prefetches, not their thread
                logger.exception("objects could not be prefetched")
                self._end(items, PrefetchOutcome.DROPPED)

    def _next_items(self) -> list[_Item] | None:
        """The next objects to bring; none when it is time to look at those that were not read yet, None at the end."""
        with self._changed:
            while not self._closed:
                if self._wanted:
                    return list(islice(self._wanted.items(), PROBE))
                if not self._changed.wait(SWEEP_S if self._unread else None):
                    return []
            return None

    def _bring_all(self, items: Sequence[_Item]) -> None:
        for tier, found in self._locate(items).items():
            for first in range(0, len(found), WINDOW):
                if not self._bring(tier, found[first : first + WINDOW]):
                    break
        # What is there already, or nowhere, has ended; whatever is left found no tier that delivers.
        self._end(items, PrefetchOutcome.DROPPED)

    def _locate(self, items: Sequence[_Item]) -> dict[Tier, list[_Item]]:
        """What is in a slower tier, by tier; the others end here."""
        there, left = self._split(self._fast, items)
        self._pin(there)
        self._end(there, None)
        found: dict[Tier, list[_Item]] = {}
        for tier in self._slower if self._fast.delivers else ():
            found[tier], left = self._split(tier, left)
        if self._fast.delivers and all(tier.delivers for tier in self._slower):
            self._end(left, None)
        return found

    def _split(self, tier: Tier, items: Sequence[_Item]) -> tuple[list[_Item], list[_Item]]:
        """What a tier holds, and what it does not."""
        keys = [key for key, _ in items]
        held = tier.ask(partial(tier.store.contains, keys), (False,) * len(keys), num_keys=len(keys)) if keys else ()
        pairs = list(zip(items, held, strict=True))
        return [item for item, is_held in pairs if is_held], [item for item, is_held in pairs if not is_held]

    def _bring(self, tier: Tier, items: Sequence[_Item]) -> bool:
        """Read some objects from a tier and have them written to the fastest; whether to go on with this tier."""
        wanted = self._when_unread(tier, items)
        if not wanted:
            return tier.delivers and not self._closed
        if not self._has_room(sum(each.num_bytes + HEADER_BYTES for _, each in wanted)):
            self._drop_all()
            return False
        buffers = [self._buffer(number, each.num_bytes) for number, (_, each) in enumerate(wanted)]
        records: dict[ObjectKey, RecordHeader] = {}
        requests = [
            GetRequest(key, buffer, tell=partial(records.__setitem__, key))
            for (key, _), buffer in zip(wanted, buffers, strict=True)
        ]
        handle = tier.store.submit_get(requests, priority=Priority.AHEAD, deadline_s=READ_S)
        outcomes = handle.wait()
        handle.cancel()  # a read that is late has its buffer still
        read = [
            item
            for item, buffer, outcome in zip(wanted, buffers, outcomes, strict=True)
            if outcome is LoadOutcome.OK and self._offer(item, copy_of(item[0], buffer, records.get(item[0])))
        ]
        self._fast.copies.settle([key for key, _ in read], WRITE_S)
        arrived, _ = self._split(self._fast, read)
        self._note_arrived(arrived)
        self._pin(arrived)
        self._end(wanted, PrefetchOutcome.DROPPED)
        return not {LoadOutcome.ERROR, LoadOutcome.LATE, LoadOutcome.CANCELLED}.intersection(outcomes)

    def _offer(self, item: _Item, copy: PutRequest) -> bool:
        """Have an object written that is still wanted; with the lock, so that none appears that is being deleted."""
        key, wanted = item
        with self._changed:
            if self._wanted.get(key) is not wanted:
                return False
            self._fast.copies.offer(copy, promotes=True)
            return True

    def _when_unread(self, tier: Tier, items: Sequence[_Item]) -> list[_Item]:
        """Wait until nobody reads from a tier, and nothing is to be written to the fastest; what is wanted by then."""
        while tier.delivers and self._still_wanted(items):
            if self._fast.copies.drain(SLICE_S) and tier.wait_until_unread(SLICE_S):
                return self._still_wanted(items)  # those who have read meanwhile may have read some of them
        return []

    def _still_wanted(self, items: Sequence[_Item]) -> list[_Item]:
        now_s, wanted, late = self._clock(), list[_Item](), list[_Item]()
        with self._changed:
            for key, each in items:
                if self._wanted.get(key) is each:
                    (wanted if each.until_s > now_s else late).append((key, each))
        self._end(late, PrefetchOutcome.DROPPED)
        return wanted

    def _buffer(self, number: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        if self._buffers[number].nbytes < num_bytes:
            self._buffers[number] = np.empty(num_bytes, np.uint8)
        return self._buffers[number][:num_bytes]

    # The room that it takes in the fastest tier.

    def _has_room(self, num_bytes: int) -> bool:
        if self._room() >= num_bytes:
            return True
        self._sweep()
        return self._room() >= num_bytes

    def _room(self) -> float:
        capacity_bytes = self._fast.store.capabilities().capacity_bytes
        if capacity_bytes is None:
            return float("inf")
        unpinned_bytes = capacity_bytes - self._fast.store.stats().pinned_bytes
        with self._changed:
            return SHARE * unpinned_bytes - self._unread_bytes

    def _sweep(self) -> None:
        """Count no longer what is gone from the fastest tier, or was not read for long."""
        now_s = self._clock()
        with self._changed:
            for key in [key for key, each in self._unread.items() if each.until_s <= now_s]:
                self._forget_unread(key)
            keys = list(self._unread)
        held = (
            self._fast.ask(partial(self._fast.store.contains, keys), (True,) * len(keys), num_keys=len(keys))
            if keys
            else ()
        )
        with self._changed:
            for key, is_held in zip(keys, held, strict=True):
                if not is_held and self._forget_unread(key):
                    self._counts[PrefetchOutcome.WASTED] += 1

    def _forget_unread(self, key: ObjectKey) -> bool:
        """With the lock held; whether it was there to forget."""
        unread = self._unread.pop(key, None)
        if unread is not None and not unread.pinned:
            self._unread_bytes -= unread.num_bytes
        return unread is not None

    def _note_arrived(self, items: Sequence[_Item]) -> None:
        until_s = self._clock() + UNUSED_S
        stored = self._fast.store.stored_bytes([(key, each.num_bytes) for key, each in items])
        with self._changed:
            self._counts[PrefetchOutcome.FETCHED] += len(items)
            for (key, each), num_bytes in zip(items, stored, strict=True):
                self._forget_unread(key)
                # What somebody has begun to read meanwhile is of use already.
                if self._wanted.get(key) is each:
                    self._unread[key] = _Unread(num_bytes + HEADER_BYTES, until_s)
                    self._unread_bytes += num_bytes + HEADER_BYTES
                else:
                    self._counts[PrefetchOutcome.USED] += 1
            self._changed.notify_all()

    def _pin(self, items: Sequence[_Item]) -> None:
        """Pin what is in the fastest tier, where that was asked for, and be done with all of it."""
        for key, each in items:
            left_s = each.keep_until_s - self._clock()
            if left_s > 0:
                pin, nothing = partial(self._fast.store.pin, [key], ttl_s=left_s), tuple[PinOutcome, ...]()
                self._note_pinned(key, each, is_pinned=PinOutcome.PINNED in self._fast.ask(pin, nothing, num_keys=1))
        self._end(items, None)

    def _note_pinned(self, key: ObjectKey, wanted: _Wanted, *, is_pinned: bool) -> None:
        with self._changed:
            undone = not wanted.keep_until_s  # since it was asked for
            unread = self._unread.get(key)
            if is_pinned and unread is not None and not unread.pinned and not undone:
                unread.pinned, unread.until_s = True, wanted.keep_until_s
                self._unread_bytes -= unread.num_bytes
        if undone:
            self._fast.tell(partial(self._fast.store.unpin, [key]), None)

    def _end(self, items: Iterable[_Item], outcome: PrefetchOutcome | None) -> None:
        """These wait no longer; those that did until now count as ``outcome``."""
        with self._changed:
            for key, each in items:
                if self._wanted.get(key) is each:
                    del self._wanted[key]
                    if outcome is not None:
                        self._counts[outcome] += 1

    def _drop_all(self) -> None:
        with self._changed:
            self._counts[PrefetchOutcome.DROPPED] += len(self._wanted)
            self._wanted.clear()
