"""Memory of a bounded store: ordinary memory, or page-locked slabs out of which records are cut."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cacheflow.types import Bytes, Passing

logger = logging.getLogger(__name__)

SLAB_BYTES = 1 << 30
"""Page-locked memory is got so many bytes at once: more takes seconds, less is slow by the byte."""
_ALIGNMENT = 512


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Memory of one record; of a slab, ``size`` bytes from ``start`` on are its own."""

    bytes: Bytes
    slab: int = 0
    start: int = 0
    size: int = 0


class RecordMemory(Protocol):
    """Where records' memory comes from; any thread."""

    @property
    def is_lendable(self) -> bool:
        """Whether a device may copy from it."""
        ...

    @property
    def copies(self) -> Sequence[Passing]:
        """Those from pieces that were given back, and may not have passed."""
        ...

    def take(self, num_bytes: int) -> Allocation:
        """Memory that nobody else has.

        Raises:
            MemoryError: There is none now.
        """
        ...

    def give(self, allocation: Allocation, copies: Sequence[Passing]) -> None:
        """Take an allocation back, to be used again once all these have passed; waits for nothing."""
        ...


class OrdinaryMemory:
    """The process's own, page by page; goes back when nobody looks at an allocation any more."""

    is_lendable = False
    copies: tuple[Passing, ...] = ()

    def take(self, num_bytes: int) -> Allocation:
        """See ``RecordMemory.take``."""
        return Allocation(np.empty(num_bytes, np.uint8))

    def give(self, allocation: Allocation, copies: Sequence[Passing]) -> None:
        """See ``RecordMemory.give``."""


class SlabMemory:
    """Slabs that are got as they are needed and kept; a record takes the smallest hole that it fits into.

    Their size is a power of two, because page-locked memory is rounded up to one anyway. Together they are less than a
    slab larger than the bound and, where there are several, by the hole at the end of each that no record fits into.
    """

    is_lendable = True

    def __init__(self, allocate: Callable[[int], Bytes], *, capacity_bytes: int, slab_bytes: int = SLAB_BYTES) -> None:
        """Get the first slab.

        Args:
            allocate: Memory of so many bytes; raises ``MemoryError`` where there is none.
            capacity_bytes: The bound.
            slab_bytes: Largest slab, but for a record that is larger still.

        Raises:
            MemoryError: Not even one slab could be had.
        """
        self._allocate, self._capacity_bytes = allocate, capacity_bytes
        self._slab_bytes = min(slab_bytes, max(_ALIGNMENT, 1 << (capacity_bytes - 1).bit_length()))
        self._lock = threading.Lock()
        self._slabs: list[Bytes] = []
        self._by_size: list[tuple[int, int, int]] = []  # sorted: size, slab, start of each hole
        self._size_at: dict[tuple[int, int], int] = {}  # by slab and start
        self._start_to: dict[tuple[int, int], int] = {}  # by slab and end
        self._returned: deque[tuple[Allocation, Sequence[Passing]]] = deque()
        self._largest_size = 0
        self._can_grow = True
        self._grow(self._slab_bytes)

    def take(self, num_bytes: int) -> Allocation:
        """See ``RecordMemory.take``; gets a slab where that is allowed and needed."""
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            self._largest_size = max(self._largest_size, size)
            index = bisect_left(self._by_size, (size, 0, 0))
            if index == len(self._by_size):
                self._grow(max(size, self._slab_bytes))
                index = bisect_left(self._by_size, (size, 0, 0))
            hole_size, slab, start = self._by_size[index]
            self._remove_hole(slab, start, hole_size)
            if hole_size > size:
                self._add_hole(slab, start + size, hole_size - size)
            return Allocation(self._slabs[slab][start : start + num_bytes], slab, start, size)

    @property
    def copies(self) -> tuple[Passing, ...]:
        """See ``RecordMemory.copies``."""
        with self._lock:
            return tuple(copy for _, copies in tuple(self._returned) for copy in copies)

    def give(self, allocation: Allocation, copies: Sequence[Passing]) -> None:
        """See ``RecordMemory.give``; what was given back is looked at when memory is taken."""
        self._returned.append((allocation, tuple(copies)))  # without the lock: a slab may be under way

    def _collect(self) -> None:
        for _ in range(len(self._returned)):
            allocation, copies = self._returned.popleft()
            if all(copy.done() for copy in copies):
                self._free(allocation.slab, allocation.start, allocation.size)
            else:
                self._returned.append((allocation, copies))

    def _free(self, slab: int, start: int, size: int) -> None:
        """Make a hole, one with the holes on both sides."""
        if (after := self._size_at.get((slab, start + size))) is not None:
            self._remove_hole(slab, start + size, after)
            size += after
        if (before := self._start_to.get((slab, start))) is not None:
            self._remove_hole(slab, before, start - before)
            start, size = before, size + start - before
        self._add_hole(slab, start, size)

    def _add_hole(self, slab: int, start: int, size: int) -> None:
        insort(self._by_size, (size, slab, start))
        self._size_at[slab, start] = size
        self._start_to[slab, start + size] = start

    def _remove_hole(self, slab: int, start: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, slab, start))]
        del self._size_at[slab, start]
        del self._start_to[slab, start + size]

    def _grow(self, num_bytes: int) -> None:
        if not self._can_grow or self._usable_bytes >= self._capacity_bytes:
            raise MemoryError
        try:
            slab = self._allocate(num_bytes)
        except MemoryError:
            self._can_grow = False
            if self._slabs:
                logger.warning(
                    "there is no more page-locked memory after %d bytes: the store stays at that, of a capacity of %d",
                    sum(each.nbytes for each in self._slabs), self._capacity_bytes,
                )  # fmt: skip
            raise
        self._slabs.append(slab)
        self._add_hole(len(self._slabs) - 1, 0, slab.nbytes)

    @property
    def _usable_bytes(self) -> int:
        """What the slabs hold of records in any case: each of several may end in a hole that no record fits into."""
        if self._capacity_bytes <= self._slab_bytes:
            return sum(slab.nbytes for slab in self._slabs)
        return sum(max(slab.nbytes // 2, slab.nbytes - self._largest_size) for slab in self._slabs)
