"""The virtual driver: one compute resource and one link that carry out, in virtual time, what a scheduler decides.

The twin of ``restore.executor`` under another clock: the same scheduler and state machines, asked whenever compute or
the link is free. A variation (a pipeline stage, a test that breaks things) overrides what it does otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

from cacheflow.plan.grid import Boundary, Piece, Tile
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import Span, SpanKind
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchClaim, BatchRead, BatchScheduler
from cacheflow.state.compute_side import ClaimKind, ComputeClaim
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

READS_IN_FLIGHT = 3
"""As the live executor keeps them. With 1 a read stands for many small ones: see ``SimulatedLink.read``."""


class Compute(Protocol):
    """The compute resource: carries out one piece of work at a time, maybe with work of its own in between."""

    def acquire(self) -> bool:
        """Whether work may start now; when it may not, the owner of the resource says when it may."""
        ...

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """Carry out so many seconds of work, then call back."""
        ...

    def leave(self) -> None:
        """There is no work now."""
        ...


class BareCompute:
    """Takes as long as the work says."""

    def __init__(self, loop: EventLoop) -> None:
        """Start idle."""
        self._loop = loop

    def acquire(self) -> bool:
        """Always."""
        return True

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """See ``Compute``."""
        self._loop.at(self._loop.now_s + seconds, done, priority=1)

    def leave(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """When a request had what.

    Attributes:
        request_id: Whose.
        arrival_s: When it was submitted.
        restored_at_s: When its last prefix cell was there.
        first_token_at_s: When its first token was there; equals ``restored_at_s`` without new tokens.
        loaded_bytes: Bytes that were read and used.
        wasted_bytes: Bytes that were read and not used, those of reads still under way at its end included.
        moved_bytes: Bytes of cells whose reads had ended when compute had nothing left to do, used or not.
        spans: What its compute and its link did; empty where that is not recorded.
    """

    request_id: int
    arrival_s: float
    restored_at_s: float
    first_token_at_s: float
    loaded_bytes: int = 0
    wasted_bytes: int = 0
    moved_bytes: int = 0
    spans: tuple[Span, ...] = field(default=(), repr=False)


@dataclass(slots=True)
class _Job:
    truth: RestoreProblem
    arrival_s: float
    done: Callable[[RequestTimes], None]
    restored_at_s: float | None = None
    asked_bytes: int = 0
    loaded_bytes: int = 0
    moved_bytes: int = 0
    ending: bool = False
    spans: list[Span] = field(default_factory=list)


class VirtualDevice:
    """Asks the scheduler for work whenever compute or the link is free.

    Attributes:
        records: Whether spans of everything are kept.
        compute_busy_s: Seconds compute has worked.
    """

    records: ClassVar[bool] = False

    def __init__(
        self,
        loop: EventLoop,
        scheduler: BatchScheduler,
        link: SimulatedLink,
        *,
        reads_in_flight: int = READS_IN_FLIGHT,
        compute: Compute | None = None,
        link_of: Callable[[int, int], SimulatedLink] | None = None,
    ) -> None:
        """Start idle.

        Args:
            loop: The virtual clock.
            scheduler: Decides; no other device may use it.
            link: May be shared with other devices.
            reads_in_flight: Reads asked of links at once.
            compute: Carries out work; bare unless given.
            link_of: Where the bytes of a request's chunk come from; ``link`` unless given.
        """
        self._loop, self._scheduler = loop, scheduler
        self._link_of = link_of or (lambda request_id, chunk: link)
        self._depth = reads_in_flight
        self._compute = compute or BareCompute(loop)
        self._jobs: dict[int, _Job] = {}
        self._computing = False
        self._num_reads = 0
        self.compute_busy_s = 0.0

    def submit(
        self,
        request_id: int,
        problem: RestoreProblem,
        done: Callable[[RequestTimes], None],
        *,
        truth: RestoreProblem | None = None,
        first_token_due_s: float | None = None,
        arrival_s: float | None = None,
    ) -> None:
        """Restore a request and run its new tokens.

        Args:
            request_id: Its name.
            problem: What the scheduler believes it costs.
            done: Called when its first token is there.
            truth: What it really costs; as believed unless given.
            first_token_due_s: When its first token should be there.
            arrival_s: When it came, if it has waited elsewhere since.
        """
        arrival_s = self._loop.now_s if arrival_s is None else arrival_s
        self._jobs[request_id] = _Job(truth or problem, arrival_s, done)
        self._scheduler.add(request_id, problem, arrival_s=arrival_s, first_token_due_s=first_token_due_s)
        self.pump()

    def adopt(
        self,
        request_id: int,
        state: RestoreState,
        done: Callable[[RequestTimes], None],
        *,
        truth: RestoreProblem | None = None,
    ) -> None:
        """Carry out a restoration that was planned already; it waits for ``pump``."""
        self._jobs[request_id] = _Job(truth or state.problem, self._loop.now_s, done)
        self._scheduler.adopt(request_id, state, arrival_s=self._loop.now_s)

    # What a variation overrides.

    def seconds(self, truth: RestoreProblem, claim: ComputeClaim) -> float:
        """What a claim takes."""
        return true_s(truth, claim)

    def claimed(self, request_id: int, claim: ComputeClaim) -> None:
        """Compute begins a claim, or has ended the last one (``DONE``)."""

    def computed(self, request_id: int, claim: ComputeClaim) -> None:
        """Compute has ended a claim."""

    def outcome(self, request_id: int, piece: Piece) -> LoadOutcome:
        """How a read that has moved its bytes ends."""
        return LoadOutcome.OK

    # The loop.

    def pump(self) -> None:
        """Give compute and the link what there is to do."""
        self._start_reads()
        if not self._computing and self._compute.acquire():
            self._start_compute()
            self._start_reads()  # compute may have left cells to the link

    def _start_compute(self) -> None:
        work = self._scheduler.claim_compute(self._loop.now_s)
        if work is None:
            self._compute.leave()
            return
        job = self._jobs[work.request_id]
        self.claimed(work.request_id, work.claim)
        if work.claim.kind is ClaimKind.DONE:
            seconds, job.ending = job.truth.head_s, True
            self._note_restored(work.request_id)
        else:
            seconds = self.seconds(job.truth, work.claim)
        self._computing = True
        self.compute_busy_s += seconds
        self._compute.run(seconds, partial(self._end_compute, work, seconds))

    def _end_compute(self, work: BatchClaim, seconds: float) -> None:
        self._computing = False
        request_id, claim = work.request_id, work.claim
        if claim.kind is ClaimKind.DONE:
            self._end_job(request_id)
        else:
            self._scheduler.state(request_id).complete_compute(claim, actual_s=seconds)
            if self.records:
                self._jobs[request_id].spans.append(self._span(claim, seconds))
            if claim.tile is not None:
                self._note_restored(request_id)
            self.computed(request_id, claim)
        self.pump()

    def _span(self, claim: ComputeClaim, seconds: float) -> Span:
        tile = claim.tile or Tile(0, 1, claim.block_lo, claim.block_hi)
        kind = claim.span_kind(tile, kv_only=claim.kv_only_top and tile.num_cells == 1)
        return Span.of_compute(kind, tile, self._loop.now_s - seconds, self._loop.now_s)

    def _end_job(self, request_id: int) -> None:
        self._note_restored(request_id)
        self._scheduler.remove(request_id)
        job, now_s = self._jobs.pop(request_id), self._loop.now_s
        job.done(
            RequestTimes(
                request_id=request_id,
                arrival_s=job.arrival_s,
                restored_at_s=now_s if job.restored_at_s is None else job.restored_at_s,
                first_token_at_s=now_s,
                loaded_bytes=job.loaded_bytes,
                wasted_bytes=job.asked_bytes - job.loaded_bytes,
                moved_bytes=job.moved_bytes,
                spans=tuple(job.spans),
            )
        )

    def _note_restored(self, request_id: int) -> None:
        job = self._jobs[request_id]
        if job.restored_at_s is None and self._scheduler.state(request_id).restored:
            job.restored_at_s = self._loop.now_s

    def _start_reads(self) -> None:
        while self._num_reads < self._depth:
            read = self._scheduler.claim_read(self._loop.now_s)
            if read is None:
                return
            job = self._jobs[read.request_id]
            num_bytes = true_bytes(job.truth, read.piece)
            job.asked_bytes += num_bytes
            self._num_reads += 1
            link = self._link_of(read.request_id, read.piece.chunk)
            link.read(num_bytes, partial(self._end_read, read, num_bytes), follows=self._depth == 1)

    def _end_read(self, read: BatchRead, num_bytes: int, busy_s: float) -> None:
        self._num_reads -= 1
        # A request may have its first token before a read that compute overtook has ended.
        job = self._jobs.get(read.request_id)
        if job is not None:
            self._settle(job, read, num_bytes, busy_s)
            self._note_restored(read.request_id)
        self.pump()

    def _settle(self, job: _Job, read: BatchRead, num_bytes: int, busy_s: float) -> None:
        state, piece = self._scheduler.state(read.request_id), read.piece
        outcome = self.outcome(read.request_id, piece)
        if outcome is not LoadOutcome.OK:
            state.fail_load(piece, outcome)
            return
        state.rates.observe_load(num_bytes=num_bytes, busy_s=busy_s)
        wanted = state.begin_place(piece)
        if wanted:
            state.complete_load(piece, self._loop.now_s)
            job.loaded_bytes += num_bytes
        if job.ending:
            return
        if not isinstance(piece, Boundary):
            job.moved_bytes += num_bytes
        if self.records:
            kind = SpanKind.LOAD if wanted else SpanKind.WASTED
            job.spans.append(Span.of_read(kind, piece, self._loop.now_s - busy_s, self._loop.now_s))


class RecordingDevice(VirtualDevice):
    """One that keeps spans of everything."""

    records = True


def true_bytes(truth: RestoreProblem, piece: Piece) -> int:
    """Bytes a read moves by these costs."""
    if isinstance(piece, Boundary):
        return int(truth.boundary_bytes_K[piece.chunk])
    return int(truth.load_bytes_KB[piece])


def true_s(truth: RestoreProblem, claim: ComputeClaim) -> float:
    """Seconds a claim takes by these costs, the first token's head left out."""
    if claim.tile is None:
        return float(truth.suffix_B[claim.block_lo : claim.block_hi].sum())
    total_s = 0.0
    for chunk, block in claim.tile.cells():
        kv_only = claim.kv_only_top and block == claim.tile.block_hi - 1
        total_s += float((truth.kv_only_KB if kv_only else truth.compute_KB)[chunk, block])
    return total_s
