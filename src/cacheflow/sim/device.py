"""One compute resource and one link that carry out what a batch scheduler decides, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cacheflow.plan.problem import RestoreProblem
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.link import SimulatedLink
from cacheflow.state.batch import BatchClaim, BatchLoad, BatchScheduler
from cacheflow.state.claims import ClaimKind, ComputeClaim

READS_IN_FLIGHT = 3
"""As the live executor keeps them. With 1 a read stands for many small ones: see ``SimulatedLink.read``."""


class Compute(Protocol):
    """The compute resource: carries out one order at a time, maybe with work of its own in between."""

    def acquire(self) -> bool:
        """Whether an order may start now; when it may not, whoever owns the resource says when it may."""
        ...

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """Carry out an order of so many seconds, then call back."""
        ...

    def leave(self) -> None:
        """There is no order now."""
        ...


class BareCompute:
    """Takes as long as the order says."""

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
class Restored:
    """When a request had what.

    Attributes:
        request_id: Whose.
        arrival_s: When it was submitted.
        restored_at_s: When its last prefix cell was there.
        first_token_at_s: When its first token was there; equals ``restored_at_s`` without new tokens.
        loaded_bytes: Bytes that were read and used.
        wasted_bytes: Bytes that were read in vain, those of reads still under way at its end included.
    """

    request_id: int
    arrival_s: float
    restored_at_s: float
    first_token_at_s: float
    loaded_bytes: int = 0
    wasted_bytes: int = 0


@dataclass(slots=True)
class _Job:
    truth: RestoreProblem
    arrival_s: float
    done: Callable[[Restored], None]
    restored_at_s: float | None = None
    asked_bytes: int = 0
    loaded_bytes: int = 0


class SimulatedDevice:
    """Asks the scheduler for work whenever compute or the link is free.

    Attributes:
        compute_busy_s: Seconds compute has worked.
    """

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
            compute: Carries out orders; bare unless given.
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
        done: Callable[[Restored], None],
        *,
        truth: RestoreProblem | None = None,
        deadline_s: float | None = None,
        arrival_s: float | None = None,
    ) -> None:
        """Restore a request and run its new tokens.

        Args:
            request_id: Its name.
            problem: What the scheduler believes it costs.
            done: Called when its first token is there.
            truth: What it really costs; as believed unless given.
            deadline_s: When its first token should be there.
            arrival_s: When it came, if it has waited elsewhere since.
        """
        arrival_s = self._loop.now_s if arrival_s is None else arrival_s
        self._jobs[request_id] = _Job(truth or problem, arrival_s, done)
        self._scheduler.add(request_id, problem, arrival_s=arrival_s, deadline_s=deadline_s)
        self.pump()

    def pump(self) -> None:
        """Give compute and the link what there is to do."""
        self._start_reads()
        if not self._computing and self._compute.acquire():
            self._start_compute()
            self._start_reads()

    def _start_compute(self) -> None:
        work = self._scheduler.claim_compute(self._loop.now_s)
        if work is None:
            self._compute.leave()
            return
        truth = self._jobs[work.request_id].truth
        seconds = true_s(truth, work.claim)
        if work.claim.kind is ClaimKind.DONE:
            seconds = truth.head_s
            self._note_restored(work.request_id)
        self._computing = True
        self.compute_busy_s += seconds
        self._compute.run(seconds, partial(self._end_compute, work, seconds))

    def _end_compute(self, work: BatchClaim, seconds: float) -> None:
        self._computing = False
        if work.claim.kind is ClaimKind.DONE:
            self._end_job(work.request_id)
        else:
            self._scheduler.state(work.request_id).complete_compute(work.claim, actual_s=seconds)
            if work.claim.tile is not None:
                self._note_restored(work.request_id)
        self.pump()

    def _end_job(self, request_id: int) -> None:
        self._note_restored(request_id)
        self._scheduler.remove(request_id)
        job, now_s = self._jobs.pop(request_id), self._loop.now_s
        restored_at_s = now_s if job.restored_at_s is None else job.restored_at_s
        job.done(
            Restored(
                request_id=request_id,
                arrival_s=job.arrival_s,
                restored_at_s=restored_at_s,
                first_token_at_s=now_s,
                loaded_bytes=job.loaded_bytes,
                wasted_bytes=job.asked_bytes - job.loaded_bytes,
            )
        )

    def _note_restored(self, request_id: int) -> None:
        job = self._jobs[request_id]
        if job.restored_at_s is None and self._scheduler.state(request_id).restored:
            job.restored_at_s = self._loop.now_s

    def _start_reads(self) -> None:
        while self._num_reads < self._depth:
            load = self._scheduler.claim_load(self._loop.now_s)
            if load is None:
                return
            job, chunk = self._jobs[load.request_id], load.tile.chunk_lo
            num_bytes = int(
                job.truth.boundary_bytes_K[chunk]
                if load.boundary
                else job.truth.load_bytes_KB[chunk, load.tile.block_lo]
            )
            job.asked_bytes += num_bytes
            self._num_reads += 1
            self._link_of(load.request_id, chunk).read(
                num_bytes, partial(self._end_read, load, num_bytes), follows=self._depth == 1
            )

    def _end_read(self, load: BatchLoad, num_bytes: int, busy_s: float) -> None:
        self._num_reads -= 1
        # A request may have its first token before a read that compute overtook is through.
        if load.request_id in self._jobs:
            state = self._scheduler.state(load.request_id)
            state.rates.observe_load(num_bytes=num_bytes, busy_s=busy_s)
            if load.boundary:
                state.boundary.complete(load.tile.chunk_lo, self._loop.now_s)
                self._jobs[load.request_id].loaded_bytes += num_bytes
            elif state.begin_place(load.tile):
                state.complete_load(load.tile)
                self._jobs[load.request_id].loaded_bytes += num_bytes
            self._note_restored(load.request_id)
        self.pump()


def true_s(truth: RestoreProblem, claim: ComputeClaim) -> float:
    """Seconds a claim takes by these costs, the first token's head left out."""
    if claim.tile is None:
        return float(truth.suffix_B[claim.block_lo : claim.block_hi].sum())
    total_s = 0.0
    for chunk, block in claim.tile.cells():
        kv_only = claim.kv_only_top and block == claim.tile.block_hi - 1
        total_s += float((truth.kv_only_KB if kv_only else truth.compute_KB)[chunk, block])
    return total_s
