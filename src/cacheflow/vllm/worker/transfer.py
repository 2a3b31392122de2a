"""The I/O side of a restoration inside vLLM: reads a cell into staging memory, then places it in the KV blocks.

Provides ``restore.ports.TransferPort`` by structure. Two phases, because a read that comes late must not touch blocks
that compute has taken over. An object holds whole KV blocks: see ``layout``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cacheflow.plan.grid import Boundary, Cell, Piece
from cacheflow.restore.work import RestoreTarget
from cacheflow.stores.base import GetHandle, GetRequest, Store
from cacheflow.stores.keys import ObjectKey, RankKeys
from cacheflow.tensors.staging import StagingBuffer, StagingPool
from cacheflow.types import LoadOutcome
from cacheflow.vllm.worker.layout import BlockLayout, Payload, block_layers

PRIORITY = 1
"""Of reads in the store: before saves."""


@dataclass(frozen=True, slots=True, eq=False)
class VllmTicket:
    """One read under way: of one cell, or of a chunk's boundary states; made by ``VllmTransferPort``.

    Attributes:
        piece: What it brings.
        num_bytes: Bytes of the object.
        pool: Where ``staging`` came from.
        staging: Receives the object.
        handle: The store's.
    """

    piece: Piece
    num_bytes: int
    pool: StagingPool
    staging: StagingBuffer
    handle: GetHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryReads:
    """What reading boundary states needs besides.

    Attributes:
        pool: From ``boundary_pool``.
        token_bytes: Bytes of one token's states.
        give: Takes a chunk's number, its object's bytes, which it must copy, and how many of the object's tokens lie
            before what is to be restored; called on the I/O thread.
    """

    pool: StagingPool
    token_bytes: int
    give: Callable[[int, Payload, int], None]


class VllmTransferPort:
    """Reads the cells of one restoration; any number of reads may be under way.

    All methods on the I/O thread, but ``cancel`` on any.
    """

    def __init__(
        self,
        store: Store,
        layout: BlockLayout,
        target: RestoreTarget,
        *,
        pool: StagingPool,
        keys: RankKeys = RankKeys(),  # noqa: B008 -- frozen
        boundaries: BoundaryReads | None = None,
    ) -> None:
        """Read ``target``'s objects into buffers of ``pool``, which all ports of the I/O thread share.

        Raises:
            ValueError: The target's positions do not fall on block boundaries (a caller's bug).
        """
        positions = (target.object_start, target.start, *target.chunk_ends)
        if any(position % layout.block_size for position in positions):
            raise ValueError(f"positions {positions} are not multiples of the block size {layout.block_size}")
        self._store = store
        self._layout = layout
        self._target = target
        self._pool = pool
        self._keys = keys
        self._boundaries = boundaries

    def start(self, piece: Piece, *, deadline_s: float) -> VllmTicket:
        """See ``TransferPort.start``; reads the whole object, also where only its end is wanted.

        Raises:
            ValueError: Boundary states, and this stage reads none (a caller's bug).
        """
        if isinstance(piece, Boundary):
            return self._start_boundary(piece, deadline_s=deadline_s)
        layers = self._layers(piece)
        blocks, _ = self._blocks(piece.chunk)
        num_bytes = self._layout.num_bytes(*layers, len(blocks))
        key = self._keys.kv(self._target.namespace, self._target.chain_hashes[piece.chunk], layers)
        staging, handle = self._submit(key, self._pool, num_bytes, deadline_s=deadline_s)
        return VllmTicket(piece, num_bytes, self._pool, staging, handle)

    def _start_boundary(self, boundary: Boundary, *, deadline_s: float) -> VllmTicket:
        reads, chunk = self._boundaries, boundary.chunk
        if reads is None:
            raise ValueError(f"this stage reads no boundary states, and was asked for those of chunk {chunk}")
        start, end = self._target.object_range(chunk)
        num_bytes = (end - start) * reads.token_bytes
        key = self._keys.boundary(self._target.namespace, self._target.chain_hashes[chunk])
        staging, handle = self._submit(key, reads.pool, num_bytes, deadline_s=deadline_s)
        return VllmTicket(boundary, num_bytes, reads.pool, staging, handle)

    def _submit(
        self, key: ObjectKey, pool: StagingPool, num_bytes: int, *, deadline_s: float
    ) -> tuple[StagingBuffer, GetHandle]:
        staging = pool.take()
        request = GetRequest(key, staging.array[:num_bytes])
        return staging, self._store.submit_get([request], priority=PRIORITY, deadline_s=deadline_s)

    def wait(self, ticket: VllmTicket, *, timeout_s: float) -> LoadOutcome | None:
        """See ``TransferPort.wait``."""
        return ticket.handle.wait(timeout_s)[0]

    def place(self, ticket: VllmTicket) -> None:
        """See ``TransferPort.place``; blocks before the target's start keep what they hold."""
        payload = ticket.staging.array[: ticket.num_bytes]
        if isinstance(ticket.piece, Boundary):
            self._place_boundary(ticket.piece.chunk, payload)
        else:
            blocks, skip_blocks = self._blocks(ticket.piece.chunk)
            self._layout.scatter(*self._layers(ticket.piece), blocks, payload, skip_blocks=skip_blocks)
        ticket.pool.give(ticket.staging)

    def _place_boundary(self, chunk: int, payload: Payload) -> None:
        assert self._boundaries is not None, "boundary states are placed where they are read"
        object_start, _ = self._target.object_range(chunk)
        start, _ = self._target.chunk_range(chunk)
        self._boundaries.give(chunk, payload, start - object_start)

    def cancel(self, ticket: VllmTicket) -> None:
        """See ``TransferPort.cancel``."""
        ticket.handle.cancel()
        ticket.pool.give(ticket.staging)

    def _layers(self, cell: Cell) -> tuple[int, int]:
        return block_layers(cell.block, self._target.layers_per_block, self._layout.num_layers)

    def _blocks(self, chunk: int) -> tuple[tuple[int, ...], int]:
        """KV blocks of a chunk's object, and how many of them lie before what is to be restored."""
        size = self._layout.block_size
        object_start, end = self._target.object_range(chunk)
        start, _ = self._target.chunk_range(chunk)
        return self._target.block_ids[object_start // size : end // size], (start - object_start) // size


def staging_pool(layout: BlockLayout, *, chunk_tokens: int, layers_per_block: int) -> StagingPool:
    """Staging buffers that hold any object of this layout; pinned where the KV cache is on CUDA."""
    num_bytes = layout.largest_object_bytes(chunk_tokens=chunk_tokens, layers_per_block=layers_per_block)
    return StagingPool(num_bytes, pinned=layout.device.type == "cuda")


def boundary_pool(*, token_bytes: int, chunk_tokens: int) -> StagingPool:
    """Staging buffers that hold a chunk's boundary states."""
    return StagingPool(token_bytes * chunk_tokens, pinned=False)
