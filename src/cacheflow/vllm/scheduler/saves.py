"""Remembers which chunks this engine ordered to be saved, so that requests that share a prefix save it once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from cacheflow.vllm.step import SaveWork

MAX_REMEMBERED = 16_384
"""Chunks; what is forgotten is at worst copied once more, for the store to find that it has it."""


class OrderedSaves:
    """Saves by the order in which they and the questions to the store were made. One thread.

    What the store told a request of a chunk is out of date once the chunk was ordered behind the question: the burst of
    requests behind one system prompt is answered "missing" before the first of them has computed it. An answer to a
    question behind the order is newer than the order: the write failed, was skipped, or the store has evicted it.

    Attributes:
        now: Counts up with every order; what a question asked now is to be compared by.
    """

    def __init__(self) -> None:
        """Nothing was ordered yet."""
        self.now = 0
        self._ordered_at: OrderedDict[tuple[str, str], int] = OrderedDict()

    def new(self, orders: Iterable[SaveWork], *, asked_at: int) -> list[SaveWork]:
        """Those that were not ordered since the request asked the store; they count as ordered from now on.

        Args:
            orders: Of one request.
            asked_at: ``now`` when the request asked the store.
        """
        new = []
        for order in orders:
            name = (order.namespace, order.chain_hash)
            if self._ordered_at.get(name, 0) > asked_at:
                continue
            self.now += 1
            self._ordered_at[name] = self.now
            self._ordered_at.move_to_end(name)
            new.append(order)
        while len(self._ordered_at) > MAX_REMEMBERED:
            self._ordered_at.popitem(last=False)
        return new
