"""One of LMCache's L2 adapters, asked one object at a time and never waited for longer than its time.

An adapter is given tasks, and says by three file descriptors when some have ended. See LMCache's own
``lmcache.v1.distributed.l2_adapters``.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import inspect
import json
import logging
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from cacheflow.stores.lmcache_url import cleared
from cacheflow.stores.timed_calls import GivenUpError, TimedCalls, closes_in_time
from cacheflow.types import Bytes, Clock

logger = logging.getLogger(__name__)

_PAGE = 500
"""Keys of a listing asked for at once."""

_LAYOUT = {0: MemoryLayoutDesc(shapes=[torch.Size([1])], dtypes=[torch.uint8])}
"""What lookups of some versions want to know of the objects, and no adapter of ours uses."""


def key_of_part(name: str, part: int) -> ObjectKey:
    """LMCache's key of one part of a record; the name can be read off it."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return ObjectKey(chunk_hash=digest, model_name=name, kv_rank=part)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where an adapter comes from.

    Attributes:
        name: What messages call it.
        create: Returns LMCache's ``L2AdapterInterface``; raises ``OSError``.
        timeout_s: Longest time for one task of the adapter.
    """

    name: str
    create: Callable[[], Any]
    timeout_s: float = 10.0

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, timeout_s: float) -> AdapterSource:
        """By LMCache's own configuration, which it checks.

        Raises:
            ValueError: LMCache refuses it.
        """
        parsed = _parsed(settings)
        return cls(str(settings["type"]), partial(_created, parsed), timeout_s)


class LmcacheAdapter:
    """Tasks of one adapter, waited for; thread-safe.

    A task that does not end in time is given up: its buffer is not used again before it ends, what it locks is unlocked
    when it has ended, and for a second further ones fail at once. What has been given up and never ends is kept in
    memory. An adapter that raises where it should say what has ended costs the tasks that it says nothing of, which are
    given up in their time.
    """

    def __init__(self, source: AdapterSource, *, num_threads: int, clock: Clock) -> None:
        """Create the adapter.

        Args:
            source: Of the adapter.
            num_threads: Calls that may block at the same time.
            clock: Monotonic clock, for the second of silence.

        Raises:
            OSError: The adapter cannot be created.
        """
        self._name, self._timeout_s = source.name, source.timeout_s
        self._calls = TimedCalls(str(self), num_threads=num_threads, timeout_s=source.timeout_s, clock=clock)
        self._changed = Condition()
        self._running: dict[tuple[str, int], Callable[[Any], object]] = {}  # and what takes the result of a late one
        self._ended: dict[tuple[str, int], Any] = {}
        self._given_up: set[tuple[str, int]] = set()
        self._closed = self._has_raised = False
        self._closing = Lock()
        self._adapter = self._calls.call(source.create)
        words = inspect.signature(self._adapter.submit_lookup_and_lock_task).parameters
        self._lookup_words: tuple[Any, ...] = (_LAYOUT,) if len(words) > 1 else ()
        self._wake_fd = os.eventfd(0)
        self._events = select.poll()
        for fd in (
            self._wake_fd, self._adapter.get_store_event_fd(), self._adapter.get_lookup_and_lock_event_fd(),
            self._adapter.get_load_event_fd(),
        ):  # fmt: skip
            self._events.register(fd, select.POLLIN)
        self._collector = Thread(target=self._collect, name="cacheflow-lmcache", daemon=True)
        self._collector.start()

    def __str__(self) -> str:
        """What messages call it."""
        return f"LMCache's adapter {self._name}"

    def lookup(self, keys: Sequence[ObjectKey]) -> tuple[bool, ...]:
        """Whether each object is there; nothing stays locked.

        Raises:
            OSError: It failed or took too long.
        """
        submit = partial(self._adapter.submit_lookup_and_lock_task, list(keys), *self._lookup_words)
        unlock = partial(self._unlock, keys)
        return unlock(self._run("lookup", submit, unlock))

    def _unlock(self, keys: Sequence[ObjectKey], bits: Any) -> tuple[bool, ...]:  # noqa: ANN401 - LMCache's bitmap
        """End the locks of a lookup; returns which of the objects it has found."""
        found = tuple(bits.test(number) for number in range(len(keys)))
        there = [key for key, is_there in zip(keys, found, strict=True) if is_there]
        if there:
            self._adapter.submit_unlock(there)
        return found

    def store(self, key: ObjectKey, staging: Bytes, give_back: Callable[[], None]) -> None:
        """Store an object; what was under its key may stay.

        Raises:
            GivenUpError: It took too long; ``give_back`` is called when it ends.
            OSError: It failed.
        """
        submit = partial(self._adapter.submit_store_task, [key], [_memory(staging)])
        stored = self._run("store", submit, lambda _: give_back())
        if not (stored.is_successful() if hasattr(stored, "is_successful") else stored):
            raise OSError(errno.EIO, f"{self} could not store an object of {staging.nbytes} bytes")

    def load(self, key: ObjectKey, staging: Bytes, give_back: Callable[[], None]) -> bool:
        """Fill a buffer from an object of its length; whether that worked.

        Only what is there may be loaded: some adapters never end otherwise.

        Raises:
            GivenUpError: It took too long; ``give_back`` is called when it ends.
            OSError: The adapter is closed, or was silent a moment ago.
        """
        submit = partial(self._adapter.submit_load_task, [key], [_memory(staging)])
        bits = self._run("load", submit, lambda _: give_back())
        return bool(bits.test(0))

    def delete(self, keys: Sequence[ObjectKey]) -> None:
        """Remove objects, where the adapter can.

        Raises:
            OSError: It took too long.
        """
        self._calls.call(partial(self._adapter.delete, list(keys)))

    def listing(self) -> Iterator[tuple[ObjectKey, int]] | None:
        """Keys and bytes of all objects, in pages; None where the adapter has no way to list them.

        Raises:
            OSError: It took too long.
        """
        list_keys = getattr(self._adapter, "list_l2_keys", None)
        if list_keys is None:
            return None
        try:
            first = self._calls.call(partial(list_keys, page_size=_PAGE))
        except NotImplementedError:
            return None
        return self._pages(list_keys, first)

    def _pages(self, list_keys: Callable[..., Any], page: Any) -> Iterator[tuple[ObjectKey, int]]:  # noqa: ANN401
        while True:
            for entry in page.entries:
                yield entry.key.to_object_key(), entry.size_bytes
            if page.next_page_token is None:
                return
            page = self._calls.call(partial(list_keys, page_size=_PAGE, cursor=page.next_page_token))

    def close(self) -> None:
        """Give up what runs and close the adapter; one that hangs is left behind with a warning."""
        if not self._closing.acquire(blocking=False):
            return
        self._closed = True
        os.eventfd_write(self._wake_fd, 1)
        self._calls.close()
        if closes_in_time(self._end):
            os.close(self._wake_fd)
        else:
            logger.warning("%s hangs and was left behind", self)

    def _end(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._collector.join()
        self._adapter.close()

    def _run(self, kind: str, submit: Callable[[], int], late: Callable[[Any], object]) -> Any:  # noqa: ANN401
        """Submit a task and return its result; one that is given up calls ``late`` with it at its end."""
        self._calls.check()
        if self._closed:
            raise ConnectionError(errno.ESHUTDOWN, f"{self} is closed")
        task = (kind, submit())
        until_s = time.monotonic() + self._timeout_s
        with self._changed:
            self._running[task] = late
            self._take_ended()  # it may have ended before it was noted
            while task not in self._ended:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self._closed:
                    self._given_up.add(task)
                    self._calls.trip()
                    raise GivenUpError(errno.ETIMEDOUT, f"{self} did not end a {kind} in {self._timeout_s:g} s")
                self._changed.wait(left_s)
            del self._running[task]
            return self._ended.pop(task)

    def _collect(self) -> None:
        while not self._closed:
            for fd, _ in self._events.poll():
                self._take_event(fd)
            with self._changed:
                self._take_ended()
                given_up = [each for each in self._given_up if each in self._ended]
                self._given_up.difference_update(given_up)
                late = [(self._running.pop(each), self._ended.pop(each)) for each in given_up]
                self._changed.notify_all()
            for take, result in late:  # without the lock: it is somebody else's code
                try:
                    take(result)
                except Exception:
                    logger.exception("%s: a task that was given up has ended, and its result could not be taken", self)

    def _take_event(self, fd: int) -> None:
        try:
            if os.read(fd, 8):
                return
        except BlockingIOError:  # somebody else has taken it
            return
        except OSError as error:
            reason = error.strerror
        else:
            reason = "its other end is closed"
        self._events.unregister(fd)  # or it would be read again and again
        logger.warning(
            "%s: one of its three events cannot be read any more (%s): tasks of which it alone tells are given up "
            "after %g s; open the store anew", self, reason, self._timeout_s,
        )  # fmt: skip

    def _take_ended(self) -> None:
        """Note the results of tasks that have ended; with ``_changed`` held."""
        for number, result in self._asked(lambda: dict(self._adapter.pop_completed_store_tasks()), {}).items():
            self._ended["store", number] = result
        queries = {"lookup": self._adapter.query_lookup_and_lock_result, "load": self._adapter.query_load_result}
        for task in [each for each in self._running if each[0] in queries and each not in self._ended]:
            result = self._asked(partial(queries[task[0]], task[1]), None)
            if result is not None:
                self._ended[task] = result

    def _asked(self, question: Callable[[], Any], nothing: Any) -> Any:  # noqa: ANN401 - LMCache's results
        """What the adapter answers, or ``nothing`` where it raises: it is asked again after the next event."""
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - somebody else's module, which must not end the collector
            logger.log(
                logging.DEBUG if self._has_raised else logging.WARNING,
                "%s raised on the question what has ended; what it does not say is given up after %g s, and further "
                "failures are logged for debugging only: %s", self, self._timeout_s, cleared(repr(error)),
            )  # fmt: skip
            self._has_raised = True
            return nothing


def _parsed(settings: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an untyped package
    try:
        return parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(settings)])).adapters[0]
    except (KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def _created(parsed: Any) -> Any:  # noqa: ANN401 - an untyped package
    try:
        return create_l2_adapter(parsed)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - somebody else's module
        raise OSError(errno.EIO, f"{type(error).__name__}: {cleared(str(error))}") from None


def _memory(staging: Bytes) -> TensorMemoryObj:
    """A buffer as LMCache takes it."""
    metadata = MemoryObjMetadata(
        shape=torch.Size([staging.nbytes]), dtype=torch.uint8, address=0, phy_size=staging.nbytes, ref_count=1,
        fmt=MemoryFormat.BINARY,
    )  # fmt: skip
    return TensorMemoryObj(torch.from_numpy(staging), metadata, None)
