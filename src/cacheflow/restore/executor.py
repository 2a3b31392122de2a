"""Live restorations: a batch scheduler driven by one compute thread and one I/O thread; one alone is a batch of one.

All work that touches a model happens on the one compute thread: preparing, recomputing, copying shared prefixes, new
tokens, decoding. Reads of all requests are started, awaited and placed by one I/O thread. When compute meets the link
on one request both turn to the next at once, because both ask the scheduler whenever they are free.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from cacheflow.plan.batch import Arrival
from cacheflow.plan.report import RestoreReport
from cacheflow.restore.batch import BatchHandle, BatchOutcome, BatchRequest, Prepared
from cacheflow.restore.compute_loop import ComputeLoop
from cacheflow.restore.decode_pace import DecodePace
from cacheflow.restore.jobs import Jobs
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import ComputePort, Ticket, TransferPort
from cacheflow.restore.reads import Reads
from cacheflow.state.batch import Admission, BatchScheduler
from cacheflow.state.restoration import RestoreState

T = TypeVar("T", bound=Ticket)


def execute(
    state: RestoreState,
    compute: ComputePort,
    transfer: TransferPort[T],
    *,
    options: ExecutorOptions | None = None,
    planning_s: float = 0.0,
    cancel: threading.Event | None = None,
) -> RestoreReport:
    """Restore every cell of ``state``'s grid, run the suffix, and report what happened; computes on this thread.

    On return nothing of the restoration is running: no thread, no read that touches a buffer. Of a store that hangs in
    a read for longer than ``reaper.CLOSE_S`` the read is left, with a staging buffer that is given to nobody else.

    Args:
        state: A fresh state machine; its plan decides who does what.
        compute: Called on this thread only.
        transfer: See ``ports`` for its threads.
        options: Depth and deadlines of the reads, and the clock.
        planning_s: Seconds the plan took, for the report.
        cancel: Set from any thread to give the restoration up.

    Raises:
        RestoreCancelled: ``cancel`` was set before the first token was there.
    """
    prepared = Prepared(problem=state.problem, compute=compute, transfer=transfer, state=state, planning_s=planning_s)
    request = BatchRequest(problem=state.problem, prepare=lambda running: prepared)
    return serve(request, BatchScheduler(Arrival(), state.rates), options=options, cancel=cancel).report


def serve(
    request: BatchRequest[T],
    scheduler: BatchScheduler,
    *,
    options: ExecutorOptions | None = None,
    cancel: threading.Event | None = None,
) -> BatchOutcome:
    """Serve one request alone: restore its prefix and make its answer, on this thread.

    On return nothing of it is running, but for what ``execute`` says of a store that hangs.

    Args:
        request: What is asked for.
        scheduler: Plans it; without other requests.
        options: Depth and deadlines of the reads, and the clock.
        cancel: Set from any thread to give the request up before its first token.

    Raises:
        RestoreCancelled: ``cancel`` was set before the first token was there.
    """
    options = options or ExecutorOptions()
    jobs: Jobs[T] = Jobs(scheduler, Admission(), options)
    reads = Reads(jobs, clock=options.clock, poll_s=options.poll_s)
    loop = ComputeLoop(jobs, reads, DecodePace(), poll_s=options.poll_s)
    [handle] = jobs.submit([request])
    try:
        while jobs.by_name:
            if cancel is not None and cancel.is_set() and not handle.first_token.done():
                handle.cancel()
            loop.step()
    finally:
        reads.close(wait=True)
    return handle.result()


class BatchExecutor(Generic[T]):
    """Restores requests as they come; thread-safe. A context manager that waits for all of them on leaving."""

    def __init__(
        self,
        scheduler: BatchScheduler,
        *,
        options: ExecutorOptions | None = None,
        admission: Admission | None = None,
        pace: DecodePace | None = None,
    ) -> None:
        """Start the compute thread.

        Args:
            scheduler: Decides; nobody else may use it, or its rates, until ``close``.
            options: Depth and deadlines of the reads, and the clock.
            admission: Bounds the memory of requests that restore or decode.
            pace: Bounds what restorations cost those that decode.
        """
        options = options or ExecutorOptions()
        self._jobs: Jobs[T] = Jobs(scheduler, admission or Admission(), options)
        self._reads = Reads(self._jobs, clock=options.clock, poll_s=options.poll_s)
        loop = ComputeLoop(self._jobs, self._reads, pace or DecodePace(), poll_s=options.poll_s)
        self._thread = threading.Thread(target=loop.run, name="cacheflow-compute", daemon=True)
        self._thread.start()

    def now_s(self) -> float:
        """Seconds since the executor was made: the clock of arrivals."""
        return self._jobs.now_s()

    def submit(self, request: BatchRequest[T]) -> BatchHandle:
        """Take one request in; see ``submit_all``."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[BatchRequest[T]]) -> list[BatchHandle]:
        """Take requests in at the same moment, in this order; returns at once.

        Raises:
            PromptError: One of them needs more memory than there is; none was taken in.
            ConfigError: The executor is closed.
        """
        return self._jobs.submit(requests)

    def drain(self) -> None:
        """Wait until no request is left."""
        with self._jobs.changed:
            while self._jobs.by_name:
                self._jobs.changed.wait()

    def close(self) -> None:
        """Give up what has not ended and end both threads; on return no read is under way, but see ``execute``.

        Closing again is harmless.
        Not for callbacks of handles: it waits for the thread that they run on.
        """
        self._jobs.close()
        self._thread.join()
        self._reads.close(wait=True)

    def __enter__(self) -> Self:
        """Return the executor."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for every request, unless an exception ends the batch; then close."""
        try:
            if kind is None:
                self.drain()
        finally:  # also when waiting is interrupted
            self.close()
