"""The protocols that restorations are carried out over; the embedded engine, the vLLM worker and tests provide them.

Threads: every ``ComputePort``, ``HandOverPort`` and ``DecodePort`` method is called on the thread that computes.
``TransferPort.cancel`` may be called on any thread, also while another method of the port runs, because a store that
hangs must hold up nobody; its other methods are called on the I/O thread of ``Reads``.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

from cacheflow.plan.grid import Piece, Tile
from cacheflow.types import LoadOutcome


class ComputePort(Protocol):
    """Recomputes prefix cells and runs the new tokens, on one device, in the sequence it is asked."""

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        """Recompute the tile's cells and write their keys and values into the KV buffer.

        The tile is one chunk wide and continues that chunk's activations: its ``block_lo`` is 0 or where the last
        call for the chunk ended. With ``kv_only_top`` the topmost block computes keys and values only and the chunk
        cannot be continued above it. On return, later calls of this port see the result; a ``QueueingPort``'s device
        may still be at work.
        """
        ...

    def restart(self, chunk: int) -> None:
        """Forget the activations of a chunk, so that it can be recomputed from block 0."""
        ...

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        """Run every suffix chunk through blocks ``[block_lo, block_hi)``; blocks come in ascending order, once."""
        ...

    def finish(self) -> None:
        """Final norm and LM head (nothing without a suffix); waits for the device."""
        ...


@runtime_checkable
class HandOverPort(Protocol):
    """What a ``ComputePort`` adds where pipeline stages hand activations over in sequence.

    What is sent in one step is received in the next, or in the same one where that is the receiver's last.
    """

    def receive(self, chunk: int) -> None:
        """Take a chunk's activations from the stage below; raises when that stage could not recompute them."""
        ...

    def send(self, chunk: int, *, failed: bool) -> None:
        """Hand a chunk's activations over to the stage above, or tell it that there are none: ``failed``."""
        ...


class DeviceEvent(Protocol):
    """A place in what a device was asked."""

    def done(self) -> bool:
        """Whether the device has done all before it; does not wait."""
        ...

    def wait(self) -> None:
        """Wait for it."""
        ...

    def seconds_after(self, earlier: Any) -> float:  # noqa: ANN401 -- another of its kind
        """Device seconds between two events that are done."""
        ...


@runtime_checkable
class QueueingPort(Protocol):
    """What a ``ComputePort`` adds whose calls may return before their work is done; all of them share one queue."""

    def record(self) -> DeviceEvent | None:
        """An event after all that was asked so far; None on a device whose calls return when their work is done."""
        ...


class DecodePort(Protocol):
    """Makes a request's answer, token by token, on the compute thread."""

    def start(self) -> bool:
        """Choose the first token, right after ``ComputePort.finish``; whether the answer goes on."""
        ...

    def step(self) -> bool:
        """Make one more token; whether the answer goes on."""
        ...


class Ticket(Protocol):
    """One read under way."""

    @property
    def num_bytes(self) -> int:
        """Bytes this read moves over the link."""
        ...


T = TypeVar("T", bound=Ticket)


class TransferPort(Protocol[T]):
    """Reads prefix cells, and boundary states where there are any, from a store.

    Two-phase, so that a late read never touches the KV buffer.
    """

    def start(self, piece: Piece, *, deadline_s: float) -> T:
        """Start reading one cell, or the boundary states of one chunk, and return at once.

        Args:
            piece: What to read. Only a later pipeline stage is asked for a ``Boundary``.
            deadline_s: Seconds from now after which the store may give the read up as ``LATE``: all that the read is
                allowed, whatever it has waited since it was claimed. ``Reads`` counts from the claim and gives it up
                first.
        """
        ...

    def wait(self, ticket: T, *, timeout_s: float) -> LoadOutcome | None:
        """Wait for a read; None when it is still under way after ``timeout_s``.

        ``OK`` promises bytes that verified, in a staging buffer of the ticket or lent by the store. Never raises for a
        store's failure.
        """
        ...

    def place(self, ticket: T) -> None:
        """Copy verified bytes to where compute reads them, and free the ticket.

        Cells go into the KV buffer. Boundary states go to the stage's compute port, which keeps them until the
        restoration ends: a chunk may be recomputed more than once.
        """
        ...

    def cancel(self, ticket: T) -> None:
        """Give a read up and free the ticket; returns once the store no longer touches its buffer."""
        ...
