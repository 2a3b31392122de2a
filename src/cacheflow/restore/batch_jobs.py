"""The requests of a live batch, and the lock that guards them: what the compute thread and the I/O loop share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from cacheflow.errors import ConfigError
from cacheflow.plan.batch import WaitingRequest
from cacheflow.plan.remaining import remaining_of
from cacheflow.restore.batch_leaders import LeadersFirst
from cacheflow.restore.batch_request import BatchHandle, BatchRequest, Prepared
from cacheflow.restore.ports import Ticket
from cacheflow.restore.shared import LoadOrder, Restoration
from cacheflow.state.admission import Admission
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.board import RESIDENT
from cacheflow.state.restoration import RestoreState
from cacheflow.types import Clock

T = TypeVar("T", bound=Ticket)


class Job(Generic[T]):
    """One request; written by the compute thread under the lock.

    Attributes:
        handle: What its submitter holds.
        request: What was asked for.
        prepared: What it runs on; None while it waits for memory.
        restoration: Its restoration as the I/O loop sees it; None until the scheduler has started it.
        follows: It waits for what another request restores.
        seen_cells: Leading cells of the leader that were seen to be there.
        admitted_s: When there was room for it.
        token_s: When its tokens were there.
        overhead_s: Seconds the compute thread spent on it outside its ports.
    """

    __slots__ = (
        "admitted_s",
        "follows",
        "handle",
        "overhead_s",
        "prepared",
        "request",
        "restoration",
        "seen_cells",
        "token_s",
    )

    def __init__(self, handle: BatchHandle, request: BatchRequest[T]) -> None:
        """Wait for memory."""
        self.handle, self.request = handle, request
        self.prepared: Prepared[T] | None = None
        self.restoration: Restoration[T] | None = None
        self.follows: Job[T] | None = None
        self.seen_cells = 0
        self.admitted_s = 0.0
        self.token_s: list[float] = []
        self.overhead_s = 0.0

    @property
    def name(self) -> int:
        """Its name in the batch."""
        return self.handle.request_id


class Jobs(Generic[T]):
    """Every request that has not ended; the source of the I/O loop.

    Attributes:
        changed: Guards everything here, the scheduler and its states; held only around calls into them.
        stop: Set when the I/O loop should end.
        scheduler: Decides.
        by_name: All requests, in the order of submission.
        decoding: Those that have their first token.
        num_news: Counts what the compute thread must look at before it sleeps.
        closing: No request is taken any more.
    """

    def __init__(self, scheduler: BatchScheduler, admission: Admission, clock: Clock) -> None:
        """Start empty, at second 0."""
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.scheduler, self._admission = scheduler, admission
        scheduler.policy = LeadersFirst(scheduler.policy, self._leader_of)
        self.by_name: dict[int, Job[T]] = {}
        self.decoding: list[Job[T]] = []
        self.num_news = 0
        self.closing = False
        self._waiting: list[Job[T]] = []
        self._num_named = 0
        self._link_closed = False
        self._clock, self._origin_s = clock, clock()

    def now_s(self) -> float:
        """Seconds since the batch was opened."""
        return self._clock() - self._origin_s

    def new_name(self) -> int:
        """A name nobody has."""
        self._num_named += 1
        return self._num_named - 1

    def check(self, num_tokens: int) -> None:
        """See ``Admission.check``."""
        self._admission.check(num_tokens)

    def enter(self, job: Job[T]) -> None:
        """Let a request wait for memory; with the lock held."""
        self._admission.ask(job.name, job.request.num_tokens, arrival_s=job.handle.arrival_s)
        self.by_name[job.name] = job
        self._waiting.append(job)
        self.tell()

    def tell(self) -> None:
        """Have the compute thread look around; with the lock held."""
        self.num_news += 1
        self.changed.notify_all()

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
                deadline_s=self._deadline_s(job),
            )
            for job in self._waiting
        ]
        order = self.scheduler.policy.rank(now_s, requests).compute
        admitted = [self.by_name[name] for name in self._admission.admit(order, now_s)]
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
        self.scheduler.add(
            job.name,
            prepared.problem,
            arrival_s=job.handle.arrival_s,
            deadline_s=self._deadline_s(job),
            ready=follow is None,
        )
        if self._link_closed:
            self.restoration_of(job)
        self.changed.notify_all()

    def withdraw(self, job: Job[T]) -> None:
        """Take a request from the scheduler and from the I/O loop; with the lock held, which it may let go of.

        On return no read touches the request's buffer any more.
        """
        if job.restoration is not None:
            job.restoration.over = True
        if job.prepared is not None and job not in self.decoding:
            self.scheduler.remove(job.name)
        restoration, job.restoration, job.prepared = job.restoration, None, None
        while restoration is not None and restoration.placing:
            self.changed.wait()

    def begin_decoding(self, job: Job[T]) -> None:
        """Note that a request has its first token; with the lock held."""
        self.restoration_of(job).over = True
        self.scheduler.remove(job.name)
        self.decoding.append(job)
        self.changed.notify_all()

    def leave(self, job: Job[T]) -> None:
        """Forget a request and free its memory; with the lock held."""
        if job.prepared is not None:
            self.withdraw(job)
        if job in self.decoding:
            self.decoding.remove(job)
        if job in self._waiting:
            self._waiting.remove(job)
        self._admission.release(job.name)
        del self.by_name[job.name]
        self.tell()

    def restoration_of(self, job: Job[T]) -> Restoration[T]:
        """A request's restoration, planned now if nobody had turned to it; with the lock held."""
        if job.restoration is None:
            assert job.prepared is not None, "only requests that the scheduler has are restored"
            state = self.scheduler.state(job.name)
            if self._link_closed:
                state.close_link()
            job.restoration = Restoration(state, job.prepared.transfer)
            if state.restored:
                job.restoration.restored_at_s = self.now_s()
        return job.restoration

    def running(self, *, but: Sequence[Job[T]] = ()) -> list[BatchHandle]:
        """Requests that restore or decode, the oldest first; with the lock held."""
        return [job.handle for job in self.by_name.values() if job.prepared is not None and job not in but]

    def followers(self, leader: Job[T] | None = None) -> Iterator[Job[T]]:
        """Requests that wait for what another restores, or for what ``leader`` restores; with the lock held."""
        for job in list(self.by_name.values()):
            if job.follows is not None and (leader is None or job.follows is leader):
                yield job

    def brought(self, job: Job[T]) -> bool:
        """Whether what a follower waits for is there; with the lock held."""
        leader, prepared = job.follows, job.prepared
        assert leader is not None, "asked of followers only"
        assert prepared is not None, "a follower was prepared"
        assert prepared.follow is not None, "a follower follows"
        if leader.follows is not None or leader.prepared is None:
            return False
        state = self.restoration_of(leader).state
        num_cells = prepared.follow.num_chunks * state.problem.grid.num_blocks
        while job.seen_cells < num_cells and _is_resident(state, job.seen_cells):
            job.seen_cells += 1
        return job.seen_cells == num_cells

    def claim_load(self, behind_bytes: int) -> LoadOrder[T] | None:
        """See ``LoadSource``."""
        if self._link_closed:
            return None
        now_s = self.now_s()
        load = self.scheduler.claim_load(now_s)
        if load is None:
            return None
        restoration = self.restoration_of(self.by_name[load.request_id])
        num_bytes = int(restoration.state.problem.load_bytes_KB[load.tile.chunk_lo, load.tile.block_lo])
        expected_s = (behind_bytes + num_bytes) / self.scheduler.rates.bytes_per_s
        return LoadOrder(restoration, load.tile, now_s, expected_s)

    def loads_possible(self) -> bool:
        """See ``LoadSource``: more requests may come."""
        return not self.stop.is_set()

    def close_link(self) -> None:
        """See ``LoadSource``: for those that come later too."""
        self._link_closed = True
        for job in self.by_name.values():
            if job.prepared is not None and job not in self.decoding:
                self.restoration_of(job).state.close_link()

    def _leader_of(self, name: int) -> int | None:
        leader = self.by_name[name].follows
        return None if leader is None else leader.name

    def _deadline_s(self, job: Job[T]) -> float | None:
        deadline_s = job.request.deadline_s
        return None if deadline_s is None else job.handle.arrival_s + deadline_s


def _is_resident(state: RestoreState, index: int) -> bool:
    chunk, block = divmod(index, state.problem.grid.num_blocks)
    return state.cell(chunk, block) in RESIDENT
