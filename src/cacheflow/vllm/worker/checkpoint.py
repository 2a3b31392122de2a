"""The running states that a restoration reads: they wait until the prefix is there, then replace those of the head.

While chunks are recomputed their states stand in the very blocks that must hold the states of the end. So what is read
of the end is written last.
"""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.vllm.worker.layout import Payload
from cacheflow.vllm.worker.state_blocks import StateBlocks


class Checkpoint:
    """States at the end of one prefix, of the rows whose last chunk is read."""

    def __init__(self, states: StateBlocks, blocks: Sequence[int]) -> None:
        """Write into ``blocks``, one of each group."""
        self._states, self._blocks = states, tuple(blocks)
        self._held: dict[tuple[int, int], Payload] = {}

    def num_bytes(self, rows: tuple[int, int]) -> int:
        """Bytes of the states of rows ``[lo, hi)``."""
        return self._states.num_bytes(*rows)

    def hold(self, rows: tuple[int, int], payload: Payload) -> None:
        """Keep a copy of the states of rows ``[lo, hi)``; on the I/O thread."""
        self._held[rows] = payload.copy()

    def write(self) -> None:
        """Write what is held; on the worker's main thread, once nothing of the prefix is recomputed any more."""
        for rows, payload in sorted(self._held.items()):
            self._states.scatter(*rows, self._blocks, payload)
        self._held.clear()
