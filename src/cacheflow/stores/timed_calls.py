"""Calls into somebody else's library that may never return, from threads that must."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TypeVar

from cacheflow.stores.asker import Asker
from cacheflow.stores.breaker import Breaker
from cacheflow.threads import start_thread
from cacheflow.types import Clock

T = TypeVar("T")

CLOSE_TIMEOUT_S = 5.0
"""Longest time for which closing a store waits until its library has closed."""


class GivenUpError(TimeoutError):
    """A call took too long; it may still end, on its own thread."""


class TimedCalls:
    """Carries out calls on daemon threads of its own and gives up on one that takes too long.

    A call that is given up may still end later, on its own thread: what it was passed must be its own until then. For
    a second after it further ones fail at once (``Breaker``), so that a server that hangs costs few timeouts.
    Thread-safe.
    """

    def __init__(self, server: str, *, num_threads: int, timeout_s: float, clock: Clock) -> None:
        """Start no thread yet.

        Args:
            server: What messages call it.
            num_threads: Calls under way at the same time; those that were given up count until they end.
            timeout_s: Longest time for one call.
            clock: Monotonic clock, for the second of silence.
        """
        self._server, self._timeout_s = server, timeout_s
        self._asker = Asker("cacheflow-call", num_threads=num_threads)
        self._breaker = Breaker(server, clock=clock)
        self._lock = threading.Lock()
        self._num_running = 0
        self._closed = False

    def call(self, function: Callable[[], T], *, given_up: Callable[[], None] | None = None) -> T:
        """Return what ``function`` returns.

        Args:
            function: Called once, on another thread; what it raises is passed on.
            given_up: Called on that thread when ``function`` ends after this call was given up.

        Raises:
            GivenUpError: It took too long.
            OSError: A call was given up a moment ago (``EHOSTDOWN``), the calls are closed (``ESHUTDOWN``), or no
                thread could be started (``EAGAIN``); the function was not called.
        """
        self._breaker.check()
        with self._lock:
            if self._closed:
                raise ConnectionError(errno.ESHUTDOWN, f"{self._server} is closed")
            self._num_running += 1
        answers: list[T] = []
        errors: list[Exception] = []
        settled = threading.Lock()  # who takes it first says whether the call ended in time

        def carry_out() -> None:
            try:
                answers.append(function())
            except Exception as error:  # noqa: BLE001 - passed on to the caller
                errors.append(error)
            with self._lock:
                self._num_running -= 1
            if not settled.acquire(blocking=False) and given_up is not None:
                given_up()

        future = self._asker.ask(carry_out, None)
        try:
            future.result(self._timeout_s)
        except TimeoutError:
            if settled.acquire(blocking=False):
                self._breaker.trip()
                message = f"{self._server} did not answer for {self._timeout_s:g} s"
                raise GivenUpError(errno.ETIMEDOUT, message) from None
            future.result()  # it ended just now
        if errors:
            raise errors[0]
        if not answers:  # not carried out
            with self._lock:
                self._num_running -= 1
            if self._closed:
                raise ConnectionError(errno.ESHUTDOWN, f"{self._server} is closed")
            raise BlockingIOError(errno.EAGAIN, f"{self._server} was not called: no thread could be started")
        return answers[0]

    def check(self) -> None:
        """Pass unless a call was given up a moment ago.

        Raises:
            ConnectionError: One was.
        """
        self._breaker.check()

    def trip(self) -> None:
        """A call ended, and what it said was that the server is gone: be silent for a moment."""
        self._breaker.trip()

    def close(self) -> bool:
        """Take no further calls; whether none is under way, so that what they use may be freed."""
        with self._lock:
            self._closed = True
            idle = self._num_running == 0
        self._asker.close()
        return idle


def closes_in_time(close: Callable[[], object]) -> bool:
    """Have a library close on a thread of its own, which is left behind where it hangs; whether it has ended."""
    return ends_in_time(close, timeout_s=CLOSE_TIMEOUT_S)


def ends_in_time(call: Callable[[], object], *, timeout_s: float) -> bool:
    """Carry out a call on a thread of its own, which is left behind where it hangs; whether it has ended."""
    thread = start_thread(call, name="cacheflow-ending")
    if thread is None:
        return False
    thread.join(timeout_s)
    return not thread.is_alive()
