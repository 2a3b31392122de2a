"""What a restoration's state machine tells compute to do next."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cacheflow.plan.grid import Tile


class ClaimKind(Enum):
    """What compute is to do next."""

    RECOMPUTE = "recompute"
    REPAIR = "repair"
    """Recompute what the link failed to deliver, or what compute took back from it."""
    SUFFIX = "suffix"
    WAIT = "wait"
    """Nothing to do until a load ends or time passes."""
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeClaim:
    """One order to compute.

    Attributes:
        kind: What to do.
        tile: The cells, for ``RECOMPUTE`` and ``REPAIR``.
        restart: The chunk of ``tile`` starts over at block 0.
        kv_only_top: The tile's top block needs keys and values only.
        block_lo: First block, for ``SUFFIX``.
        block_hi: One past the last block, for ``SUFFIX``.
        predicted_s: What the profile expects it to take, uncorrected.
    """

    kind: ClaimKind
    tile: Tile | None = None
    restart: bool = False
    kv_only_top: bool = False
    block_lo: int = 0
    block_hi: int = 0
    predicted_s: float = 0.0
