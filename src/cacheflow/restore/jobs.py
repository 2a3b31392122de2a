"""The requests of a live batch, and the lock that guards them: what the compute loop and the I/O thread share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

from cacheflow.errors import ConfigError
from cacheflow.plan.batch import WaitingRequest
from cacheflow.plan.remaining import remaining_of
from cacheflow.plan.report import RestoreReport, Span, SpanKind
from cacheflow.restore.batch import BatchHandle, BatchRequest, Prepared
from cacheflow.restore.leaders_first import LeadersFirst
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import Ticket, TransferPort
from cacheflow.restore.reads import Read
from cacheflow.state.batch import Admission, BatchScheduler
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

T = TypeVar("T", bound=Ticket)


class LiveRestoration(Generic[T]):
    """One restoration as both threads see it, and the owner of its reads; guarded by the lock of its ``Jobs``.

    Attributes:
        state: Its state machine.
        transfer: Reads its cells.
        spans: What was done by compute and by the link, on the batch's clock.
        restored_at_s: When the last cell became resident; None before.
    """

    __slots__ = ("_origin_s", "restored_at_s", "spans", "state", "transfer")

    def __init__(self, state: RestoreState, transfer: TransferPort[T], *, origin_s: float) -> None:
        """Start with nothing done; the batch's clock began at ``origin_s`` of the reads' clock."""
        self.state, self.transfer = state, transfer
        self.spans: list[Span] = []
        self.restored_at_s: float | None = None
        self._origin_s = origin_s

    def note_restored(self, now_s: float) -> None:
        """Remember when the last cell became resident; called after every completion."""
        if self.restored_at_s is None and self.state.restored:
            self.restored_at_s = now_s

    def begin_place(self, read: Read[T]) -> bool:
        """See ``ReadOwner``."""
        wanted = self.state.begin_place(read.piece)
        self.state.observe_read(read.piece, num_bytes=read.num_bytes, busy_s=read.busy_s, sample=read.sample)
        self._note(read, SpanKind.LOAD if wanted else SpanKind.WASTED)
        return wanted

    def end_place(self, read: Read[T], *, now_s: float, failed: bool) -> None:
        """See ``ReadOwner``."""
        if failed:
            self.state.fail_place(read.piece)
            return
        self.state.complete_load(read.piece, now_s - self._origin_s)
        self.note_restored(now_s - self._origin_s)

    def fail_read(self, read: Read[T], outcome: LoadOutcome) -> None:
        """See ``ReadOwner``."""
        self.state.fail_load(read.piece, outcome)
        self._note(read, SpanKind.FAILED)

    def drop_read(self, read: Read[T]) -> None:
        """See ``ReadOwner``: compute restores the cell, or the restoration is over.

        A read that is overdue has told how slow the link is, and must not be forgotten with it.
        """
        if read.busy_s * self.state.rates.bytes_per_s > self.state.num_bytes(read.piece):
            self.state.observe_read(read.piece, num_bytes=read.num_bytes, busy_s=read.busy_s)
        self.state.waste_load(read.piece)

    def _note(self, read: Read[T], kind: SpanKind) -> None:
        end_s = read.end_s - self._origin_s
        self.spans.append(Span.of_read(kind, read.piece, end_s - read.busy_s, end_s))


class Job(Generic[T]):
    """One request; written by the compute thread under the lock.

    Attributes:
        handle: What its submitter holds.
        request: What was asked for.
        prepared: What it runs on; None while it waits for memory.
        restoration: Its restoration as the I/O thread sees it; None until the scheduler has started it.
        follows: It waits for what another request restores.
        seen_cells: Leading cells of the leader that were seen to be there.
        admitted_s: When there was room for it.
        token_s: When its tokens were there.
        overhead_s: Seconds the compute thread spent on it outside its ports.
    """

    __slots__ = (
        "admitted_s", "follows", "handle", "overhead_s", "prepared", "request", "restoration", "seen_cells", "token_s",
    )  # fmt: skip

    def __init__(self, handle: BatchHandle, request: BatchRequest[T]) -> None:
        """Wait for memory."""
        self.handle, self.request = handle, request
        self.prepared: Prepared[T] | None = None
        self.restoration: LiveRestoration[T] | None = None
        self.follows: Job[T] | None = None
        self.seen_cells = 0
        self.admitted_s = 0.0
        self.token_s: list[float] = []
        self.overhead_s = 0.0

    @property
    def name(self) -> int:
        """Its name in the batch."""
        return self.handle.request_id

    @property
    def ready(self) -> Prepared[T]:
        """What it runs on, of a request that was given to the scheduler."""
        assert self.prepared is not None, "only prepared requests are given to the scheduler"
        return self.prepared

    def report(self, now_s: float) -> RestoreReport:
        """What its restoration did, in seconds from the request's arrival, when its first token is there."""
        restoration, arrival_s = self.restoration, self.handle.arrival_s
        assert restoration is not None, "a request that has its first token was restored"
        grid = restoration.state.problem.grid
        restored_at_s = restoration.restored_at_s
        if restored_at_s is None or not grid.suffix_ends:
            restored_at_s = now_s  # without new tokens a device may still be at work when its cells count as resident
        return restoration.state.report(
            restore_s=restored_at_s - arrival_s if grid.num_chunks else 0.0,
            ttft_s=now_s - arrival_s if grid.suffix_ends else None,
            overhead_s=self.overhead_s,
            planning_s=self.ready.planning_s,
            spans=[span.shifted(-arrival_s) for span in restoration.spans],
        )


class Jobs(Generic[T]):
    """Every request that has not ended; the source of the I/O thread's reads.

    Attributes:
        changed: Guards everything here, the scheduler and its states; held only around calls into them.
        scheduler: Decides.
        by_name: All requests, in the order of submission.
        decoding: Those that have their first token.
        closing: No request is taken any more.
    """

    def __init__(self, scheduler: BatchScheduler, admission: Admission, options: ExecutorOptions) -> None:
        """Start empty, at second 0."""
        self.changed = threading.Condition()
        self.scheduler, self._admission, self._options = scheduler, admission, options
        scheduler.policy = LeadersFirst(scheduler.policy, self._leader_of)
        self.by_name: dict[int, Job[T]] = {}
        self.decoding: list[Job[T]] = []
        self.closing = False
        self._waiting: list[Job[T]] = []
        self._num_named = 0
        self._link_closed = False
        self._origin_s = options.clock()

    def now_s(self) -> float:
        """Seconds since the batch was opened."""
        return self._options.clock() - self._origin_s

    def submit(self, requests: Sequence[BatchRequest[T]]) -> list[BatchHandle]:
        """Take requests in at the same moment, in this order; they wait for memory.

        Raises:
            PromptError: One of them needs more memory than there is; none was taken in.
            ConfigError: The batch is closed.
        """
        with self.changed:
            if self.closing:
                raise ConfigError("the batch is closed; open another one")
            for request in requests:
                self._admission.check(request.num_tokens)
            arrival_s, handles = self.now_s(), []
            for request in requests:
                handle = BatchHandle(self._num_named, arrival_s, tag=request.tag, on_cancel=self.tell)
                self._num_named += 1
                if request.on_end is not None:
                    handle.ended.add_done_callback(request.on_end)
                job = Job(handle, request)
                self._admission.ask(job.name, request.num_tokens, arrival_s=arrival_s)
                self.by_name[job.name] = job
                self._waiting.append(job)
                handles.append(handle)
            self.tell()
        return handles

    def tell(self) -> None:
        """Have the compute thread look around."""
        with self.changed:
            self.changed.notify_all()

    def close(self) -> None:
        """Take no more requests, and have the compute thread end those that are there."""
        with self.changed:
            self.closing = True
            self.tell()

    def admit(self) -> list[Job[T]]:
        """Those for whom there is room now, in the policy's order; with the lock held."""
        if not self._waiting:
            return []
        now_s, rates = self.now_s(), self.scheduler.rates
        requests = [
            WaitingRequest(
                request_id=job.name,
                arrival_s=job.handle.arrival_s,
                remaining=remaining_of(
                    job.request.problem, compute_factor=rates.compute_factor, bytes_per_s=rates.bytes_per_s
                ),
                first_token_due_s=self._first_token_due_s(job),
            )
            for job in self._waiting
        ]
        ranking = self.scheduler.policy.rank(now_s, requests)
        admitted = [self.by_name[name] for name in self._admission.admit(ranking.compute, now_s)]
        for job in admitted:
            self._waiting.remove(job)
            job.admitted_s = now_s
        return admitted

    def start(self, job: Job[T], prepared: Prepared[T]) -> None:
        """Give a request to the scheduler; with the lock held.

        Raises:
            ConfigError: It wants more of its leader than that restores.
        """
        follow = prepared.follow
        leader = self.by_name.get(follow.leader.request_id) if follow else None
        restores = leader.prepared.problem.grid.num_chunks if leader and leader.prepared else 0
        if follow is not None and (leader is None or follow.num_chunks > restores):
            raise ConfigError(
                f"request {job.name} wants {follow.num_chunks} chunks of request {follow.leader.request_id}, "
                f"which restores {restores}"
            )
        job.prepared, job.seen_cells, job.follows = prepared, 0, leader
        arrival_s, due_s = job.handle.arrival_s, self._first_token_due_s(job)
        if prepared.state is not None:
            self.scheduler.adopt(job.name, prepared.state, arrival_s=arrival_s, first_token_due_s=due_s)
        else:
            problem, ready = prepared.problem, follow is None
            self.scheduler.add(job.name, problem, arrival_s=arrival_s, first_token_due_s=due_s, ready=ready)
        if self._link_closed:
            self.restoration_of(job)
        self.changed.notify_all()

    def withdraw(self, job: Job[T]) -> LiveRestoration[T] | None:
        """Take a request from the scheduler; with the lock held. Its reads are to be dropped."""
        if job.prepared is not None and job not in self.decoding:
            self.scheduler.remove(job.name)
        restoration, job.restoration, job.prepared = job.restoration, None, None
        return restoration

    def begin_decoding(self, job: Job[T]) -> None:
        """Note that a request has its first token; with the lock held."""
        self.scheduler.remove(job.name)
        self.decoding.append(job)
        self.changed.notify_all()

    def leave(self, job: Job[T]) -> None:
        """Forget a request that was withdrawn, and free its memory; with the lock held."""
        if job in self.decoding:
            self.decoding.remove(job)
        if job in self._waiting:
            self._waiting.remove(job)
        self._admission.release(job.name)
        del self.by_name[job.name]
        self.tell()

    def restoration_of(self, job: Job[T]) -> LiveRestoration[T]:
        """A request's restoration, planned now if nobody had turned to it; with the lock held."""
        if job.restoration is None:
            state = self.scheduler.state(job.name)
            if self._link_closed:
                state.close_link()
            job.restoration = LiveRestoration(state, job.ready.transfer, origin_s=self._origin_s)
            job.restoration.note_restored(self.now_s())
        return job.restoration

    def running(self, *, but: Sequence[Job[T]] = ()) -> list[BatchHandle]:
        """Requests that restore or decode, the oldest first; with the lock held."""
        return [job.handle for job in self.by_name.values() if job.prepared is not None and job not in but]

    def followers(self, leader: Job[T] | None = None) -> list[Job[T]]:
        """Requests that wait for what another restores, or for what ``leader`` restores; with the lock held."""
        jobs = self.by_name.values()
        return [job for job in jobs if job.follows is not None and (leader is None or job.follows is leader)]

    def served(self, leader: Job[T] | None = None) -> list[Job[T]]:
        """Of the followers those for whom everything that they wait for is there; with the lock held."""
        return [job for job in self.followers(leader) if self._is_served(job)]

    def _is_served(self, job: Job[T]) -> bool:
        leader, follow = job.follows, job.ready.follow
        assert leader is not None, "asked of followers only"
        assert follow is not None, "a follower follows"
        if leader.follows is not None or leader.prepared is None:
            return False
        state = self.restoration_of(leader).state
        num_blocks = state.problem.grid.num_blocks
        num_cells = follow.num_chunks * num_blocks
        while job.seen_cells < num_cells and state.board.is_resident(*divmod(job.seen_cells, num_blocks)):
            job.seen_cells += 1
        return job.seen_cells == num_cells

    @property
    def idle_s(self) -> float | None:
        """See ``ReadSource``: what a state machine answers depends on the time."""
        return self._options.poll_s if self.by_name else None

    def next_read(self, num_reads: int, num_bytes: int) -> Read[T] | None:
        """See ``ReadSource``."""
        scheduler = self.scheduler
        wanted = [
            self._options.reads_in_flight(scheduler.rates.windows[tier], num_bytes)
            for tier in range(scheduler.num_tiers)
        ]
        busy = scheduler.busy_tiers(wanted)
        if self._link_closed or num_reads >= sum(wanted):
            return None
        now_s = self.now_s()
        claimed = self.scheduler.claim_read(now_s, busy)
        if claimed is None:
            return None
        restoration = self.restoration_of(self.by_name[claimed.request_id])
        num_bytes += restoration.state.num_bytes(claimed.piece)
        allowed_s = self._options.deadline.allowed_s(num_bytes, self.scheduler.rates)
        return Read(
            restoration,
            claimed.piece,
            claimed_at_s=self._origin_s + now_s,
            allowed_s=allowed_s,
            tier=restoration.state.tier(claimed.piece),
        )

    def close_link(self) -> None:
        """See ``ReadSource``: for those that come later too."""
        self._link_closed = True
        for job in self.by_name.values():
            if job.prepared is not None and job not in self.decoding:
                self.restoration_of(job).state.close_link()

    def _leader_of(self, name: int) -> int | None:
        leader = self.by_name[name].follows
        return None if leader is None else leader.name

    def _first_token_due_s(self, job: Job[T]) -> float | None:
        within_s = job.request.first_token_within_s
        return None if within_s is None else job.handle.arrival_s + within_s
