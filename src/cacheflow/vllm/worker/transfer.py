"""The I/O side of a restoration inside vLLM: reads a cell into staging memory, then places it in the KV blocks.

Provides ``restore.ports.TransferPort`` by structure. Two phases, because a read that comes late must not touch blocks
that compute has taken over. An object holds whole KV blocks: see ``layout``. In a model with recurrent layers the cells
of the last chunk bring the running states at its end too, as a second object: both come, or neither counts. Keys and
values that the store lends are uploaded from where they lie, and the staging memory is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cacheflow.plan.grid import Boundary, Cell, Piece, block_layers, layers_of_blocks
from cacheflow.restore.work import RestoreTarget
from cacheflow.stores.base import GetHandle, GetRequest, Priority, Store
from cacheflow.stores.keys import ObjectKey, RankKeys
from cacheflow.stores.loan import Loan
from cacheflow.tensors.copy_lane import MAX_QUEUED
from cacheflow.tensors.staging import StagingBuffer, StagingPool
from cacheflow.tensors.streams import StreamEvent
from cacheflow.types import LoadOutcome
from cacheflow.vllm.worker.checkpoint import Checkpoint
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.state_blocks import StateBlocks

BOUNDARY_BUFFERS = 4
"""Of boundary states, of which a few are read ahead."""


@dataclass(frozen=True, slots=True, eq=False)
class VllmTicket:
    """One read under way: of one cell, or of a chunk's boundary states; made by ``VllmTransferPort``.

    Attributes:
        piece: What it brings.
        num_bytes: Bytes of what it brings.
        state_bytes: Bytes of running states among them, after the keys and values.
        pool: Where ``staging`` came from.
        staging: Receives the object.
        handle: The store's.
        loan: Takes the keys and values where the store lends them; None where they go into ``staging`` in any case.
    """

    piece: Piece
    num_bytes: int
    pool: StagingPool
    staging: StagingBuffer
    handle: GetHandle
    state_bytes: int = 0
    loan: Loan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryReads:
    """What reading boundary states needs besides.

    Attributes:
        pool: From ``boundary_pool``.
        token_bytes: Bytes of one token's states.
        give: Takes a chunk's number, its object's bytes, which it must copy, and how many of the object's tokens lie
            before what is to be restored; called on the I/O thread. Returns the event after which the bytes may be
            written again; None: at once.
    """

    pool: StagingPool
    token_bytes: int
    give: Callable[[int, torch.Tensor, int], StreamEvent | None]


class VllmTransferPort:
    """Reads the cells of one restoration; any number of reads may be under way.

    All methods on the I/O thread, but ``cancel`` on any.
    """

    def __init__(  # noqa: PLR0913 -- one restoration's, keyword-only but for the first three
        self,
        store: Store,
        layout: BlockLayout,
        target: RestoreTarget,
        *,
        pool: StagingPool,
        fence: StreamEvent | None = None,
        keys: RankKeys = RankKeys(),  # noqa: B008 -- frozen
        boundaries: BoundaryReads | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Read ``target``'s objects into buffers of ``pool``, which all ports of the I/O thread share.

        ``fence`` is that of the target's blocks, see ``BlockLayout``. ``checkpoint`` takes the running states at its
        end; None of a model without recurrent layers.

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
        self._fence = fence
        self._keys = keys
        self._boundaries = boundaries
        self._checkpoint = checkpoint

    def start(self, piece: Piece, *, deadline_s: float) -> VllmTicket:
        """See ``TransferPort.start``; reads the whole object, also where only its end is wanted.

        Raises:
            ValueError: Boundary states, and this stage reads none (a caller's bug).
        """
        if isinstance(piece, Boundary):
            return self._start_boundary(piece, deadline_s=deadline_s)
        layers = self._layers(piece)
        blocks, _ = self._blocks(piece.chunk)
        kv_bytes, state_bytes = self._layout.num_bytes(*layers, len(blocks)), self._state_bytes(piece.chunk, layers)
        name = self._target.namespace, self._target.chain_hashes[piece.chunk], layers
        objects = [(self._keys.kv(*name), kv_bytes)]
        if state_bytes:
            objects.append((self._keys.states(*name), state_bytes))
        loan = None if self._layout.lane is None else Loan()
        staging, handle = self._submit(objects, self._pool, deadline_s=deadline_s, loan=loan)
        return VllmTicket(piece, kv_bytes + state_bytes, self._pool, staging, handle, state_bytes, loan)

    def _state_bytes(self, chunk: int, layers: tuple[int, int]) -> int:
        if self._checkpoint is None or chunk < len(self._target.chunk_ends) - 1:
            return 0
        return self._checkpoint.num_bytes(layers)

    def _start_boundary(self, boundary: Boundary, *, deadline_s: float) -> VllmTicket:
        reads, chunk = self._boundaries, boundary.chunk
        if reads is None:
            raise ValueError(f"this stage reads no boundary states, and was asked for those of chunk {chunk}")
        start, end = self._target.object_range(chunk)
        num_bytes = (end - start) * reads.token_bytes
        key = self._keys.boundary(self._target.namespace, self._target.chain_hashes[chunk])
        staging, handle = self._submit([(key, num_bytes)], reads.pool, priority=Priority.AWAITED, deadline_s=deadline_s)
        return VllmTicket(boundary, num_bytes, reads.pool, staging, handle)

    def _submit(
        self,
        objects: Sequence[tuple[ObjectKey, int]],
        pool: StagingPool,
        *,
        priority: Priority = Priority.READ,
        deadline_s: float,
        loan: Loan | None = None,
    ) -> tuple[StagingBuffer, GetHandle]:
        """Read objects of so many bytes, which come to lie one after the other; the last is asked for first.

        ``loan`` may take the first of them instead.
        """
        staging, requests, at = pool.take(), [], 0
        for key, num_bytes in objects:
            requests.append(GetRequest(key, staging.array[at : at + num_bytes], loan=None if at else loan))
            at += num_bytes
        return staging, self._store.submit_get(requests[::-1], priority=priority, deadline_s=deadline_s)

    def wait(self, ticket: VllmTicket, *, timeout_s: float) -> LoadOutcome | None:
        """See ``TransferPort.wait``; what would have to queue for the device has not arrived yet."""
        outcomes = ticket.handle.wait(timeout_s)
        failed = (each for each in outcomes if each is not None and each is not LoadOutcome.OK)
        # The first that fails settles it; others may be under way until the ticket is cancelled.
        outcome = next(failed, None if None in outcomes else LoadOutcome.OK)
        lane = self._layout.lane
        if outcome is LoadOutcome.OK and lane is not None and not lane.has_room(timeout_s):
            return None
        return outcome

    def place(self, ticket: VllmTicket) -> None:
        """See ``TransferPort.place``; blocks before the target's start keep what they hold."""
        copied: StreamEvent | None = None
        payload, loan = ticket.staging.array[: ticket.num_bytes], ticket.loan
        lent = None if loan is None else loan.payload
        if isinstance(ticket.piece, Boundary):
            copied = self._place_boundary(ticket.piece.chunk, ticket.staging.tensor[: ticket.num_bytes])
        else:
            blocks, skip_blocks = self._blocks(ticket.piece.chunk)
            layers, kv_bytes = self._layers(ticket.piece), ticket.num_bytes - ticket.state_bytes
            kv = payload[:kv_bytes] if lent is None else lent
            copied = self._layout.place(*layers, blocks, kv, skip_blocks=skip_blocks, after=self._fence)
            if loan is not None:
                loan.end(after=copied)
            if ticket.state_bytes:
                assert self._checkpoint is not None, "states are read for a checkpoint"
                self._checkpoint.hold(layers, payload[kv_bytes:])
        ticket.pool.give(ticket.staging, after=copied if lent is None else None)

    def _place_boundary(self, chunk: int, packed: torch.Tensor) -> StreamEvent | None:
        assert self._boundaries is not None, "boundary states are placed where they are read"
        object_start, _ = self._target.object_range(chunk)
        start, _ = self._target.chunk_range(chunk)
        return self._boundaries.give(chunk, packed, start - object_start)

    def cancel(self, ticket: VllmTicket) -> None:
        """See ``TransferPort.cancel``."""
        ticket.handle.cancel()
        ticket.pool.give(ticket.staging)
        if ticket.loan is not None:
            ticket.loan.end()

    def _layers(self, cell: Cell) -> tuple[int, int]:
        return block_layers(cell.block, self._target.layers_per_block, self._layout.num_layers)

    def _blocks(self, chunk: int) -> tuple[tuple[int, ...], int]:
        """KV blocks of a chunk's object, and how many of them lie before what is to be restored."""
        size = self._layout.block_size
        object_start, end = self._target.object_range(chunk)
        start, _ = self._target.chunk_range(chunk)
        return self._target.block_ids[object_start // size : end // size], (start - object_start) // size


def staging_pool(
    layout: BlockLayout, states: StateBlocks | None = None, *, chunk_tokens: int, layers_per_block: int
) -> StagingPool:
    """Staging buffers that hold what any one read brings.

    Where the KV cache is on CUDA they are pinned, and those that reads and uploads need at once are so from here on.
    """
    num_bytes = layout.largest_object_bytes(chunk_tokens=chunk_tokens, layers_per_block=layers_per_block)
    if states is not None:
        num_bytes += max(states.num_bytes(*rows) for rows in layers_of_blocks(layers_per_block, states.num_rows))
    if layout.lane is None:
        return StagingPool(num_bytes)
    return layout.lane.staging(num_bytes, num_buffers=2 * MAX_QUEUED)


def boundary_pool(layout: BlockLayout, *, token_bytes: int, chunk_tokens: int) -> StagingPool:
    """Staging buffers that hold a chunk's boundary states; see ``staging_pool``."""
    num_bytes = token_bytes * chunk_tokens
    if layout.lane is None or not num_bytes:
        return StagingPool(num_bytes)
    return layout.lane.staging(num_bytes, num_buffers=BOUNDARY_BUFFERS)
