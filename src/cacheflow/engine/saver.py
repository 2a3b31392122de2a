"""Writes a prefilled prefix to a store: one object per cell, and with recurrent layers one of states per block.

An object holds ``[layers, 2, n, H, D]`` in the KV dtype, C order; see ``cells``. Keys and values are copied out of the
KV buffer at submission, so the buffer may be used, or evicted, right after; so are the states, which are written once
all keys and values are there: without those they are of no use.

From a device a chunk comes in one copy into pinned memory, and from there into memory of its own; meanwhile the device
copies the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.transfer_port import cell_key, state_key
from cacheflow.plan.grid import Cell
from cacheflow.stores.base import Priority, PutHandle, PutOutcome, PutRequest, Store
from cacheflow.stores.keys import ObjectKey
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.staging import StagingBuffer
from cacheflow.tensors.streams import StreamEvent

SLOWEST_BYTES_PER_S = 10e6
"""A save may take as long as this link would; one below it is not worth restoring from."""
TOKEN_AXES = (2,)
"""Axes of an object's shape along which its tokens lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """How the writes of a save ended, in objects."""

    num_written: int = 0
    num_existing: int = 0
    num_failed: int = 0

    @property
    def complete(self) -> bool:
        """Whether every object is in the store (unless evicted since)."""
        return self.num_failed == 0


class PrefixSaver:
    """Saves one prefix; call from one thread. Writes run on the store's threads."""

    def __init__(
        self,
        store: Store,
        *,
        geometry: CellGeometry,
        namespace: str,
        chain_hashes: Sequence[bytes],
        deadline_s: float | None = None,
    ) -> None:
        """Save under ``namespace`` (``Namespace.digest``) and one chain hash per chunk of the geometry's grid.

        A write is late, and counts as failed, ``deadline_s`` after what it and all before it take at
        ``SLOWEST_BYTES_PER_S``; None: never. What is late may go on: the store has its bytes to itself.
        """
        self._store = store
        self._deadline_s, self._num_bytes = deadline_s, 0
        self._geometry = geometry
        self._namespace = namespace
        self._chain = [each.hex() for each in chain_hashes]
        self._handles: list[PutHandle] = []
        self._states: list[PutRequest] = []

    def _host_copies(self, kv: KVBuffer, chunks: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """Each chunk's cells, block after block, in memory of their own."""
        for chunk in chunks:
            cells = (kv.cell(*self._geometry.extent(Cell(chunk, block))) for block in self._blocks)
            yield [torch.empty(values.shape, dtype=values.dtype).copy_(values) for values in cells]

    def _device_copies(self, kv: KVBuffer, lane: CopyLane, chunks: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """The same from a device; the copy of a chunk is queued before the one before it is waited for."""
        num_layers = self._geometry.shape.num_layers
        of_chunks = [kv.cell(0, num_layers, *self._geometry.grid.chunk_range(chunk)) for chunk in chunks]
        pool = lane.staging(max((values.nbytes for values in of_chunks), default=0))

        def begin(values: torch.Tensor) -> tuple[StagingBuffer, StreamEvent]:
            staging = pool.take()
            return staging, lane.download(staging.tensor[: values.nbytes].view(values.dtype).view(values.shape), values)

        def copies() -> Iterator[tuple[torch.Tensor, StagingBuffer, StreamEvent] | None]:
            for values in of_chunks:
                yield values, *begin(values)
            yield None

        for under_way, _ in pairwise(copies()):
            assert under_way is not None, "nothing comes after the end"
            values, staging, copied = under_way
            copied.wait()
            own = torch.from_numpy(staging.array[: values.nbytes].copy()).view(values.dtype).view(values.shape)
            pool.give(staging)
            yield [own[slice(*self._geometry.layers(block))] for block in self._blocks]

    @property
    def _blocks(self) -> range:
        return range(self._geometry.grid.num_blocks)

    def save_prefix(self, kv: KVBuffer, *, first_chunk: int = 0) -> None:
        """Start writing every chunk of the grid from ``first_chunk`` on, and after them the checkpoint at its end."""
        chunks = range(first_chunk, self._geometry.grid.num_chunks)
        copies = self._host_copies(kv, chunks) if kv.lane is None else self._device_copies(kv, kv.lane, chunks)
        for chunk, payloads in zip(chunks, copies, strict=True):
            requests = []
            for block, payload in enumerate(payloads):
                key = cell_key(self._namespace, self._chain[chunk], self._geometry, Cell(chunk, block))
                requests.append(self._request(key, payload))
            self._submit(requests, sum(payload.nbytes for payload in payloads))
        if kv.checkpoint is not None and self._chain:
            for block in self._blocks:
                key = state_key(self._namespace, self._chain[-1], self._geometry, block)
                states = kv.checkpoint.payload(self._geometry.layers(block))
                self._states.append(PutRequest(key, [states], shape=states.shape, dtype="uint8"))

    def wait(self, timeout_s: float | None = None) -> SaveReport:
        """Wait for every write started so far; those still pending after ``timeout_s`` in all count as failed.

        The checkpoint is written here, and only if all keys and values were.
        """
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        outcomes = self._outcomes(ends_s)
        if self._states and all(each in (PutOutcome.STORED, PutOutcome.EXISTS) for each in outcomes):
            self._num_bytes = 0  # what came before has been written
            self._submit(self._states, sum(math.prod(request.shape) for request in self._states))
            self._states = []
            outcomes = self._outcomes(ends_s)
        written, existing = outcomes.count(PutOutcome.STORED), outcomes.count(PutOutcome.EXISTS)
        return SaveReport(num_written=written, num_existing=existing, num_failed=len(outcomes) - written - existing)

    def _submit(self, requests: Sequence[PutRequest], num_bytes: int) -> None:
        self._num_bytes += num_bytes
        deadline_s = None if self._deadline_s is None else self._deadline_s + self._num_bytes / SLOWEST_BYTES_PER_S
        self._handles.append(self._store.submit_put(requests, priority=Priority.SAVE, deadline_s=deadline_s))

    def _outcomes(self, ends_s: float | None) -> list[PutOutcome | None]:
        outcomes: list[PutOutcome | None] = []
        for handle in self._handles:
            outcomes += handle.wait(None if ends_s is None else max(0.0, ends_s - time.monotonic()))
        return outcomes

    def _request(self, key: ObjectKey, values: torch.Tensor) -> PutRequest:
        shape = tuple(values.shape)
        payload: npt.NDArray[np.uint8] = values.view(-1).view(torch.uint8).numpy()
        return PutRequest(key, [payload], shape=shape, dtype=self._geometry.shape.dtype, token_axes=TOKEN_AXES)
