"""The I/O side of a restoration from a store: reads a cell into a staging buffer, then places it in the KV buffer.

Provides ``restore.ports.TransferPort`` by structure. Two phases, because a read that comes late must not touch a cell
that compute has taken over. Keys and values that the store lends are uploaded from where they lie, and the staging
buffer is left alone. Payload: see ``cells``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.plan.grid import Boundary, Cell, Piece
from cacheflow.stores.base import GetHandle, GetRequest, Priority, Store
from cacheflow.stores.keys import ObjectKey, RankKeys
from cacheflow.stores.loan import Loan
from cacheflow.tensors.staging import StagingBuffer, StagingPool
from cacheflow.types import LoadOutcome


class StoreTicket:
    """One read of one cell under way, with the states that it brings; made by ``StoreTransferPort.start``."""

    __slots__ = ("extent", "handle", "kv_bytes", "loan", "num_bytes", "staging")

    def __init__(
        self, *, geometry: CellGeometry, cell: Cell, staging: StagingBuffer, loan: Loan | None, handle: GetHandle
    ) -> None:
        """Hold what the port needs to place or cancel the read."""
        self.extent = geometry.extent(cell)
        self.kv_bytes = geometry.kv_bytes(cell)
        self.num_bytes = geometry.num_bytes(cell)
        self.staging = staging
        self.loan = loan
        self.handle = handle


class StoreTransferPort:
    """Reads cells from a store; threads as ``TransferPort`` has them. Any number of reads may be under way."""

    def __init__(
        self,
        store: Store,
        *,
        geometry: CellGeometry,
        namespace: str,
        chain_hashes: Sequence[bytes],
        kv: KVBuffer,
    ) -> None:
        """Read the prefix whose chunks have ``chain_hashes`` (one per chunk of the grid) into ``kv``.

        Args:
            store: Where the cells are.
            geometry: The grid laid over the model.
            namespace: ``Namespace.digest`` of the save.
            chain_hashes: ``stores.keys.chain_hashes`` of the prefix.
            kv: Where they go.
        """
        self._store = store
        self._geometry = geometry
        self._namespace = namespace
        self._chain = [each.hex() for each in chain_hashes]
        self._kv = kv
        num_bytes = geometry.max_cell_bytes
        self._pool = StagingPool(num_bytes) if kv.lane is None else kv.lane.staging(num_bytes)

    def start(self, piece: Piece, *, deadline_s: float) -> StoreTicket:
        """See ``TransferPort.start``; on one device there are no boundary states to read."""
        assert not isinstance(piece, Boundary), "the first stage reads no boundary states"
        staging, chain_hash = self._pool.take(), self._chain[piece.chunk]
        kv_bytes, num_bytes = self._geometry.kv_bytes(piece), self._geometry.num_bytes(piece)
        key = cell_key(self._namespace, chain_hash, self._geometry, piece)
        loan = None if self._kv.lane is None else Loan()
        requests = [GetRequest(key, staging.array[:kv_bytes], loan=loan)]
        if num_bytes > kv_bytes:
            # First: without its states a cell of the last chunk is of no use.
            states = state_key(self._namespace, chain_hash, self._geometry, piece.block)
            requests.insert(0, GetRequest(states, staging.array[kv_bytes:num_bytes]))
        handle = self._store.submit_get(requests, priority=Priority.READ, deadline_s=deadline_s)
        return StoreTicket(geometry=self._geometry, cell=piece, staging=staging, loan=loan, handle=handle)

    def wait(self, ticket: StoreTicket, *, timeout_s: float) -> LoadOutcome | None:
        """See ``TransferPort.wait``; the first object that gave nothing usable decides.

        What would have to queue for the device has not arrived yet.
        """
        outcomes = ticket.handle.wait(timeout_s)
        failed = (each for each in outcomes if each not in (None, LoadOutcome.OK))
        outcome = next(failed, None if None in outcomes else LoadOutcome.OK)
        lane = self._kv.lane
        if outcome is LoadOutcome.OK and lane is not None and not lane.has_room(timeout_s):
            return None
        return outcome

    def place(self, ticket: StoreTicket) -> None:
        """See ``TransferPort.place``; numpy's single-threaded copy on the CPU, queued for a copy stream on CUDA."""
        lent = None if ticket.loan is None else ticket.loan.payload
        payload = ticket.staging.tensor[: ticket.kv_bytes] if lent is None else torch.from_numpy(lent)
        copied = self._kv.write_payload(payload, ticket.extent)
        if ticket.loan is not None:
            ticket.loan.end(after=copied)
        if ticket.num_bytes > ticket.kv_bytes:
            states = self._kv.checkpoint
            assert states is not None, "only a model with recurrent layers has states to read"
            states.write_payload(ticket.staging.array[ticket.kv_bytes : ticket.num_bytes], ticket.extent[:2])
        self._pool.give(ticket.staging, after=copied if lent is None else None)

    def cancel(self, ticket: StoreTicket) -> None:
        """See ``TransferPort.cancel``."""
        ticket.handle.cancel()
        self._pool.give(ticket.staging)
        if ticket.loan is not None:
            ticket.loan.end()


def cell_key(namespace: str, chain_hash: str, geometry: CellGeometry, cell: Cell) -> ObjectKey:
    """Store key of one cell; ``chain_hash`` in hex, at the end of the cell's chunk."""
    return RankKeys().kv(namespace, chain_hash, geometry.layers(cell.block))


def state_key(namespace: str, chain_hash: str, geometry: CellGeometry, block: int) -> ObjectKey:
    """Store key of the states of a block's recurrent layers; ``chain_hash`` in hex, at their position."""
    return RankKeys().states(namespace, chain_hash, geometry.layers(block))
