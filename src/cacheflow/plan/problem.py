"""One restoration as numbers: the grid, what each cell costs either way, and the suffix after it.

Everything that plans, claims or bounds a restoration reads this one value; nothing here measures.
Shapes: ``K`` prefix chunks, ``B`` layer blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import numpy.typing as npt

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.grid import Grid

Seconds = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.int64]


class BoundarySource(Enum):
    """Where the activations below a stage's bottom block come from."""

    FIRST_STAGE = "first_stage"
    """From the tokens: the stage holds the model's first layer."""
    STORED = "stored"
    """Out of the store: the stage depends on no other."""
    HANDED_OVER = "handed_over"
    """From the stage below, once it has recomputed the chunk: in order, stage after stage."""
    NONE = "none"
    """From nowhere: the stage only loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """A link as ``latency + bytes / bandwidth``; reads are pipelined, so latency counts once per restoration.

    Attributes:
        bytes_per_s: Sustained bandwidth; ``inf`` is allowed (nothing to wait for).
        latency_s: Time to the first byte.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        """Reject a link that never delivers.

        Raises:
            ConfigError: Bandwidth is not positive, or latency is negative or not finite.
        """
        if not self.bytes_per_s > 0:
            raise ConfigError(f"link bytes_per_s is {self.bytes_per_s}, must be above 0")
        if not 0 <= self.latency_s < float("inf"):
            raise ConfigError(f"link latency_s is {self.latency_s}, must be 0 or more and finite")

    def load_s(self, num_bytes: float) -> float:
        """Seconds to load ``num_bytes`` in one pipelined go; 0 bytes cost nothing."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreProblem:
    """What one restoration costs.

    Attributes:
        grid: The cells.
        compute_KB: Seconds to recompute a cell in full (attention and MLP too).
        kv_only_KB: Seconds to recompute a cell's keys and values only (norm and projections), for a cell with
            nothing recomputed above it; never more than ``compute_KB``.
        load_bytes_KB: Bytes a load of the cell takes of the link. In a recurrent block those of the last chunk bring
            the checkpoint too: the running states at the end of the prefix.
        link: The link the bytes come over.
        suffix_B: Seconds to run all suffix tokens through each block, prefix resident; zeros without a suffix.
        head_s: Seconds for the final norm, LM head and sampling of the first token; 0 without a suffix.
        prefill_s: Seconds to the end of the same work, prefix and suffix, by the engine's own prefill, which restores
            nothing and takes passes of its own; None where it has no other than the chunks of this grid.
        boundary_bytes_K: Bytes of boundary hidden states that the link must bring before a chunk can be recomputed:
            of a later pipeline stage that reads them from the store. Zeros otherwise.
        recurrent_B: Blocks with recurrent layers: a chunk can be recomputed there only from the running state that
            recomputing all chunks before it has left. That they are resident is not enough. All false otherwise.
        moved_bytes_KB: Bytes a load of the cell moves; others than ``load_bytes_KB`` where it lies in a store that is
            slower than the link, see ``over_tiers``.
        tier_KB: Number of the store that the cell lies in; stores are read side by side. Empty where there is one.
        num_tiers: Stores that cells may lie in.
    """

    grid: Grid
    compute_KB: Seconds
    kv_only_KB: Seconds
    load_bytes_KB: Bytes
    link: LinkCost
    suffix_B: Seconds = field(default_factory=lambda: np.zeros(0))
    head_s: float = 0.0
    prefill_s: float | None = None
    boundary_bytes_K: Bytes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    recurrent_B: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    moved_bytes_KB: Bytes = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    tier_KB: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    num_tiers: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        """Check shapes and signs.

        Raises:
            ConfigError: An array has another shape than the grid, or a cost is negative or not finite.
        """
        cells = (self.grid.num_chunks, self.grid.num_blocks)
        if self.suffix_B.size == 0:
            object.__setattr__(self, "suffix_B", np.zeros(self.grid.num_blocks))
        if self.boundary_bytes_K.size == 0:
            object.__setattr__(self, "boundary_bytes_K", np.zeros(self.grid.num_chunks, dtype=np.int64))
        if self.recurrent_B.size == 0:
            object.__setattr__(self, "recurrent_B", np.zeros(self.grid.num_blocks, dtype=np.bool_))
        object.__setattr__(self, "num_tiers", int(self.tier_KB.max(initial=0)) + 1)
        for name, array, shape in (
            ("compute_KB", self.compute_KB, cells),
            ("kv_only_KB", self.kv_only_KB, cells),
            ("load_bytes_KB", self.load_bytes_KB, cells),
            ("suffix_B", self.suffix_B, (self.grid.num_blocks,)),
            ("boundary_bytes_K", self.boundary_bytes_K, (self.grid.num_chunks,)),
            ("recurrent_B", self.recurrent_B, (self.grid.num_blocks,)),
            ("moved_bytes_KB", self.moved_KB, cells),
            ("tier_KB", self.tier_KB, cells if self.tier_KB.size else (0, 0)),
        ):
            if array.shape != shape:
                raise ConfigError(f"{name} has shape {array.shape}, the grid needs {shape}")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ConfigError(f"{name} holds a negative or non-finite cost")
        if self.head_s < 0:
            raise ConfigError(f"head_s is {self.head_s}, must be 0 or more")
        if self.prefill_s is not None and not 0 <= self.prefill_s < float("inf"):
            raise ConfigError(f"prefill_s is {self.prefill_s}, must be 0 or more and finite")

    @property
    def moved_KB(self) -> Bytes:
        """Bytes a load of each cell moves."""
        return self.moved_bytes_KB if self.moved_bytes_KB.size else self.load_bytes_KB

    @property
    def suffix_s(self) -> float:
        """Seconds from a resident prefix to the first token."""
        return float(self.suffix_B.sum()) + self.head_s

    @property
    def recompute_s(self) -> float:
        """Seconds to recompute the whole prefix, its top row for keys and values only."""
        return float(self.compute_KB[:, :-1].sum() + self.kv_only_KB[:, -1].sum())

    @property
    def load_s(self) -> float:
        """Seconds to load the whole prefix."""
        return self.link.load_s(float(self.load_bytes_KB.sum()))

    def slowed(self, factor: float) -> RestoreProblem:
        """The same restoration where whatever computes takes ``factor`` times as long."""
        return replace(
            self,
            compute_KB=self.compute_KB * factor,
            kv_only_KB=self.kv_only_KB * factor,
            suffix_B=self.suffix_B * factor,
            head_s=self.head_s * factor,
            prefill_s=None if self.prefill_s is None else self.prefill_s * factor,
        )


def cell_bytes_KB(shape: ModelShape, grid: Grid, *, layers_per_block: int) -> Bytes:
    """Bytes that loading each cell of a grid moves, the checkpoint at the end of the prefix included."""
    tokens_K = np.array([hi - lo for lo, hi in map(grid.chunk_range, range(grid.num_chunks))], dtype=np.int64)
    bytes_KB = np.outer(tokens_K, np.array(shape.kv_bytes_per_token_B(layers_per_block), dtype=np.int64))
    bytes_KB[-1:] += np.array(shape.state_bytes_B(layers_per_block), dtype=np.int64)
    return bytes_KB


def recurrent_B(shape: ModelShape, *, layers_per_block: int) -> npt.NDArray[np.bool_]:
    """Which blocks of a model hold recurrent layers; shape ``(B,)``."""
    recurrent: npt.NDArray[np.bool_] = np.array(shape.state_bytes_B(layers_per_block), dtype=np.int64) > 0
    return recurrent
