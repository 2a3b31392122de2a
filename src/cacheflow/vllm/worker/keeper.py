"""Pins the prefixes that requests ask to keep, on a thread of its own: a store may have to ask its medium for it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, Thread

from cacheflow.stores.base import PinOutcome, Store
from cacheflow.stores.keys import ObjectKey
from cacheflow.threads import start_thread
from cacheflow.vllm.step import KeepWork

logger = logging.getLogger(__name__)

WRITES_S = 10.0
"""Writes under way are waited for so long: what is not there cannot be pinned."""

PEERS_PAUSES_S = (0.0, 0.5, 2.0)
"""Before each time that the objects of other ranks are looked for, which those write in their own time."""

WaitForWrites = Callable[[float], None]
"""Waits, for so many seconds at most, until what was under way when it was made is in the store."""


class PrefixKeeper:
    """Carries ``KeepWork`` out in the background, one after the other. Its methods on one thread."""

    def __init__(self, store: Store) -> None:
        """Pin in ``store``."""
        self._store = store
        self._to_do: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = Event()
        self._lock = Lock()
        self._outcomes: Counter[str] = Counter()

    def carry_out(self, work: KeepWork, *, written: WaitForWrites) -> None:
        """Pin a prefix, or end that, once what is under way of it is ``written``."""
        if self._thread is None:
            self._thread = start_thread(self._work, name="cacheflow-keep")
        began_s = time.monotonic()
        self._to_do.put(lambda: self._carry_out(work, written, began_s))

    def take_outcomes(self) -> Counter[str]:
        """Chunks that were to be pinned, by outcome, since the last call."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, Counter()
        return outcomes

    def close(self) -> None:
        """End the thread, without waiting for a store that hangs."""
        self._closed.set()
        self._to_do.put(None)

    def _work(self) -> None:
        while (work := self._to_do.get()) is not None and not self._closed.is_set():
            try:
                work()
            except Exception:  # a bug in a store must cost a pin, not the engine
                logger.exception("a prefix could not be kept")

    def _carry_out(self, work: KeepWork, written: WaitForWrites, began_s: float) -> None:
        if not work.keep_s:
            for each in work.chain_hashes:
                self._store.unpin(_all_keys(work, each))
            return
        written(WRITES_S)
        outcomes = self._pin(work, until_s=began_s + work.keep_s)
        with self._lock:
            self._outcomes.update(each.value for each in outcomes.values())

    def _pin(self, work: KeepWork, *, until_s: float) -> dict[str, PinOutcome]:
        """Pin chunk by chunk, the first one first: without it the others are of no use. Outcomes by chain hash."""
        outcomes = dict.fromkeys(work.chain_hashes, PinOutcome.MISSING)
        for pause_s in PEERS_PAUSES_S if len(work.objects) > 1 else (0.0,):
            if self._closed.wait(pause_s):
                break
            for each in work.chain_hashes:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return outcomes
                if outcomes[each] is PinOutcome.MISSING:
                    outcomes[each] = self._pin_chunk(work, each, left_s)
                if outcomes[each] is PinOutcome.REFUSED:
                    refused = work.chain_hashes[work.chain_hashes.index(each) :]
                    return outcomes | dict.fromkeys(refused, PinOutcome.REFUSED)
            if PinOutcome.MISSING not in outcomes.values():
                break
        return outcomes

    def _pin_chunk(self, work: KeepWork, chain_hash: str, ttl_s: float) -> PinOutcome:
        num_kv = len({key for rank in work.objects for key in rank.kv(work.namespace, chain_hash)})
        found = self._store.pin(_all_keys(work, chain_hash), ttl_s=ttl_s)[:num_kv]
        worst = (each for each in (PinOutcome.REFUSED, PinOutcome.MISSING) if each in found)
        return next(worst, PinOutcome.PINNED)


def _all_keys(work: KeepWork, chain_hash: str) -> list[ObjectKey]:
    """The objects of a chunk on all ranks: keys and values first, then what may be stored beside them."""
    kv = [key for rank in work.objects for key in rank.kv(work.namespace, chain_hash)]
    beside = [key for rank in work.objects for key in rank.beside(work.namespace, chain_hash)]
    return list(dict.fromkeys([*kv, *beside]))
