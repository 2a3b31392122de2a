"""The live executor of many restorations: a batch scheduler driven by one compute thread and one I/O thread.

The twin of ``sim.device`` with threads. All work of all requests that touches a model happens on the one compute
thread, which is the executor's own: preparing, recomputing, copying shared prefixes, new tokens, decoding. Reads of all
requests are started, awaited and placed by one I/O loop. When compute meets the link on one request both turn to the
next at once, because both ask the scheduler whenever they are free.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from cacheflow.errors import ConfigError
from cacheflow.restore.batch_jobs import Job, Jobs
from cacheflow.restore.batch_late import LateReads
from cacheflow.restore.batch_loop import ComputeLoop
from cacheflow.restore.batch_pace import DecodePace
from cacheflow.restore.batch_request import BatchHandle, BatchRequest
from cacheflow.restore.io_loop import IoLoop
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import Ticket
from cacheflow.state.admission import Admission
from cacheflow.state.batch import BatchScheduler

T = TypeVar("T", bound=Ticket)


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
        """Start both threads.

        Args:
            scheduler: Decides; nobody else may use it, or its rates, until ``close``.
            options: Depth and deadlines of the reads, and the clock.
            admission: Bounds the memory of requests that restore or decode.
            pace: Bounds what restorations cost those that decode.
        """
        options = options or ExecutorOptions()
        self._jobs: Jobs[T] = Jobs(scheduler, admission or Admission(), options.clock)
        self._late: LateReads[T] = LateReads()
        io_loop = IoLoop(self._jobs, options, free_late=self._late.free)
        loop = ComputeLoop(self._jobs, pace or DecodePace(), poll_s=options.poll_s)
        self._io_thread = threading.Thread(target=io_loop.run, name="cacheflow-io", daemon=True)
        self._compute_thread = threading.Thread(target=loop.run, name="cacheflow-compute", daemon=True)
        self._io_thread.start()
        self._compute_thread.start()

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
        jobs = self._jobs
        with jobs.changed:
            if jobs.closing:
                raise ConfigError("the batch is closed; open another one")
            for request in requests:
                jobs.check(request.num_tokens)
            arrival_s = jobs.now_s()
            handles = []
            for request in requests:
                handle = BatchHandle(jobs.new_name(), arrival_s, tag=request.tag, on_cancel=self._wake)
                if request.on_end is not None:
                    handle.ended.add_done_callback(request.on_end)
                jobs.enter(Job(handle, request))
                handles.append(handle)
        return handles

    def drain(self) -> None:
        """Wait until no request is left."""
        with self._jobs.changed:
            while self._jobs.by_name:
                self._jobs.changed.wait()

    def close(self) -> None:
        """Give up what has not ended and end both threads; on return no read is under way. Closing again is harmless.

        Not for callbacks of handles: it waits for the thread that they run on.
        """
        with self._jobs.changed:
            self._jobs.closing = True
            self._jobs.tell()
        self._compute_thread.join()
        self._jobs.stop.set()
        with self._jobs.changed:
            self._jobs.changed.notify_all()
        self._io_thread.join()
        self._late.close()

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

    def _wake(self) -> None:
        with self._jobs.changed:
            self._jobs.tell()
