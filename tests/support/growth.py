"""What this process holds, looked at again and again: memory, threads, open files, and whatever our objects keep.

Every queue is an attribute of some object of ours, so all of them are found by going from object to object, those of
later versions too. Not by ``gc.get_objects``: it finds tuples that another thread has only begun to make, which then
fails there.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import MethodType, TracebackType
from typing import Any, Self
from weakref import WeakSet

import numpy as np

SIZED = (dict, list, set, deque, WeakSet)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Have glibc give the system what it keeps of freed memory, in pieces between what is in use; elsewhere nothing.

    Measured under 32 chats: what is in use stays the same, while those pieces grow by up to 1 MiB a minute for half an
    hour, the more the busier the machine is.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def held(roots: Iterable[object]) -> Counter[str]:
    """How many objects of each of our classes can be reached, and how much their containers hold together.

    Keys are ``Read`` and ``CopyQueue._waiting``.
    """
    found: Counter[str] = Counter()
    seen: dict[int, object] = {}
    left = list(roots)
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if not type(each).__module__.startswith("cacheflow."):
            left += _inside(each)
            continue
        found[type(each).__name__] += 1
        for name, value in _attributes(each):
            left.append(value)
            if isinstance(value, (*SIZED, SimpleQueue)):
                size = value.qsize() if isinstance(value, SimpleQueue) else len(value)
                found[f"{type(each).__name__}.{name}"] += size
    return found


def _inside(each: object) -> list[object]:
    """What something that is not ours leads to."""
    if isinstance(each, dict):
        return [*each.keys(), *each.values()]
    if isinstance(each, WeakSet):
        return [reference() for reference in list(each.data)]  # going through it itself fails where one is added
    if isinstance(each, (*SIZED, tuple)):
        return list(each)
    if isinstance(each, partial):
        return [each.func, *each.args, *each.keywords.values()]
    return [each.__self__] if isinstance(each, MethodType) else []


def _attributes(owner: object) -> Iterator[tuple[str, Any]]:
    yield from list(getattr(owner, "__dict__", {}).items())
    for kind in type(owner).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield name, getattr(owner, name, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    num_threads: int
    num_files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Resident memory at a moment at which nothing ran: all of it is kept for what is still to come."""

    at_s: float
    resident_bytes: int


class Watch:
    """Samples on a thread of its own until it is left; a context manager.

    Attributes:
        samples: What the process held.
        rests: Its resident memory, whenever the test let it rest.
        series: What ``held`` found in each sample, by name; numbers alone, so that next to nothing is kept of it.
    """

    def __init__(self, *roots: object, period_s: float) -> None:
        self._roots = roots
        self.samples: list[Sample] = []
        self.rests: list[Rest] = []
        self.series: dict[str, array[int]] = {}
        self._period_s = period_s
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._left.wait(self._period_s):
            found = held(self._roots)
            for name in found.keys() - self.series.keys():
                self.series[name] = array("q", [0] * len(self.samples))
            for name, counts in self.series.items():
                counts.append(found[name])
            self.samples.append(Sample(num_threads=threading.active_count(), num_files=num_open_files()))

    def rest(self) -> None:
        """Note the resident memory; call while nothing runs and nothing is cached."""
        give_back()
        self.rests.append(Rest(at_s=time.monotonic(), resident_bytes=resident_bytes()))

    def third(self, number: int) -> slice:
        """Which samples are the first, second or last third of them: 0, 1, 2."""
        return slice(len(self.samples) * number // 3, len(self.samples) * (number + 1) // 3)

    @property
    def last_rests(self) -> list[Rest]:
        """The last third of them."""
        return self.rests[len(self.rests) * 2 // 3 :]

    @property
    def end_s(self) -> float:
        """From the first to the last of ``last_rests``."""
        return self.last_rests[-1].at_s - self.last_rests[0].at_s

    @property
    def slope_bytes_per_s(self) -> float:
        """Of the resident memory over ``last_rests``, by least squares."""
        times_s = np.array([each.at_s - self.last_rests[0].at_s for each in self.last_rests])
        resident = np.array([each.resident_bytes for each in self.last_rests], np.float64)
        return float(np.polyfit(times_s, resident, 1)[0])

    def most(self) -> Counter[str]:
        """The most of everything that any sample found."""
        return Counter({name: max(counts) for name, counts in self.series.items()})

    def growing(self, *, factor: float, slack: int) -> dict[str, tuple[float, float]]:
        """What there was more of in the last third than in the one before: both means, by name.

        Args:
            factor: How many times as much is no growth yet.
            slack: Objects beyond that which are none.
        """
        found = {}
        for name, counts in self.series.items():
            before, end = (float(np.mean(counts[self.third(number)])) for number in (1, 2))
            if end > factor * before + slack:
                found[name] = before, end
        return found
