"""The two protocols the executor drives; the embedded engine, the vLLM worker and the tests' fake provide them.

Threads: every ``ComputePort`` method is called on the thread that called ``execute``; every ``TransferPort`` method
on the executor's one I/O thread, except ``close``, which comes from the calling thread after the I/O thread ended.
Under ``carrier.StepExecutor`` the calling thread is the one that carries out orders, the I/O thread serves all its
restorations, and ``cancel`` may come from any thread at any time, because a store that hangs must hold up nobody.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

from cacheflow.plan.grid import Tile
from cacheflow.types import LoadOutcome


class ComputePort(Protocol):
    """Recomputes prefix cells and runs the new tokens, on one device, in the order it is asked."""

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        """Recompute the tile's cells and write their keys and values into the KV buffer.

        The tile is one chunk wide and continues that chunk's activations: its ``block_lo`` is 0 or where the last
        call for the chunk ended. With ``kv_only_top`` the topmost block computes keys and values only and the chunk
        cannot be continued above it. On return, later calls of this port see the result; on an asynchronous device
        at most one tile may still be running.
        """
        ...

    def restart(self, chunk: int) -> None:
        """Forget the activations of a chunk, so that it can be recomputed from block 0."""
        ...

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        """Run every suffix chunk through blocks ``[block_lo, block_hi)``; blocks come in ascending order, once."""
        ...

    def finish(self) -> None:
        """Final norm, LM head and choice of the first token (nothing without a suffix); waits for the device."""
        ...


@runtime_checkable
class HandOverPort(Protocol):
    """What a ``ComputePort`` adds where pipeline stages hand activations over in order.

    What is sent in one step is received in the next, or in the same one where that is the receiver's last.
    """

    def receive(self, chunk: int) -> None:
        """Take a chunk's activations from the stage below; raises when that stage could not recompute them."""
        ...

    def send(self, chunk: int, *, failed: bool) -> None:
        """Hand a chunk's activations over to the stage above, or tell it that there are none: ``failed``."""
        ...


class Ticket(Protocol):
    """One read under way."""

    @property
    def num_bytes(self) -> int:
        """Bytes this read moves over the link."""
        ...


T = TypeVar("T", bound=Ticket)


class TransferPort(Protocol[T]):
    """Reads prefix cells from a store; two-phase, so that a late read never touches the KV buffer."""

    def start(self, tile: Tile, *, deadline_s: float) -> T:
        """Start reading one cell and return at once.

        Args:
            tile: Exactly one cell.
            deadline_s: Seconds from now after which the store may give the read up as ``LATE``.
        """
        ...

    def wait(self, ticket: T, *, timeout_s: float) -> LoadOutcome | None:
        """Wait for a read; None when it is still under way after ``timeout_s``.

        ``OK`` promises bytes that verified, in a staging buffer of the ticket. Never raises for a store's failure.
        """
        ...

    def place(self, ticket: T) -> None:
        """Copy verified bytes into the KV buffer; on return compute may read them. Frees the ticket."""
        ...

    def cancel(self, ticket: T) -> None:
        """Give a read up and free the ticket; returns once the store no longer touches its buffer."""
        ...


@runtime_checkable
class BoundaryPort(Protocol):
    """What a ``TransferPort`` adds on a later pipeline stage: reads of boundary hidden states.

    Their tickets are awaited, placed and cancelled like all others; ``place`` gives the states to the stage's compute
    port, which keeps them until the restoration ends: a chunk may be recomputed more than once.
    """

    def start_boundary(self, chunk: int, *, deadline_s: float) -> Ticket:
        """Start reading a chunk's boundary states and return at once; arguments as for ``TransferPort.start``."""
        ...
