"""What crosses between whoever decides a restoration and the workers that carry it out, when both meet once a step.

In vLLM the scheduler side decides and every worker obeys, so that ranks cannot disagree: orders come in counted units
(cells, never seconds), reports say what became of them. Nothing here knows an engine; everything pickles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Tile
from cacheflow.state.boundary import BOUNDARY_ROW
from cacheflow.types import LoadOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTarget:
    """What a worker must know of one restoration; sent once, before its first order.

    Token positions are absolute; a chunk's position range is ``[end of the one before, its end)``.

    Attributes:
        restore_id: Unique in this process; a request that is restored again gets another one.
        request_id: The request it serves.
        start: Tokens that are in the KV cache already; the first chunk starts here.
        object_start: Where the stored object of the first chunk starts: at or before ``start``.
        chunk_ends: Position at which each chunk ends.
        tokens: Token ids of ``[start, chunk_ends[-1])``.
        block_ids: Blocks of the KV cache that hold ``[0, chunk_ends[-1])``, in order.
        namespace: ``Namespace.digest`` of the stored objects.
        chain_hashes: Chain hash (hex) at the end of each chunk.
        layers_per_block: Layers of one block of the grid.
        copied_from: KV blocks of another restoration, whose content is copied first over the blocks right before
            ``start``: what both share is restored once.
    """

    restore_id: int
    request_id: str
    start: int
    object_start: int
    chunk_ends: tuple[int, ...]
    tokens: tuple[int, ...]
    block_ids: tuple[int, ...]
    namespace: str
    chain_hashes: tuple[str, ...]
    layers_per_block: int = 1
    copied_from: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit each other.

        Raises:
            ConfigError: They do not.
        """
        if not self.chunk_ends or not 0 <= self.object_start <= self.start < self.chunk_ends[0]:
            raise ConfigError(
                f"a restoration from {self.object_start} <= {self.start} needs chunks behind it, got {self.chunk_ends}"
            )
        if len(self.tokens) != self.chunk_ends[-1] - self.start or len(self.chain_hashes) != len(self.chunk_ends):
            raise ConfigError(
                f"{len(self.tokens)} tokens and {len(self.chain_hashes)} chain hashes do not fit chunks "
                f"{self.chunk_ends} from {self.start}"
            )

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Token positions ``[start, end)`` to restore in a chunk."""
        return (self.chunk_ends[chunk - 1] if chunk else self.start), self.chunk_ends[chunk]

    def object_range(self, chunk: int) -> tuple[int, int]:
        """Token positions ``[start, end)`` that the stored objects of a chunk hold."""
        return (self.chunk_ends[chunk - 1] if chunk else self.object_start), self.chunk_ends[chunk]


@dataclass(frozen=True, slots=True)
class ComputeWork:
    """Recompute one tile, one chunk wide.

    Attributes:
        tile: The cells; continues the chunk where its last order ended, or starts at block 0.
        restart: Forget the chunk's activations first.
        kv_only_top: The topmost block needs keys and values only.
        sends: Hand the chunk's activations over to the pipeline stage above afterwards, even if this order fails.
    """

    tile: Tile
    restart: bool = False
    kv_only_top: bool = False
    sends: bool = False


@dataclass(frozen=True, slots=True)
class ReadWork:
    """Start reading one cell; ``LATE`` when it is not there after ``deadline_s`` seconds.

    With ``block`` ``BOUNDARY_ROW`` it reads the chunk's boundary states.
    """

    chunk: int
    block: int
    deadline_s: float

    @property
    def is_boundary(self) -> bool:
        """Whether it reads boundary states, not keys and values."""
        return self.block == BOUNDARY_ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What one restoration's workers do in this step: drop, read, receive, compute, finish, in this order.

    Or cancel: then they receive what is on its way, and nothing else.

    Attributes:
        restore_id: Which restoration.
        receives: Chunks whose activations the pipeline stage below was ordered to send, in the order it sends them; to
            be taken in any case, of a restoration that is cancelled too.
        drops: Cells ``(chunk, block)`` whose reads compute has taken over: they must not be placed from now on.
        reads: Reads to start, in order.
        compute: Tiles to recompute, in order.
        finish: Every cell is resident once the above is done: report the restoration finished.
        cancel: Give everything up and report the restoration finished.
        wait_s: With nothing to compute, wait up to this long for a read to end: other stages are at work meanwhile.
    """

    restore_id: int
    receives: tuple[int, ...] = ()
    drops: tuple[tuple[int, int], ...] = ()
    reads: tuple[ReadWork, ...] = ()
    compute: tuple[ComputeWork, ...] = ()
    finish: bool = False
    cancel: bool = False
    wait_s: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        work = self.drops or self.reads or self.receives or self.compute or self.wait_s
        return not (work or self.finish or self.cancel)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """How one read ended; ``OK`` means placed in the KV cache, ``CANCELLED`` that an order dropped it.

    Attributes:
        restore_id: Which restoration.
        chunk: The cell's chunk.
        block: The cell's layer block; ``BOUNDARY_ROW`` for the chunk's boundary states.
        outcome: How it ended.
        num_bytes: Bytes the read moved, or was to move.
        busy_s: Seconds the link worked on it, waiting in line excluded.
        end_s: When it ended, in seconds on the worker's clock since the restoration's target arrived.
    """

    restore_id: int
    chunk: int
    block: int
    outcome: LoadOutcome
    num_bytes: int
    busy_s: float
    end_s: float = 0.0

    @property
    def is_boundary(self) -> bool:
        """Whether it was a read of boundary states."""
        return self.block == BOUNDARY_ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeReport:
    """What compute did of one restoration in a step: seconds of each order, in order; fewer when one failed.

    Attributes:
        restore_id: Which restoration.
        first: How many of the restoration's compute orders this worker had carried out before.
        seconds: Seconds of each order carried out.
        end_s: When the last of them ended, in seconds on the worker's clock since the restoration's target arrived.
        error: Why the next order failed; empty when none did. The restoration is over then.
    """

    restore_id: int
    first: int
    seconds: tuple[float, ...]
    end_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank did since its last report."""

    loads: tuple[LoadReport, ...] = ()
    computes: tuple[ComputeReport, ...] = ()
    finished: tuple[int, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.loads or self.computes or self.finished)


@dataclass(frozen=True, slots=True)
class StepReport:
    """Reports of all ranks of one step, by rank."""

    by_rank: Mapping[int, RankReport] = field(default_factory=dict)

    def merged(self, other: StepReport) -> StepReport:
        """Both together; a rank reports once per step."""
        return StepReport({**self.by_rank, **other.by_rank})
