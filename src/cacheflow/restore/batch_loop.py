"""The compute side of a live batch: one thread that carries out what the scheduler decides, and makes the answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from cacheflow.errors import ConfigError, RestoreCancelled
from cacheflow.plan.grid import Tile
from cacheflow.restore.batch_jobs import Job, Jobs
from cacheflow.restore.batch_pace import DecodePace
from cacheflow.restore.batch_request import BatchOutcome, Prepared
from cacheflow.restore.executor import carry_out
from cacheflow.restore.ports import Ticket
from cacheflow.state.batch import BatchClaim
from cacheflow.state.claims import ClaimKind, ComputeClaim
from cacheflow.state.report import RestoreReport, Span, restoration_report

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Ticket)


class ComputeLoop(Generic[T]):
    """Runs on the executor's compute thread until the batch closes.

    A port that raises ends its own request with the error; others go on.
    """

    def __init__(self, jobs: Jobs[T], pace: DecodePace, *, poll_s: float) -> None:
        """Nothing is done before ``run``; ``poll_s`` is the longest sleep while requests wait for the link."""
        self._jobs, self._pace, self._poll_s = jobs, pace, poll_s

    def run(self) -> None:
        """Work until the batch closes; then every request has ended."""
        try:
            while self._step():
                pass
        except Exception as error:
            logger.exception("the compute loop failed; every request of the batch ends")
            self._end_all(error)

    def _end_all(self, error: Exception) -> None:
        with self._jobs.changed:
            self._jobs.closing = True
        for job in list(self._jobs.by_name.values()):
            self._fail(job, error)

    def _step(self) -> bool:
        """One look around and one piece of work; False when the executor is closing."""
        jobs = self._jobs
        with jobs.changed:
            num_news, closing = jobs.num_news, jobs.closing
            given_up = [job for job in jobs.by_name.values() if closing or job.handle.cancelled]
            admitted = [] if closing else jobs.admit()
        for job in given_up:
            self._fail(job, RestoreCancelled(f"request {job.name} cancelled after {self._age_s(job):.3f} s"))
        if closing:
            return False
        self._prepare([job for job in admitted if job not in given_up])
        self._copy_shared()
        with jobs.changed:
            work = jobs.scheduler.claim_compute(jobs.now_s())
            if work is None and not jobs.decoding:
                jobs.changed.notify_all()
                if jobs.num_news == num_news:
                    jobs.changed.wait(self._poll_s if jobs.by_name else None)
                return True
        if work is None:
            self._decode_round()
        elif work.claim.kind is ClaimKind.DONE:
            self._finish(jobs.by_name[work.request_id])
        else:
            self._compute(jobs.by_name[work.request_id], work)
        return True

    def _age_s(self, job: Job[T]) -> float:
        return self._jobs.now_s() - job.handle.arrival_s

    def _prepare(self, admitted: Sequence[Job[T]]) -> None:
        """Open what requests need, then give them to the scheduler, all at the same moment."""
        ready: list[tuple[Job[T], Prepared[T]]] = []
        for job in admitted:
            with self._jobs.changed:
                running = [*self._jobs.running(but=admitted), *(other.handle for other, _ in ready)]
            try:
                ready.append((job, job.request.prepare(running)))
            except Exception as error:  # noqa: BLE001 -- the request ends with it
                self._fail(job, error)
        refused: list[tuple[Job[T], ConfigError]] = []
        with self._jobs.changed:
            for job, prepared in ready:
                try:
                    self._jobs.start(job, prepared)
                except ConfigError as error:
                    refused.append((job, error))
        for job, refusal in refused:
            self._fail(job, refusal)

    def _copy_shared(self) -> None:
        """Copy what leaders have restored to those who wait for it."""
        with self._jobs.changed:
            served = [job for job in self._jobs.followers() if self._jobs.brought(job)]
        for job in served:
            self._copy_to(job)

    def _copy_to(self, job: Job[T]) -> None:
        assert job.prepared is not None, "a follower was prepared"
        assert job.prepared.follow is not None, "a follower follows"
        try:
            job.prepared.follow.copy()
        except Exception as error:
            logger.exception("request %d: what it shares could not be copied", job.name)
            self._fail(job, error)
            return
        with self._jobs.changed:
            job.follows = None
            self._jobs.scheduler.make_ready(job.name)
            self._jobs.changed.notify_all()

    def _compute(self, job: Job[T], work: BatchClaim) -> None:
        """Carry out one claim, with rounds of decoding between its pieces where they are due."""
        jobs, spans, busy_s = self._jobs, list[Span](), 0.0
        begun_s = jobs.now_s()
        assert job.prepared is not None, "only prepared requests are given to the scheduler"
        pieces = list(_pieces(work.claim)) if jobs.decoding else [work.claim]
        for piece in pieces:
            if jobs.decoding:
                factor = jobs.scheduler.rates.compute_factor
                if self._pace.is_due(jobs.now_s(), next_s=piece.predicted_s * factor):
                    self._decode_round()
            start_s = jobs.now_s()
            try:
                spans += carry_out(piece, job.prepared.compute, jobs.now_s)
            except Exception as error:  # noqa: BLE001 -- the request ends with it
                self._fail(job, error)
                return
            busy_s += jobs.now_s() - start_s
        with jobs.changed:
            restoration = jobs.restoration_of(job)
            restoration.state.complete_compute(work.claim, actual_s=busy_s)
            restoration.note_restored(jobs.now_s())
            restoration.spans.extend(spans)
            jobs.changed.notify_all()
        job.overhead_s += jobs.now_s() - begun_s - busy_s

    def _finish(self, job: Job[T]) -> None:
        """The first token, and whatever of the answer must come at once."""
        jobs, prepared = self._jobs, job.prepared
        assert prepared is not None, "only prepared requests are given to the scheduler"
        try:
            prepared.compute.finish()
            goes_on = prepared.decode is not None and prepared.decode.start()
        except Exception as error:  # noqa: BLE001 -- the request ends with it
            self._fail(job, error)
            return
        now_s = jobs.now_s()
        with jobs.changed:
            jobs.restoration_of(job).note_restored(now_s)
            if not jobs.decoding:
                self._pace.begin(now_s)
            jobs.begin_decoding(job)
            job.token_s.append(now_s)
            report = self._report(job, now_s)
        job.handle.first_token.set_result(report)
        if not goes_on:
            self._end(job)

    def _decode_round(self) -> None:
        """One token for every request that decodes."""
        start_s = self._jobs.now_s()
        for job in list(self._jobs.decoding):
            assert job.prepared is not None, "it has its first token"
            assert job.prepared.decode is not None, "it goes on after its first token"
            try:
                goes_on = job.prepared.decode.step()
            except Exception as error:  # noqa: BLE001 -- the request ends with it
                self._fail(job, error)
                continue
            job.token_s.append(self._jobs.now_s())
            if not goes_on:
                self._end(job)
        self._pace.note_round(start_s, self._jobs.now_s())

    def _end(self, job: Job[T]) -> None:
        """The request has its whole answer; who follows it gets its share first."""
        self._copy_shared()
        arrival_s = job.handle.arrival_s
        outcome = BatchOutcome(
            report=job.handle.first_token.result(),
            admitted_s=job.admitted_s - arrival_s,
            token_s=tuple(each - arrival_s for each in job.token_s),
        )
        with self._jobs.changed:
            self._jobs.leave(job)
        job.handle.ended.set_result(outcome)

    def _fail(self, job: Job[T], error: Exception) -> None:
        """End a request without an answer; those that follow it are planned anew."""
        jobs = self._jobs
        if job.name not in jobs.by_name:
            return
        self._copy_shared_of(job)
        with jobs.changed:
            orphans = _led_by(jobs, job)
            for orphan in orphans:
                jobs.withdraw(orphan)
                orphan.follows = None
            jobs.leave(job)
        for future in (job.handle.first_token, job.handle.ended):
            if not future.done():
                future.set_exception(error)
        if not jobs.closing:
            self._prepare(orphans)

    def _copy_shared_of(self, leader: Job[T]) -> None:
        with self._jobs.changed:
            served = [job for job in self._jobs.followers(leader) if self._jobs.brought(job)]
        for job in served:
            self._copy_to(job)

    def _report(self, job: Job[T], now_s: float) -> RestoreReport:
        """What the restoration did, in seconds from the request's arrival."""
        restoration, arrival_s = self._jobs.restoration_of(job), job.handle.arrival_s
        restored_at_s = now_s if restoration.restored_at_s is None else restoration.restored_at_s
        grid = restoration.state.problem.grid
        return restoration_report(
            restoration.state,
            restore_s=restored_at_s - arrival_s if grid.num_chunks else 0.0,
            ttft_s=now_s - arrival_s if grid.suffix_ends else None,
            overhead_s=job.overhead_s,
            spans=[
                replace(span, start_s=span.start_s - arrival_s, end_s=span.end_s - arrival_s)
                for span in restoration.spans
            ],
        )


def _led_by(jobs: Jobs[T], leader: Job[T]) -> list[Job[T]]:
    """Those that follow a request, and those that follow them, in the order of submission."""
    led = [leader]
    for job in led:
        led += jobs.followers(job)
    return sorted(led[1:], key=lambda job: job.name)


def _pieces(claim: ComputeClaim) -> Iterator[ComputeClaim]:
    """The same work, one block of one chunk at a time: equal bits, but something else may run in between."""
    if claim.tile is None:
        num_blocks = claim.block_hi - claim.block_lo
        for block in range(claim.block_lo, claim.block_hi):
            yield replace(claim, block_lo=block, block_hi=block + 1, predicted_s=claim.predicted_s / num_blocks)
        return
    tile = claim.tile
    for chunk, block in tile.cells():
        yield replace(
            claim,
            tile=Tile(chunk, chunk + 1, block, block + 1),
            restart=claim.restart and (chunk, block) == (tile.chunk_lo, tile.block_lo),
            kv_only_top=claim.kv_only_top and block == tile.block_hi - 1,
            predicted_s=claim.predicted_s / tile.num_cells,
        )
