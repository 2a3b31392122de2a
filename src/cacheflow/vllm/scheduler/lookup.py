"""Asks the store how much of a prompt it holds, off the scheduler's thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from queue import SimpleQueue
from threading import Thread

from cacheflow.stores.base import Store
from cacheflow.stores.keys import ObjectKey
from cacheflow.types import Clock

logger = logging.getLogger(__name__)

INLINE_WAIT_S = 0.001
"""A lookup that a local store answers at once is waited for, once; a slow one is asked about again in each step without
waiting: vLLM asks for every request in its queue, between the tokens of those that decode."""
NUM_THREADS = 2
CHUNKS_PER_PROBE = 64
"""Chunks asked for in one ``contains``; bounds what is asked in vain behind a divergence."""


class Lookup:
    """One request's question; ``poll`` from the thread that asked."""

    def __init__(self, future: Future[int], *, deadline_at_s: float, clock: Clock) -> None:
        """Wrap a question that is under way."""
        self._future, self._deadline_at_s, self._clock = future, deadline_at_s, clock
        self._wait_s = INLINE_WAIT_S
        self.timed_out = False

    def poll(self) -> int | None:
        """Number of leading chunks the store holds; 0 after the deadline, None while it is not known."""
        if self.timed_out:
            return 0
        wait_s, self._wait_s = self._wait_s, 0.0
        try:
            return self._future.result(wait_s)
        except TimeoutError:
            self.timed_out = self._clock() >= self._deadline_at_s
            return 0 if self.timed_out else None


class PrefixLookup:
    """Two threads that ask ``Store.contains``: a store that hangs costs a request its deadline, nobody else."""

    def __init__(self, store: Store, *, timeout_s: float, clock: Clock) -> None:
        """Ask ``store``; a question is given up after ``timeout_s``."""
        self._store, self._timeout_s, self._clock = store, timeout_s, clock
        self._closed = False
        self._questions: SimpleQueue[tuple[Future[int], Sequence[Sequence[ObjectKey]]] | None] = SimpleQueue()
        self._threads: list[Thread] = []

    def start(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> Lookup:
        """Ask for the objects of each chunk, in order."""
        # Daemons, which a pool's threads are not: a store that hangs must not keep the process from ending.
        while len(self._threads) < NUM_THREADS:
            name = f"cacheflow-lookup-{len(self._threads)}"
            self._threads.append(Thread(target=self._answer, name=name, daemon=True))
            self._threads[-1].start()
        future: Future[int] = Future()
        self._questions.put((future, keys_by_chunk))
        return Lookup(future, deadline_at_s=self._clock() + self._timeout_s, clock=self._clock)

    def _answer(self) -> None:
        while (question := self._questions.get()) is not None:
            future, keys_by_chunk = question
            future.set_result(0 if self._closed else self._count_leading(keys_by_chunk))

    def _count_leading(self, keys_by_chunk: Sequence[Sequence[ObjectKey]]) -> int:
        try:
            for first in range(0, len(keys_by_chunk), CHUNKS_PER_PROBE):
                probe = keys_by_chunk[first : first + CHUNKS_PER_PROBE]
                there = iter(self._store.contains([key for keys in probe for key in keys]))
                for index, keys in enumerate(probe):
                    found = [next(there) for _ in keys]
                    if not all(found):
                        return first + index
        except Exception:  # a bug in a store must cost a hit, not the engine
            logger.exception("prefix lookup failed; the prompt is computed")
            return 0
        return len(keys_by_chunk)

    def close(self) -> None:
        """End the threads; a store that hangs is left behind."""
        self._closed = True
        for _ in self._threads:
            self._questions.put(None)
