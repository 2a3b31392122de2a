"""Writes computed chunks to the store without holding up the forward."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cacheflow.plan.keys import Shard
from cacheflow.stores.base import PutHandle, PutOutcome, PutRequest, Store
from cacheflow.vllm.layout import BlockLayout
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import SaveOrder
from cacheflow.vllm.transfer import block_layers, object_key

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 1 << 30
"""Copied but not yet written; a chunk that would exceed it is not saved: a slow store must not eat the memory."""


@dataclass(frozen=True, slots=True)
class _Pending:
    handle: PutHandle
    num_bytes: int


class ChunkSaver:
    """Copies a chunk out of the KV blocks at once and leaves the writing to the store's threads. One thread."""

    def __init__(
        self, store: Store, layout: BlockLayout, *, layers_per_block: int, dtype: str, shard: Shard, counts: Counts
    ) -> None:
        """Save under this shard's keys."""
        self._store, self._layout, self._shard, self._counts = store, layout, shard, counts
        self._layers_per_block, self._dtype = layers_per_block, dtype
        self._num_blocks = -(-layout.num_layers // layers_per_block)
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0

    def save(self, orders: Sequence[SaveOrder]) -> None:
        """Copy these chunks; call after the forward that completed them was launched."""
        self._settle()
        if not orders:
            return
        self._layout.fence()
        for order in orders:
            self._save_chunk(order)

    def _save_chunk(self, order: SaveOrder) -> None:
        layers_of = [
            block_layers(block, self._layers_per_block, self._layout.num_layers) for block in range(self._num_blocks)
        ]
        keys = [object_key(order.namespace, order.chain_hash, layers=layers, shard=self._shard) for layers in layers_of]
        there = self._store.contains(keys)
        if all(there):
            self._counts.chunks_saved["exists"] += 1
            return
        num_bytes = self._layout.num_bytes(self._layout.num_layers, len(order.block_ids))
        if self._pending_bytes + num_bytes > MAX_PENDING_BYTES:
            self._counts.chunks_saved["skipped"] += 1
            return
        requests = []
        for key, (layer_lo, layer_hi), found in zip(keys, layers_of, there, strict=True):
            if found:  # of a chunk that lost some of its objects only those are written
                continue
            payload = np.empty(self._layout.num_bytes(layer_hi - layer_lo, len(order.block_ids)), dtype=np.uint8)
            self._layout.gather(layer_lo, layer_hi, order.block_ids, payload)
            shape = (layer_hi - layer_lo, len(order.block_ids), self._layout.block_bytes)
            requests.append(PutRequest(key, [payload], shape=shape, dtype=self._dtype))
        self._pending.append(_Pending(self._store.submit_put(requests, priority=-1), num_bytes))
        self._pending_bytes += num_bytes

    def _settle(self, *, timeout_s: float = 0.0) -> None:
        """Count the writes that ended; oldest first, as the store carries them out."""
        while self._pending:
            oldest = self._pending[0]
            outcomes = oldest.handle.wait(timeout_s) if timeout_s else oldest.handle.poll()
            if None in outcomes:
                return
            self._pending.popleft()
            self._pending_bytes -= oldest.num_bytes
            self._counts.chunks_saved[_chunk_outcome(outcomes)] += 1

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is written; whether it was in time."""
        self._settle(timeout_s=timeout_s)
        return not self._pending

    def close(self) -> None:
        """Give a moment to what is pending, then give it up: a chunk that is not written is a later miss."""
        if not self.wait(timeout_s=2.0):
            logger.warning("%d chunks were not written in time and are lost", len(self._pending))
        for pending in self._pending:
            pending.handle.cancel()
        self._pending.clear()


def _chunk_outcome(outcomes: Sequence[PutOutcome | None]) -> str:
    if all(outcome is PutOutcome.EXISTS for outcome in outcomes):
        return "exists"
    stored = (PutOutcome.STORED, PutOutcome.EXISTS)
    return "stored" if all(outcome in stored for outcome in outcomes) else "failed"
