"""Asks a store what may hang, and goes on without an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TypeVar

from cacheflow.threads import start_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Asker:
    """Daemon threads, which a pool's threads are not: a store that hangs must not keep the process from ending."""

    def __init__(self, name: str, *, num_threads: int) -> None:
        """Start no thread before the first question; ``name`` is that of the threads."""
        self._name, self._num_threads = name, num_threads
        self._questions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._lock = Lock()
        self._closed = False

    def ask(self, question: Callable[[], T], nothing: T) -> Future[T]:
        """Ask; the answer is ``nothing`` where the question raises, and once the asker is closed.

        A question is not asked any more once its future was cancelled.
        """
        future: Future[T] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(nothing if self._closed else question())
            except Exception:  # a bug in a store must cost a hit, not a request
                logger.exception("a store raised on a question")
                future.set_result(nothing)

        with self._lock:
            while not self._closed and len(self._threads) < self._num_threads:
                thread = start_thread(self._work, name=self._name)
                if thread is None:
                    break
                self._threads.append(thread)
            answered = bool(self._threads)
        if answered:
            self._questions.put(answer)
        else:
            future.set_result(nothing)
        return future

    def _work(self) -> None:
        while (answer := self._questions.get()) is not None:
            answer()

    def close(self) -> None:
        """End the threads without waiting for one that hangs."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._questions.put(None)
