"""One request of a live batch: what its submitter provides, and what it gets back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.report import RestoreReport
from cacheflow.restore.ports import ComputePort, DecodePort, Ticket, TransferPort
from cacheflow.state.restoration import RestoreState

T = TypeVar("T", bound=Ticket)


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """A request whose first tokens another one is restoring.

    Attributes:
        leader: Who restores them.
        num_chunks: Chunks of the leader's grid, from its head, that must be there.
        copy: Copies them into the follower's buffer; called on the compute thread.
    """

    leader: BatchHandle
    num_chunks: int
    copy: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Generic[T]):
    """A request that may start.

    Attributes:
        problem: What its restoration costs; without what ``follow`` brings.
        compute: Recomputes its cells and runs its new tokens.
        transfer: Reads its cells.
        decode: Makes the answer; None when the first token is all.
        follow: What must be copied before compute may begin.
        state: A fresh state machine, where it was planned already; the batch plans it otherwise.
        planning_s: Seconds that plan took, for the report.
    """

    problem: RestoreProblem
    compute: ComputePort
    transfer: TransferPort[T]
    decode: DecodePort | None = None
    follow: Follow | None = None
    state: RestoreState | None = None
    planning_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest(Generic[T]):
    """What is asked for.

    Attributes:
        problem: What it costs to restore all of it, to rank it by while it waits for memory.
        prepare: Allocates and opens what it needs; called on the compute thread, with the requests that are restoring
            or decoding, once there is room for it, and again when the request that it follows fails.
        num_tokens: Tokens of KV memory it needs.
        first_token_within_s: Seconds from now until which the first token should be there.
        tag: Whatever the submitter wants to find again on the handle.
        on_end: Called on the compute thread when ``ended`` has resolved.
    """

    problem: RestoreProblem
    prepare: Callable[[Sequence[BatchHandle]], Prepared[T]]
    num_tokens: int = 0
    first_token_within_s: float | None = None
    tag: object = None
    on_end: Callable[[Future[BatchOutcome]], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutcome:
    """How a request ended; seconds from its arrival.

    Attributes:
        report: Its restoration; times count from arrival, waiting for memory included.
        admitted_s: When there was room for it.
        token_s: When each token of the answer was there.
    """

    report: RestoreReport
    admitted_s: float
    token_s: tuple[float, ...]

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Seconds between one token and the next."""
        return tuple(after - before for before, after in pairwise(self.token_s))


class BatchHandle:
    """A submitted request; every method may be called from any thread.

    Attributes:
        request_id: Its name in the batch, in the order of submission.
        arrival_s: When it was submitted, on the batch's clock.
        tag: As submitted.
        first_token: Resolves with the report when the first token is there.
        ended: Resolves when the answer is through. Both fail with ``RestoreCancelled`` or with what went wrong. Their
            callbacks run on the compute thread: keep them short.
    """

    def __init__(self, request_id: int, arrival_s: float, *, tag: object, on_cancel: Callable[[], None]) -> None:
        """Made by ``BatchExecutor.submit``."""
        self.request_id, self.arrival_s, self.tag = request_id, arrival_s, tag
        self.first_token: Future[RestoreReport] = Future()
        self.ended: Future[BatchOutcome] = Future()
        for future in (self.first_token, self.ended):
            future.set_running_or_notify_cancel()  # a future's own cancel would not end the restoration
        self._cancelled = threading.Event()
        self._on_cancel = on_cancel

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Give the request up; it ends soon, with ``RestoreCancelled`` unless it was through already."""
        self._cancelled.set()
        self._on_cancel()

    def result(self, timeout_s: float | None = None) -> BatchOutcome:
        """Wait for the end.

        Raises:
            TimeoutError: It did not come within ``timeout_s``.
            RestoreCancelled: The request was cancelled, or the batch closed.
        """
        return self.ended.result(timeout_s)
