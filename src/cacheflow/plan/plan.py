"""What a policy hands to the state machine: two sequences over the grid and the rules for meeting.

A plan is a hint. Compute claims the next open tile of ``compute_sequence``, I/O the next of ``load_sequence``; where
both hold the same cells, the side that comes first takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cacheflow.plan.grid import Tile


class Share(Enum):
    """How the tile in which the two pointers meet changes hands."""

    NONE = "none"
    """A tile belongs whole to the side that claims it first (Cake)."""
    LAYERS = "layers"
    """Compute climbs a tile from its bottom block while I/O comes down from its top block."""


class SuffixStart(Enum):
    """When the new tokens may start."""

    AFTER_RESTORE = "after_restore"
    """Once every prefix cell is there."""
    BLOCK_BY_BLOCK = "block_by_block"
    """Block by block, as soon as the prefix cells of that block are there."""


class Choice(Enum):
    """What the never-slower guard settled on."""

    HYBRID = "hybrid"
    RECOMPUTE = "recompute"
    LOAD = "load"
    PREFILL = "prefill"
    """Nothing is restored: the engine's own prefill, in its own passes, is sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan expects, in seconds from the start of the restoration.

    Attributes:
        restore_s: When the last prefix cell is there.
        ttft_s: When the first token is there; equals ``restore_s`` without a suffix.
        compute_s: Compute seconds spent on prefix cells.
        load_s: Link seconds spent on prefix cells.
    """

    restore_s: float
    ttft_s: float
    compute_s: float
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardDecision:
    """Why a plan is a hybrid, or one of the pure ways; the predictions are times to first token.

    Attributes:
        choice: What is to be done.
        reason: The same for people, with the numbers.
        hybrid_s: Of the best hybrid.
        recompute_s: Of recomputing everything, in the chunks of the grid.
        load_s: Of loading everything.
        prefill_s: Of the engine's own prefill; None where it has no passes of its own.
    """

    choice: Choice
    reason: str
    hybrid_s: float
    recompute_s: float
    load_s: float
    prefill_s: float | None = None

    @property
    def without_loading_s(self) -> float:
        """The better of recomputing and prefilling."""
        return self.recompute_s if self.prefill_s is None else min(self.recompute_s, self.prefill_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """Two sequences over a grid, and the rules under which they meet.

    Attributes:
        policy: Name of the policy that made it.
        compute_sequence: Tiles compute claims, in order; every prefix of it is a staircase. May be empty.
        load_sequence: Tiles I/O claims, in order. May be empty. Together the two hold every cell of the grid.
        share: How tiles that stand in both orders change hands.
        suffix_start: When the new tokens may start.
        balance_suffix: Live rule of the ``cacheflow`` policy: stop recomputing when the rest of the load would end
            with the suffix, and load bottom-up, so that the suffix can climb after it.
        kv_only_top: Recompute the topmost cell of a column for keys and values only.
        bottom_row_by_compute: Let compute restore the bottom block of every chunk, for keys and values only, where
            the link is the slower side: it needs no cell below and no attention.
        levels_K: Planned number of blocks recomputed in each chunk, never increasing along the prefix.
        predicted: What the plan expects.
        guard: The never-slower guard's choice; None for policies without one.
    """

    policy: str
    compute_sequence: tuple[Tile, ...]
    load_sequence: tuple[Tile, ...]
    share: Share
    suffix_start: SuffixStart
    levels_K: tuple[int, ...]
    predicted: Prediction
    balance_suffix: bool = False
    kv_only_top: bool = True
    bottom_row_by_compute: bool = False
    guard: GuardDecision | None = None

    @property
    def left_to_prefill(self) -> bool:
        """Whether nothing should be restored: the driver hands prefix and new tokens to the engine's own prefill."""
        return self.guard is not None and self.guard.choice is Choice.PREFILL
