"""Which prefix blocks are where, least recently used first out.

A block's id names the whole prefix up to it, so a block is of use only with all blocks before it. Blocks are therefore
touched from the last to the first: an earlier block is never older than a later one, eviction takes prefixes from their
ends, and what is held of a prompt is always a run from its first block (found by bisection).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from cacheflow.errors import ConfigError

Changed = Callable[[int, bool], None]
"""Told of a block's id that is now held (True) or no longer held."""


def held_run(held: Container[int], block_ids: Sequence[int], limit: int) -> int:
    """Number of leading blocks that are held, of the first ``limit``; by bisection, see above."""
    low, high = 0, min(limit, len(block_ids))
    while low < high:
        middle = (low + high + 1) // 2
        if block_ids[middle - 1] in held:
            low = middle
        else:
            high = middle - 1
    return low


class BlockLru:
    """A tier of a store: block ids up to a number, in the order of their last use.

    Attributes:
        capacity: Blocks it can hold; 0 holds nothing.
        num_evicted: Blocks it has dropped.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty.

        Raises:
            ConfigError: The capacity is negative.
        """
        if capacity < 0:
            raise ConfigError(f"a tier of {capacity} blocks cannot be")
        self.capacity = capacity
        self.num_evicted = 0
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Number of blocks held."""
        return len(self._blocks)

    def run(self, block_ids: Sequence[int], limit: int) -> int:
        """Number of leading blocks held, of the first ``limit``."""
        return held_run(self._blocks, block_ids, limit)

    def put(self, block_ids: Sequence[int]) -> None:
        """Hold these leading blocks of a prompt, as the most recently used; the last ones go first."""
        if not self.capacity:
            return
        blocks = self._blocks
        for block_id in reversed(block_ids[: self.capacity]):
            blocks[block_id] = None
            blocks.move_to_end(block_id)
        while len(blocks) > self.capacity:
            blocks.popitem(last=False)
            self.num_evicted += 1


@dataclass(slots=True)
class Lease:
    """Blocks of GPU memory that one request holds.

    Attributes:
        shared: Ids of prefix blocks, which others may hold too.
        num_private: Blocks that are nobody else's: not computed yet, partial, or of the answer.
    """

    shared: tuple[int, ...]
    num_private: int


class KvCache:
    """GPU memory in blocks: those of running requests, and prefix blocks that nobody holds until room is needed.

    Attributes:
        capacity: Blocks it has.
        num_evicted: Prefix blocks that were dropped for room.
    """

    def __init__(self, capacity: int, *, changed: Changed | None = None) -> None:
        """Start empty.

        Args:
            capacity: Blocks.
            changed: Told of every prefix block that comes or goes.

        Raises:
            ConfigError: There is no block.
        """
        if capacity < 1:
            raise ConfigError(f"a KV cache of {capacity} blocks holds no request")
        self.capacity = capacity
        self.num_evicted = 0
        self._changed = changed or (lambda block_id, held: None)
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_private = 0

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self.capacity - self._num_private - len(self._holders)

    @property
    def num_idle(self) -> int:
        """Prefix blocks that nobody holds."""
        return len(self._idle)

    def __contains__(self, block_id: int) -> bool:
        """Whether the prefix block is there."""
        return block_id in self._holders

    def run(self, block_ids: Sequence[int], limit: int) -> int:
        """Number of leading blocks that are there, of the first ``limit``."""
        return held_run(self._holders, block_ids, limit)

    def lease(self, block_ids: Sequence[int], num_blocks: int, *, limit: int) -> Lease | None:
        """Take ``num_blocks`` for a request, of them what is there of its first ``limit`` blocks.

        Returns:
            The lease; None, with nothing changed, when others hold too much.
        """
        num_shared = self.run(block_ids, limit)
        shared = tuple(block_ids[:num_shared])
        num_private = num_blocks - num_shared
        idle_shared = sum(1 for block_id in shared if not self._holders[block_id])
        if num_private > self.num_free + len(self._idle) - idle_shared:
            return None
        self._hold(shared)
        self._make_room(num_private)
        self._num_private += num_private
        return Lease(shared, num_private)

    def publish(self, lease: Lease, block_ids: Sequence[int]) -> None:
        """Turn private blocks into prefix blocks, now that they are computed.

        Args:
            lease: Of the request; changed.
            block_ids: All leading blocks of its prompt that are full; those it shares already come first.
        """
        new = block_ids[len(lease.shared) :]
        for block_id in new:
            if block_id not in self._holders:
                self._holders[block_id] = 0
                self._changed(block_id, True)
        # Where another request has computed the same block meanwhile, ours is freed.
        self._num_private -= len(new)
        lease.num_private -= len(new)
        self._hold(new)
        lease.shared = (*lease.shared, *new)

    def release(self, lease: Lease) -> None:
        """Give everything back; prefix blocks stay until room is needed."""
        self._num_private -= lease.num_private
        for block_id in reversed(lease.shared):
            self._holders[block_id] -= 1
            if not self._holders[block_id]:
                self._idle[block_id] = None

    def _hold(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            self._holders[block_id] += 1
            self._idle.pop(block_id, None)

    def _make_room(self, num_blocks: int) -> None:
        while self.num_free < num_blocks:
            block_id, _ = self._idle.popitem(last=False)
            del self._holders[block_id]
            self.num_evicted += 1
            self._changed(block_id, False)
