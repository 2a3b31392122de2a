"""Work: what those who carry a restoration out are given to do, and what they report.

In vLLM the scheduler side decides and every worker obeys. Compute comes in counted cells, never in seconds: ranks
all-reduce, and must do the same. Reads carry a deadline in seconds, which each rank measures on its own clock; ranks
may disagree about a read, and its first failure on any of them settles it (``ReadLedger``). Nothing here knows an
engine; everything pickles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Piece, Tile
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.read_window import ReadSample
from cacheflow.state.compute_side import ComputeClaim
from cacheflow.types import LoadOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreTarget:
    """What a worker must know of one restoration; sent once, before its first work.

    Token positions are absolute; a chunk's position range is ``[end of the one before, its end)``.

    Attributes:
        restore_id: Unique in this process; a request that is restored again gets another one.
        request_id: The request it serves.
        start: Tokens that are in the KV cache already; the first chunk starts here.
        object_start: Where the stored object of the first chunk starts: at or before ``start``.
        chunk_ends: Position at which each chunk ends.
        tokens: Token ids of ``[start, chunk_ends[-1])``.
        block_ids: Blocks of the KV cache that hold ``[0, chunk_ends[-1])``, from the first on.
        namespace: ``Namespace.digest`` of the stored objects.
        chain_hashes: Chain hash (hex) at the end of each chunk.
        layers_per_block: Layers of one block of the grid.
        next_token: Token id after the last chunk, which a drafter reads; None where nothing drafts.
        copied_from: KV blocks of another restoration, whose content is copied first over the blocks right before
            ``start``: what both share is restored once.
        state_blocks: Of a model with recurrent layers the KV blocks in which their running states stand, one for each
            group of them: while the prefix is recomputed, and at its end.
        start_states: Blocks that hold the states at ``start``; they are copied first. None where nothing is recomputed
            or ``start`` is 0.
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
    next_token: int | None = None
    copied_from: tuple[int, ...] = ()
    state_blocks: tuple[int, ...] = ()
    start_states: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit each other.

        Raises:
            ConfigError: They do not.
        """
        if not self.chunk_ends or not 0 <= self.object_start <= self.start < self.chunk_ends[0]:
            raise ConfigError(
                f"a restoration from {self.object_start} <= {self.start} needs chunks after it, got {self.chunk_ends}"
            )
        if len(self.tokens) != self.chunk_ends[-1] - self.start or len(self.chain_hashes) != len(self.chunk_ends):
            raise ConfigError(
                f"{len(self.tokens)} tokens and {len(self.chain_hashes)} chain hashes do not fit chunks "
                f"{self.chunk_ends} from {self.start}"
            )

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Token positions ``[start, end)`` to restore in a chunk."""
        return (self.chunk_ends[chunk - 1] if chunk else self.start), self.chunk_ends[chunk]

    def token_after(self, chunk: int) -> int | None:
        """Token id after a chunk; None where that is not known."""
        after = self.chunk_ends[chunk] - self.start
        return self.tokens[after] if after < len(self.tokens) else self.next_token

    def object_range(self, chunk: int) -> tuple[int, int]:
        """Token positions ``[start, end)`` that the stored objects of a chunk hold."""
        return (self.chunk_ends[chunk - 1] if chunk else self.object_start), self.chunk_ends[chunk]


@dataclass(frozen=True, slots=True)
class ComputeWork:
    """Recompute one tile, one chunk wide.

    Attributes:
        tile: The cells; continues the chunk where its last work ended, or starts at block 0.
        restart: Forget the chunk's activations first.
        kv_only_top: The topmost block needs keys and values only.
        sends: Hand the chunk's activations over to the pipeline stage above afterwards, even if this fails.
        expected_s: How long it should take; bounds what a rank's device has queued, and changes nothing that is done.
    """

    tile: Tile
    restart: bool = False
    kv_only_top: bool = False
    sends: bool = False
    expected_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class ReadWork:
    """Start reading one cell, or a chunk's boundary states; ``LATE`` on a rank where it takes over ``deadline_s``.

    Attributes:
        piece: What to read.
        deadline_s: Seconds that it may take.
        tier: Number of the store it comes from; None of boundary states.
    """

    piece: Piece
    deadline_s: float
    tier: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What one restoration's workers do in this step: drop, read, receive, compute, finish, in this sequence.

    Or cancel: then they receive what is on its way, and nothing else.

    Attributes:
        restore_id: Which restoration.
        receives: Chunks whose activations the pipeline stage below sends, in its sequence; to
            be taken in any case, of a restoration that is cancelled too.
        drops: Reads that compute has taken over, or that are of no use any more: they must not be placed from now on.
        reads: Reads to start, one after the other.
        compute: Tiles to recompute, one after the other.
        finish: Every cell is resident once the above is done: report the restoration finished.
        cancel: Give everything up and report the restoration finished.
        wait_s: With nothing to compute, wait up to this long for a read to end: other stages are at work meanwhile.
    """

    restore_id: int
    receives: tuple[int, ...] = ()
    drops: tuple[Piece, ...] = ()
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
    """How one read ended; ``OK`` means placed in the KV cache, ``CANCELLED`` that it was dropped.

    Attributes:
        restore_id: Which restoration.
        piece: What was read.
        outcome: How it ended.
        num_bytes: Bytes the read moved, or was to move.
        busy_s: Seconds the link worked on it, waiting in line excluded.
        end_s: When it ended, in seconds on the worker's clock since the restoration's target arrived.
        sample: What it told of the worker's store; None where it told nothing.
    """

    restore_id: int
    piece: Piece
    outcome: LoadOutcome
    num_bytes: int
    busy_s: float
    end_s: float = 0.0
    sample: ReadSample | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeReport:
    """What compute did of one restoration: seconds of each piece of work; fewer when one failed.

    Of a device that works on after a call it comes late; what was asked is done in sequence all the same.

    Attributes:
        restore_id: Which restoration.
        first: How many pieces of the restoration's compute work this worker had carried out before.
        seconds: Of each piece carried out.
        end_s: When the last of them ended, in seconds on the worker's clock since the restoration's target arrived.
        error: Why a later one failed; empty when none did. The restoration is over then.
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


@dataclass(frozen=True, slots=True)
class Unit:
    """Work with what the profile expects it to take, uncorrected."""

    work: ComputeWork
    predicted_s: float


def cut(claim: ComputeClaim, problem: RestoreProblem) -> list[Unit]:
    """One unit per cell of a claim, as compute climbs: it may stop after any of them."""
    units: list[Unit] = []
    claimed = claim.tile
    if claimed is None:
        return units
    for chunk, block in claimed.cells():
        kv_only = claim.kv_only_top and block == claimed.block_hi - 1
        cost_KB = problem.kv_only_KB if kv_only else problem.compute_KB
        tile = Tile(chunk, chunk + 1, block, block + 1)
        work = ComputeWork(tile, restart=claim.restart and not units, kv_only_top=kv_only)
        units.append(Unit(work, float(cost_KB[chunk, block])))
    return units


def join(units: Iterable[Unit]) -> list[Unit]:
    """Join units that continue each other, so that they are carried out in one go."""
    joined: list[Unit] = []
    for unit in units:
        if joined and _continues(joined[-1].work, unit.work):
            last = joined.pop()
            before = last.work.tile
            tile = Tile(before.chunk_lo, before.chunk_hi, before.block_lo, unit.work.tile.block_hi)
            work = replace(unit.work, tile=tile, restart=last.work.restart)
            joined.append(Unit(work, last.predicted_s + unit.predicted_s))
        else:
            joined.append(unit)
    return joined


def _continues(before: ComputeWork, after: ComputeWork) -> bool:
    if before.kv_only_top or before.sends or after.restart or before.tile.chunk_lo != after.tile.chunk_lo:
        return False
    return before.tile.block_hi == after.tile.block_lo
