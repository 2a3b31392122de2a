"""Writes computed chunks, and running states at the end of some, to the store without holding up the forward."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import layers_of_blocks
from cacheflow.stores.base import Priority, PutHandle, PutOutcome, PutRequest, Store
from cacheflow.stores.keys import ObjectKey, RankKeys
from cacheflow.tensors.snapshot_room import Snapshot, SnapshotRoom
from cacheflow.threads import start_thread
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.step import SaveWork
from cacheflow.vllm.worker.layout import BlockLayout, Payload
from cacheflow.vllm.worker.state_blocks import StateBlocks

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 1 << 30
"""Copied but not yet written; a chunk that would exceed it is not saved: a slow store must not eat the memory."""
MAX_KEPT_BYTES = MAX_PENDING_BYTES // 2
"""Of them running states of requests that go on: the rest is left for chunks."""
MAX_SNAPSHOT_BYTES = 1 << 30
"""Device memory for snapshots, where the engine's longest pass completes so many chunks at once."""
MorePuts = Callable[[], Sequence[PutRequest]]
"""Makes what is to be written beside a chunk's KV; on the background thread, since it may wait for the device."""
CLOSE_S = 2.0
"""What is pending at the end gets this long."""


@dataclass(frozen=True, slots=True)
class _Object:
    """One object of a save: its name, and what a record says of it; its bytes come after those of the one before."""

    key: ObjectKey
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    token_axes: tuple[int, ...] = ()

    def request(self, payload: Payload) -> PutRequest:
        return PutRequest(self.key, [payload], shape=self.shape, dtype=self.dtype, token_axes=self.token_axes)


@dataclass(slots=True, eq=False)
class _Copied:
    """A chunk or running states on their way to the store; ``submitted`` is set by the background thread.

    Attributes:
        name: Namespace and chain hash.
        requests: Objects to write; given away.
        num_bytes: Of them all.
        is_chunk: Counts as a saved chunk.
        snapshot: Where the bytes are on a device; None once they are in ``requests``, or were from the start.
        objects: What the snapshot's bytes are, in their sequence.
        more: What is written before ``requests``.
    """

    name: tuple[str, str]
    requests: list[PutRequest]
    num_bytes: int
    is_chunk: bool = True
    snapshot: Snapshot | None = None
    objects: Sequence[_Object] = ()
    more: MorePuts | None = None
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

    def arrive(self) -> None:
        """Take the bytes from the device; on the background thread, which waits for them."""
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is not None:
            payload, at = snapshot.take(), 0
            for each in self.objects:
                self.requests.append(each.request(payload[at : at + each.num_bytes]))
                at += each.num_bytes
        more, self.more = self.more, None
        if more is not None:
            # Before the KV, so that a chunk whose top layer is there is there with its boundary.
            self.requests[:0] = more()


class ChunkSaver:
    """Copies a chunk out of the KV blocks at once; a thread of its own asks whether the store has it, the store writes.

    On CUDA what is made at once is a snapshot on the device, which that thread brings to the host.

    The caller never waits for store or device: where they are slow or hang, chunks are skipped once the room for
    snapshots is full, or ``MAX_PENDING_BYTES`` are copied and not yet written. Running states are copied as the chunk
    at whose end they stand, and written after it or, of a request that goes on, when it ends: then those of later
    chunks have replaced them. All methods on one thread, which owns ``counts``.
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
        more: Callable[[SaveWork], MorePuts] | None = None,
        room: SnapshotRoom | None = None,
    ) -> None:
        """Save in objects of ``layers_per_block`` layers under this rank's keys.

        ``states``: the running states of a model with recurrent layers; ``more``: what else of a chunk; ``room``: for
        snapshots on the device, None on the CPU.
        """
        self._store, self._layout, self._keys, self._counts = store, layout, keys, counts
        self._more = more
        self._layers_of = layers_of_blocks(layers_per_block, layout.num_layers)
        self._states, self._room = states, room
        self._kept: dict[str, _Copied] = {}
        self._pending: deque[_Copied] = deque()
        self._pending_bytes = 0
        self._under_way: set[tuple[str, str]] = set()
        self._to_do: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False

    def save(self, saves: Sequence[SaveWork]) -> None:
        """Copy these chunks; call after the forward that completed them was launched."""
        self._settle()
        for save in saves:
            if self._has_room(save):
                self._save_chunk(save)
        for save in saves:
            # Without its chunk a state is of no use: where that found no room, there is none for the state either.
            if not save.state_blocks or (save.namespace, save.chain_hash) not in self._under_way:
                continue
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
        if copied.snapshot is not None:
            self._do(copied.arrive)

    def _hand_over(self, copied: _Copied) -> None:
        """Have the background thread give what was copied to the store."""
        self._pending.append(copied)
        self._do(partial(self._submit_copied, copied))

    def _do(self, work: Callable[[], None]) -> None:
        """Give work to the background thread, which does it in sequence."""
        if self._thread is None:
            self._thread = start_thread(self._work, name="cacheflow-save")
        self._to_do.put(work)

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

    def _save_chunk(self, save: SaveWork) -> None:
        num_bytes = self._layout.num_bytes(0, self._layout.num_layers, len(save.block_ids))
        copied = self._copy(save, num_bytes)
        if copied is None:
            self._under_way.discard((save.namespace, save.chain_hash))
            self._pending_bytes -= num_bytes
            self._counts.chunks_saved["skipped"] += 1
            return
        if self._more is not None:
            copied.more = self._more(save)
        self._hand_over(copied)

    def _copy_states(self, save: SaveWork) -> _Copied | None:
        """Running states at the end of a chunk; None where too much is waiting to be written."""
        states = self._states
        assert states is not None, "running states are saved of models that have any"
        num_bytes = states.num_bytes(0, states.num_rows)
        kept = sum(each.num_bytes for each in self._kept.values()) if save.keep else 0
        if self._pending_bytes + num_bytes > MAX_PENDING_BYTES or kept + num_bytes > MAX_KEPT_BYTES:
            return None
        rows_of = [rows for rows in self._layers_of if states.num_bytes(*rows)]
        objects = []
        for rows in rows_of:
            key, size = self._keys.states(save.namespace, save.chain_hash, rows), states.num_bytes(*rows)
            objects.append(_Object(key, size, (size,), "uint8"))
        copied = _Copied((save.namespace, save.chain_hash), [], num_bytes, is_chunk=False, objects=objects)
        if self._room is None:
            for each, rows in zip(objects, rows_of, strict=True):
                payload = np.empty(each.num_bytes, dtype=np.uint8)
                states.gather(*rows, save.state_blocks, payload)
                copied.requests.append(each.request(payload))
        else:
            snapshot = partial(states.snapshot, 0, states.num_rows, save.state_blocks)
            copied.snapshot = self._room.take_snapshot(num_bytes, snapshot)
            if copied.snapshot is None:
                return None
        self._pending_bytes += num_bytes
        return copied

    def _copy(self, save: SaveWork, num_bytes: int) -> _Copied | None:
        """A chunk's keys and values, of so many bytes; None where there is no room for a snapshot."""
        layout, num_blocks = self._layout, len(save.block_ids)
        objects = []
        for layers in self._layers_of:
            key, size = self._keys.kv(save.namespace, save.chain_hash, layers), layout.num_bytes(*layers, num_blocks)
            objects.append(_Object(key, size, *layout.form(*layers, num_blocks)))
        copied = _Copied((save.namespace, save.chain_hash), [], num_bytes, objects=objects)
        if self._room is None:
            for each, layers in zip(objects, self._layers_of, strict=True):
                payload = np.empty(each.num_bytes, dtype=np.uint8)
                layout.gather(*layers, save.block_ids, payload)
                copied.requests.append(each.request(payload))
            return copied
        snapshot = partial(layout.snapshot, 0, layout.num_layers, save.block_ids)
        copied.snapshot = self._room.take_snapshot(num_bytes, snapshot)
        return None if copied.snapshot is None else copied

    def _work(self) -> None:
        """The background thread: asking may take as long as a file system hangs."""
        while (work := self._to_do.get()) is not None:
            try:
                work()
            except Exception:  # what did not arrive costs a save, not all that follow
                logger.exception("what was to be saved did not arrive")

    def _submit_copied(self, copied: _Copied) -> None:
        copied.submitted.set_result(self._submit(copied))

    def _submit(self, copied: _Copied) -> PutHandle | PutOutcome:
        try:
            if not self._closed:
                copied.arrive()
            requests, copied.requests = copied.requests, []
            there = [] if self._closed else self._store.contains([request.key for request in requests])
            if self._closed:
                return PutOutcome.CANCELLED
            # Of a chunk that lost some of its objects only those are written.
            missing = [request for request, found in zip(requests, there, strict=True) if not found]
            return self._store.submit_put(missing, priority=Priority.SAVE) if missing else PutOutcome.EXISTS
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

    def writes_under_way(self) -> Callable[[float], None]:
        """A call for any thread that waits, for so many seconds at most, until what is pending now has been written."""
        pending = tuple(self._pending)

        def wait(timeout_s: float) -> None:
            end_s = time.monotonic() + timeout_s
            for copied in pending:
                copied.outcome(timeout_s=max(0.0, end_s - time.monotonic()))

        return wait

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is written; whether it was in time."""
        self._settle(timeout_s=timeout_s)
        return not self._pending

    def close(self) -> None:
        """Give a moment to what is pending, then leave it to the store: a chunk that is not written is a later miss.

        Writes are not cancelled, which would wait for one that hangs; the bytes are nobody else's.
        """
        self.write_kept(list(self._kept))
        if not self.wait(timeout_s=CLOSE_S):
            logger.warning("%d chunks were not written in time and are lost", len(self._pending))
        self._closed = True
        self._to_do.put(None)
        self._pending.clear()


def _chunk_outcome(outcomes: Sequence[PutOutcome | None]) -> str:
    if all(outcome is PutOutcome.EXISTS for outcome in outcomes):
        return "exists"
    stored = (PutOutcome.STORED, PutOutcome.EXISTS)
    return "stored" if all(outcome in stored for outcome in outcomes) else "failed"


def snapshot_room(
    layout: BlockLayout, states: StateBlocks | None = None, *, chunk_tokens: int, batch_tokens: int
) -> SnapshotRoom | None:
    """Room for what the engine's longest pass completes, within ``MAX_SNAPSHOT_BYTES``; None on the CPU.

    Raises:
        ConfigError: The device has no memory left for it.
    """
    if layout.lane is None:
        return None
    slot_bytes = layout.num_bytes(0, layout.num_layers, chunk_tokens // layout.block_size)
    if states is not None:
        slot_bytes = max(slot_bytes, states.num_bytes(0, states.num_rows))
    num_slots = max(1, min(batch_tokens // chunk_tokens + 1, MAX_SNAPSHOT_BYTES // slot_bytes))
    try:
        return SnapshotRoom(layout.lane, layout.device, slot_bytes=slot_bytes, num_slots=num_slots)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"saving needs {num_slots * slot_bytes >> 20} MiB of GPU memory beside vLLM's, for snapshots of chunks: "
            "lower vLLM's --gpu-memory-utilization, or set save to false"
        ) from error
