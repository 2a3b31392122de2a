"""Writes computed chunks, and running states at the end of some, to the store without holding up the forward."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread

import numpy as np

from cacheflow.stores.base import PutHandle, PutOutcome, PutRequest, Store
from cacheflow.stores.keys import RankKeys
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import SaveWork
from cacheflow.vllm.worker.layout import BlockLayout, layers_of_blocks
from cacheflow.vllm.worker.state_blocks import StateBlocks

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 1 << 30
"""Copied but not yet written; a chunk that would exceed it is not saved: a slow store must not eat the memory."""
MAX_KEPT_BYTES = MAX_PENDING_BYTES // 2
"""Of them running states of requests that go on: the rest is left for chunks."""
MorePuts = Callable[[SaveWork], Iterable[PutRequest]]
"""What is to be written beside a chunk's KV."""
CLOSE_S = 2.0
"""What is pending at the end gets this long."""


@dataclass(slots=True, eq=False)
class _Copied:
    """A chunk or running states on their way to the store; ``submitted`` is set by the background thread.

    Attributes:
        name: Namespace and chain hash.
        requests: Objects to write; given away.
        num_bytes: Of them all.
        is_chunk: Counts as a saved chunk.
    """

    name: tuple[str, str]
    requests: list[PutRequest]
    num_bytes: int
    is_chunk: bool = True
    submitted: Future[PutHandle | PutOutcome] = field(default_factory=Future)

    def outcome(self, *, timeout_s: float) -> str | None:
        """How it ended, as it is counted; None while it is under way."""
        if not timeout_s and not self.submitted.done():
            return None
        end_s = time.monotonic() + timeout_s
        try:
            submitted = self.submitted.result(timeout_s)
        except TimeoutError:
            return None
        if isinstance(submitted, PutOutcome):
            return _chunk_outcome((submitted,))
        outcomes = submitted.wait(max(0.0, end_s - time.monotonic())) if timeout_s else submitted.poll()
        return None if None in outcomes else _chunk_outcome(outcomes)

    def cancel(self) -> None:
        if self.submitted.done() and not isinstance(handle := self.submitted.result(), PutOutcome):
            handle.cancel()


class ChunkSaver:
    """Copies a chunk out of the KV blocks at once; a thread of its own asks whether the store has it, the store writes.

    The caller never waits for the store: where that is slow or hangs, chunks are skipped once ``MAX_PENDING_BYTES`` are
    copied and not yet written. Running states are copied as the chunk at whose end they stand, and written after it or,
    of a request that goes on, when it ends: then those of later chunks have replaced them. All methods on one thread,
    which owns ``counts``.
    """

    def __init__(  # noqa: PLR0913 -- one worker's, keyword-only but for the first two
        self,
        store: Store,
        layout: BlockLayout,
        *,
        layers_per_block: int,
        keys: RankKeys,
        counts: Counts,
        states: StateBlocks | None = None,
        more: MorePuts | None = None,
    ) -> None:
        """Save in objects of ``layers_per_block`` layers under this rank's keys.

        ``states``: the running states of a model with recurrent layers; ``more``: what else of a chunk.
        """
        self._store, self._layout, self._keys, self._counts = store, layout, keys, counts
        self._dtype, self._more = str(layout.dtype).removeprefix("torch."), more
        self._layers_of = layers_of_blocks(layers_per_block, layout.num_layers)
        self._states = states
        self._kept: dict[str, _Copied] = {}
        self._pending: deque[_Copied] = deque()
        self._pending_bytes = 0
        self._under_way: set[tuple[str, str]] = set()
        self._copied: SimpleQueue[_Copied | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False

    def save(self, saves: Sequence[SaveWork]) -> None:
        """Copy these chunks; call after the forward that completed them was launched."""
        self._settle()
        chunks = [save for save in saves if self._has_room(save)]
        # Without its chunk a state is of no use: where that found no room, there is none for the state either.
        with_states = [
            save for save in saves if save.state_blocks and (save.namespace, save.chain_hash) in self._under_way
        ]
        if not chunks and not with_states:
            return
        for save in chunks:
            self._hand_over(self._copy(save))
        for save in with_states:
            copied = self._copy_states(save)
            if copied is not None and save.keep:
                self._keep(save.request_id, copied)
            elif copied is not None:
                self._hand_over(copied)

    def write_kept(self, request_ids: Iterable[str]) -> None:
        """Write the states that were kept of these requests, which end here or are preempted."""
        for request_id in request_ids:
            copied = self._kept.pop(request_id, None)
            if copied is not None:
                self._hand_over(copied)

    def _keep(self, request_id: str, copied: _Copied) -> None:
        before = self._kept.pop(request_id, None)
        if before is not None:
            self._pending_bytes -= before.num_bytes
        self._kept[request_id] = copied

    def _hand_over(self, copied: _Copied) -> None:
        """Give what was copied to the background thread."""
        if self._thread is None:
            # A daemon: a store that hangs must not keep the process from ending.
            self._thread = Thread(target=self._submit_copied, name="cacheflow-save", daemon=True)
            self._thread.start()
        self._pending.append(copied)
        self._copied.put(copied)

    def _has_room(self, save: SaveWork) -> bool:
        """Whether a chunk is to be copied; if so, its bytes count as pending."""
        name = (save.namespace, save.chain_hash)
        if name in self._under_way:
            self._counts.chunks_saved["exists"] += 1
            return False
        num_bytes = self._layout.num_bytes(0, self._layout.num_layers, len(save.block_ids))
        if self._pending_bytes + num_bytes > MAX_PENDING_BYTES:
            self._counts.chunks_saved["skipped"] += 1
            return False
        self._under_way.add(name)
        self._pending_bytes += num_bytes
        return True

    def _copy_states(self, save: SaveWork) -> _Copied | None:
        """Running states at the end of a chunk; None where too much is waiting to be written."""
        states = self._states
        assert states is not None, "running states are saved of models that have any"
        num_bytes = states.num_bytes(0, states.num_rows)
        kept = sum(each.num_bytes for each in self._kept.values()) if save.keep else 0
        if self._pending_bytes + num_bytes > MAX_PENDING_BYTES or kept + num_bytes > MAX_KEPT_BYTES:
            return None
        self._pending_bytes += num_bytes
        requests = []
        for rows in self._layers_of:
            payload = np.empty(states.num_bytes(*rows), dtype=np.uint8)
            if payload.size:
                states.gather(*rows, save.state_blocks, payload)
                key = self._keys.states(save.namespace, save.chain_hash, rows)
                requests.append(PutRequest(key, [payload], shape=payload.shape, dtype="uint8"))
        return _Copied((save.namespace, save.chain_hash), requests, num_bytes, is_chunk=False)

    def _copy(self, save: SaveWork) -> _Copied:
        requests = []
        for layer_lo, layer_hi in self._layers_of:
            key = self._keys.kv(save.namespace, save.chain_hash, (layer_lo, layer_hi))
            payload = np.empty(self._layout.num_bytes(layer_lo, layer_hi, len(save.block_ids)), dtype=np.uint8)
            self._layout.gather(layer_lo, layer_hi, save.block_ids, payload)
            shape = self._shape(layer_lo, layer_hi, len(save.block_ids))
            requests.append(PutRequest(key, [payload], shape=shape, dtype=self._dtype))
        num_bytes = self._layout.num_bytes(0, self._layout.num_layers, len(save.block_ids))
        if self._more is not None:
            # Before the KV, so that a chunk whose top layer is there is there with its boundary.
            requests = [*self._more(save), *requests]
        return _Copied((save.namespace, save.chain_hash), requests, num_bytes)

    def _shape(self, layer_lo: int, layer_hi: int, num_blocks: int) -> tuple[int, ...]:
        """What a record says of an object, for people; of layers that differ how many bytes they are."""
        first, *others = dict.fromkeys(self._layout.block_bytes_L[layer_lo:layer_hi])
        if others:
            return (self._layout.num_bytes(layer_lo, layer_hi, num_blocks),)
        return (layer_hi - layer_lo, num_blocks, first)

    def _submit_copied(self) -> None:
        """The background thread: asking may take as long as a file system hangs."""
        while (copied := self._copied.get()) is not None:
            requests, copied.requests = copied.requests, []
            copied.submitted.set_result(self._submit(requests))

    def _submit(self, requests: Sequence[PutRequest]) -> PutHandle | PutOutcome:
        try:
            there = [] if self._closed else self._store.contains([request.key for request in requests])
            if self._closed:
                return PutOutcome.CANCELLED
            # Of a chunk that lost some of its objects only those are written.
            missing = [request for request, found in zip(requests, there, strict=True) if not found]
            return self._store.submit_put(missing, priority=-1) if missing else PutOutcome.EXISTS
        except Exception:  # a bug in a store must cost a save, not all that follow
            logger.exception("a chunk could not be saved")
            return PutOutcome.ERROR

    def _settle(self, *, timeout_s: float = 0.0) -> None:
        """Count the writes that ended; oldest first, as the store carries them out."""
        end_s = time.monotonic() + timeout_s
        while self._pending:
            left_s = max(0.0, end_s - time.monotonic()) if timeout_s else 0.0
            outcome = self._pending[0].outcome(timeout_s=left_s)
            if outcome is None:
                return
            copied = self._pending.popleft()
            self._pending_bytes -= copied.num_bytes
            if copied.is_chunk:
                self._under_way.discard(copied.name)
                self._counts.chunks_saved[outcome] += 1

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is written; whether it was in time."""
        self._settle(timeout_s=timeout_s)
        return not self._pending

    def close(self) -> None:
        """Give a moment to what is pending, then give it up: a chunk that is not written is a later miss."""
        self.write_kept(list(self._kept))
        if not self.wait(timeout_s=CLOSE_S):
            logger.warning("%d chunks were not written in time and are lost", len(self._pending))
        self._closed = True
        self._copied.put(None)
        for copied in self._pending:
            copied.cancel()
        self._pending.clear()


def _chunk_outcome(outcomes: Sequence[PutOutcome | None]) -> str:
    if all(outcome is PutOutcome.EXISTS for outcome in outcomes):
        return "exists"
    stored = (PutOutcome.STORED, PutOutcome.EXISTS)
    return "stored" if all(outcome in stored for outcome in outcomes) else "failed"
