"""The compute side of live restorations: carries out what the scheduler decides, and makes the answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from cacheflow.errors import ConfigError, RestoreCancelled
from cacheflow.plan.grid import Tile
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import Span, SpanKind
from cacheflow.restore.batch import BatchOutcome, Prepared
from cacheflow.restore.decode_pace import DecodePace
from cacheflow.restore.hand_over import recompute
from cacheflow.restore.jobs import Job, Jobs, LiveRestoration
from cacheflow.restore.launch_queue import LaunchQueue, recorder_of
from cacheflow.restore.ports import ComputePort, Ticket
from cacheflow.restore.reads import Reads
from cacheflow.restore.work import ComputeWork, cut, join
from cacheflow.state.compute_side import ClaimKind, ComputeClaim

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Ticket)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked(Generic[T]):
    """A piece that a device was asked for, of a restoration."""

    restoration: LiveRestoration[T]
    kind: SpanKind
    tile: Tile
    predicted_s: float


class ComputeLoop(Generic[T]):
    """Everything that touches a model, on the thread that calls ``run`` or ``step``.

    A port that raises ends its own request with the error; others go on. Where a device works on after a call, what was
    asked counts as done at once, because it is done in sequence, and its seconds are noted when it has been done.
    """

    def __init__(self, jobs: Jobs[T], reads: Reads[T], pace: DecodePace, *, poll_s: float) -> None:
        """Nothing is done before ``run``; ``poll_s`` is the longest sleep while requests wait for the link."""
        self._jobs, self._reads, self._pace, self._poll_s = jobs, reads, pace, poll_s
        self._queue: LaunchQueue[_Asked[T]] = LaunchQueue()

    def run(self) -> None:
        """Work until the batch closes; then every request has ended."""
        try:
            while self.step():
                pass
        except Exception as error:
            logger.exception("the compute loop failed; every request of the batch ends")
            self._jobs.close()
            for job in list(self._jobs.by_name.values()):
                self._fail(job, error)

    def step(self) -> bool:
        """One look around and what it finds to do; False once the batch is closing and every request has ended."""
        jobs, work = self._jobs, None
        begun_s = jobs.now_s()
        with jobs.changed:
            closing = jobs.closing
            given_up = [job for job in jobs.by_name.values() if closing or job.handle.cancelled]
            ends = closing or bool(given_up)
            admitted = [] if ends else jobs.admit()
            served = [] if ends else jobs.served()
            # What ends requests or lets them begin comes before work: it may change who is served first.
            changes = ends or bool(admitted or served)
            if not changes:
                work = jobs.scheduler.claim_compute(begun_s)
            if not changes and work is None and not jobs.decoding:
                jobs.changed.notify_all()
                jobs.changed.wait(self._poll_s if jobs.by_name else None)
                return True
        for job in given_up:
            age_s = jobs.now_s() - job.handle.arrival_s
            self._fail(job, RestoreCancelled(f"request {job.name} cancelled after {age_s:.3f} s"))
        if admitted:
            self._prepare(admitted)
        self._copy(served)
        if work is not None and work.claim.kind is ClaimKind.DONE:
            self._finish(jobs.by_name[work.request_id])
        elif work is not None:
            self._compute(jobs.by_name[work.request_id], work.claim, begun_s)
        elif not changes:
            self._decode_round()
        return not closing

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
        if ready:
            self._reads.wake()

    def _copy_shared(self, leader: Job[T] | None = None) -> None:
        """Copy what leaders, or one of them, have restored to those who wait for it."""
        with self._jobs.changed:
            served = self._jobs.served(leader)
        self._copy(served)

    def _copy(self, served: Sequence[Job[T]]) -> None:
        for job in served:
            follow = job.ready.follow
            assert follow is not None, "a follower follows"
            try:
                follow.copy()
            except Exception as error:
                logger.exception("request %d: what it shares could not be copied", job.name)
                self._fail(job, error)
                continue
            with self._jobs.changed:
                job.follows = None
                self._jobs.scheduler.make_ready(job.name)
                self._jobs.changed.notify_all()

    def _compute(self, job: Job[T], claim: ComputeClaim, begun_s: float) -> None:
        """Carry out one claim, with rounds of decoding between its pieces where they are due."""
        jobs, spans, busy_s = self._jobs, list[Span](), 0.0
        port = job.ready.compute
        record = recorder_of(port)
        with jobs.changed:
            restoration = jobs.restoration_of(job)
        if claim.tile is not None:
            # Taken back from the link: the store, and what is read next, need not wait for them.
            self._reads.drop(restoration, frozenset(claim.tile.cells()))
        for tile, work, predicted_s in _pieces(claim, job.ready.problem, whole=not jobs.decoding):
            if jobs.decoding:
                factor = jobs.scheduler.rates.compute_factor
                if self._pace.is_due(jobs.now_s(), next_s=predicted_s * factor):
                    self._decode_round()
            start_s = jobs.now_s()
            kind = claim.span_kind(tile, kv_only=work is not None and work.kv_only_top)
            carry_out = partial(_carry_out, port, tile, work)
            try:
                if record is not None:
                    asked = _Asked(restoration, kind, tile, predicted_s)
                    expected_s = predicted_s * jobs.scheduler.rates.compute_factor
                    self._queue.launch(asked, record, carry_out, expected_s=expected_s, now_s=start_s)
                else:
                    carry_out()
            except Exception as error:  # noqa: BLE001 -- the request ends with it
                self._fail(job, error)
                return
            end_s = jobs.now_s()
            if record is None:
                spans.append(Span.of_compute(kind, tile, start_s, end_s))
            busy_s += end_s - start_s
        with jobs.changed:
            if record is not None:
                restoration.state.assume_compute(claim, start_s)
                self._note_ended()
            else:
                restoration.state.complete_compute(claim, actual_s=busy_s)
            restoration.note_restored(jobs.now_s())
            restoration.spans.extend(spans)
            jobs.changed.notify_all()
        job.overhead_s += jobs.now_s() - begun_s - busy_s

    def _note_ended(self) -> None:
        """Note what the device has done since the last call; with the lock held."""
        for ended in self._queue.take_ended():
            asked, seconds = ended.what, ended.end_s - ended.start_s
            restoration = asked.restoration
            restoration.state.note_computed(ended.end_s, predicted_s=asked.predicted_s, actual_s=seconds)
            restoration.spans.append(Span.of_compute(asked.kind, asked.tile, ended.start_s, ended.end_s))
            if asked.kind is not SpanKind.SUFFIX and restoration.restored_at_s is not None:
                restoration.restored_at_s = max(restoration.restored_at_s, ended.end_s)

    def _finish(self, job: Job[T]) -> None:
        """The first token, and whatever of the answer must come at once."""
        jobs, prepared = self._jobs, job.ready
        try:
            prepared.compute.finish()
            goes_on = prepared.decode is not None and prepared.decode.start()
        except Exception as error:  # noqa: BLE001 -- the request ends with it
            self._fail(job, error)
            return
        now_s = jobs.now_s()
        with jobs.changed:
            restoration = jobs.restoration_of(job)
            restoration.note_restored(now_s)
            self._note_ended()
            if not jobs.decoding:
                self._pace.begin(now_s)
            jobs.begin_decoding(job)
            job.token_s.append(now_s)
            report = job.report(now_s)
        self._reads.drop(restoration)
        job.handle.first_token.set_result(report)
        if not goes_on:
            self._end(job)

    def _decode_round(self) -> None:
        """One token for every request that decodes."""
        start_s = self._jobs.now_s()
        for job in list(self._jobs.decoding):
            decode = job.ready.decode
            assert decode is not None, "it goes on after its first token"
            try:
                goes_on = decode.step()
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
        self._leave(job)
        job.handle.ended.set_result(outcome)

    def _fail(self, job: Job[T], error: Exception) -> None:
        """End a request without an answer; those that follow it are planned anew."""
        jobs = self._jobs
        if job.name not in jobs.by_name:
            return
        self._copy_shared(job)
        with jobs.changed:
            orphans = _led_by(jobs, job)
        for orphan in orphans:
            self._withdraw(orphan)
            orphan.follows = None
        self._leave(job)
        for future in (job.handle.first_token, job.handle.ended):
            if not future.done():
                future.set_exception(error)
        if not jobs.closing:
            self._prepare(orphans)

    def _leave(self, job: Job[T]) -> None:
        self._withdraw(job)
        with self._jobs.changed:
            self._jobs.leave(job)

    def _withdraw(self, job: Job[T]) -> None:
        """On return no read touches the request's buffer any more."""
        with self._jobs.changed:
            restoration = self._jobs.withdraw(job)
        if restoration is not None:
            self._reads.drop(restoration)


def _carry_out(port: ComputePort, tile: Tile, work: ComputeWork | None) -> None:
    if work is None:
        port.run_suffix(tile.block_lo, tile.block_hi)
    else:
        recompute(port, work)


_Part = tuple[Tile, ComputeWork | None, float]
"""What is carried out in one go: a tile one chunk wide, its work (None for the suffix through the tile's blocks), and
the seconds it should take, uncorrected."""


def _pieces(claim: ComputeClaim, problem: RestoreProblem, *, whole: bool) -> Iterator[_Part]:
    """A claim in as few pieces as possible, or one block of one chunk at a time: equal bits either way."""
    tile = claim.tile
    if tile is None:
        step = claim.block_hi - claim.block_lo if whole else 1
        for block in range(claim.block_lo, claim.block_hi, step):
            yield Tile(0, 1, block, block + step), None, float(problem.suffix_B[block : block + step].sum())
    elif whole and tile.chunk_hi == tile.chunk_lo + 1:
        yield tile, ComputeWork(tile, restart=claim.restart, kv_only_top=claim.kv_only_top), claim.predicted_s
    else:
        units = cut(claim, problem)
        for unit in join(units) if whole else units:
            yield unit.work.tile, unit.work, unit.predicted_s


def _led_by(jobs: Jobs[T], leader: Job[T]) -> list[Job[T]]:
    """Those that follow a request, and those that follow them, in the order of submission."""
    led = [leader]
    for job in led:
        led += jobs.followers(job)
    return sorted(led[1:], key=lambda job: job.name)
