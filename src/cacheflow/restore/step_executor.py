"""The worker's side of restorations that are decided elsewhere: carries out work over the two ports, and reports.

Work comes once per engine step and is carried out strictly in sequence, so that the sender may count what was
given earlier as done. Compute runs on the calling thread, reads on one I/O thread for all restorations.

Where a device works on after a call, seconds of compute are the device's own, and a restoration is finished once the
device has done its last piece: both are reported when they are known, in a later step, and nobody waits for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from cacheflow.errors import CacheFlowError
from cacheflow.plan.grid import Piece
from cacheflow.restore.hand_over import forfeit, receive, recompute, take_unwanted
from cacheflow.restore.launch_queue import LaunchQueue, recorder_of
from cacheflow.restore.ports import ComputePort, DeviceEvent, HandOverPort, TransferPort
from cacheflow.restore.reads import Read, Reads
from cacheflow.restore.work import (
    ComputeReport,
    ComputeWork,
    LoadReport,
    RankReport,
    ReadWork,
    RestoreTarget,
    StageWork,
)
from cacheflow.types import Clock, LoadOutcome

logger = logging.getLogger(__name__)

Ports = tuple[ComputePort, TransferPort[Any]]

DEVICE_POLL_S = 2e-4
"""Sleep between two looks at a device while there is nothing else to do."""


class _Restoration:
    """One restoration under way, and the owner of its reads.

    Attributes:
        ports: None when they could not be made.
        answers: The compute port, or what answers for it where there is none.
        record: Makes an event on the compute port's queue; None where its calls return when their work is done.
        num_computed: Pieces of work that were reported.
        num_queued: Pieces that the device was asked for and that were not reported.
        finishing: All was asked, and it is finished once the device has done it.
        broken: Compute has failed.
    """

    def __init__(self, restore_id: int, given: _GivenReads, *, origin_s: float) -> None:
        self.restore_id, self.origin_s, self._given = restore_id, origin_s, given
        self.ports: Ports | None = None
        self.answers: object = None
        self.record: Callable[[], DeviceEvent] | None = None
        self.num_computed = self.num_queued = 0
        self.finishing = self.broken = False

    @property
    def transfer(self) -> TransferPort[Any]:
        assert self.ports is not None, "a restoration without ports reads nothing"
        return self.ports[1]

    def begin_place(self, read: Read[Any]) -> bool:
        return True

    def end_place(self, read: Read[Any], *, now_s: float, failed: bool) -> None:
        self._report(read, LoadOutcome.ERROR if failed else LoadOutcome.OK, read.busy_s)

    def fail_read(self, read: Read[Any], outcome: LoadOutcome) -> None:
        self._report(read, outcome, read.busy_s)

    def drop_read(self, read: Read[Any]) -> None:
        self._report(read, LoadOutcome.CANCELLED, 0.0)

    def _report(self, read: Read[Any], outcome: LoadOutcome, busy_s: float) -> None:
        self._given.ended.append(
            LoadReport(
                restore_id=self.restore_id,
                piece=read.piece,
                outcome=outcome,
                num_bytes=read.num_bytes,
                busy_s=busy_s,
                end_s=read.end_s - self.origin_s,
                sample=read.sample,
            )
        )


class _GivenReads:
    """Reads that were given as work and not claimed by the I/O thread yet, and reports of those that ended."""

    idle_s = None

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ended: list[LoadReport] = []
        self._queue: deque[Read[Any]] = deque()
        self._closed = False

    @property
    def any_queued(self) -> bool:
        return bool(self._queue)

    def add(self, owner: _Restoration, work: Sequence[ReadWork], now_s: float) -> None:
        """Their deadlines begin now."""
        with self.changed:
            for each in work:
                read = Read(owner, each.piece, claimed_at_s=now_s, allowed_s=each.deadline_s, tier=each.tier)
                if self._closed:
                    owner.fail_read(read, LoadOutcome.ERROR)
                else:
                    self._queue.append(read)

    def drop(self, owner: _Restoration, pieces: Collection[Piece] | None, now_s: float) -> None:
        with self.changed:
            for read in list(self._queue):
                if read.owner is owner and (pieces is None or read.piece in pieces):
                    self._queue.remove(read)
                    read.end_s = now_s
                    owner.drop_read(read)

    def take_ended(self) -> tuple[LoadReport, ...]:
        if not self.ended:
            return ()
        with self.changed:
            ended, self.ended = tuple(self.ended), []
        return ended

    def next_read(self, num_reads: int, num_bytes: int) -> Read[Any] | None:
        return self._queue.popleft() if self._queue else None

    def close_link(self) -> None:
        self._closed = True
        while self._queue:
            read = self._queue.popleft()
            read.owner.fail_read(read, LoadOutcome.ERROR)


class StepExecutor:
    """Carries ``StageWork`` out and tells what came of it. Every method is called on one thread.

    A port that raises costs its own restoration only.
    """

    def __init__(
        self,
        make_ports: Callable[[RestoreTarget], Ports],
        *,
        clock: Clock = time.perf_counter,
        poll_s: float = 0.005,
        make_answers: Callable[[RestoreTarget], HandOverPort | None] = lambda target: None,
    ) -> None:
        """Start no thread before the first read.

        Args:
            make_ports: Makes the ports of one restoration; called by ``begin``.
            clock: Monotonic seconds.
            poll_s: Longest time the I/O thread waits for one read before it looks at the others.
            make_answers: Makes what answers the stages above and below for a restoration whose ports cannot be made.
        """
        self._make_ports, self._make_answers, self._clock = make_ports, make_answers, clock
        self._given = _GivenReads()
        self._reads: Reads[Any] = Reads(self._given, clock=clock, poll_s=poll_s)
        self._queue: LaunchQueue[_Restoration] = LaunchQueue()
        self._active: dict[int, _Restoration] = {}
        self._computes: list[ComputeReport] = []
        self._finished: list[int] = []

    @property
    def idle(self) -> bool:
        """Whether no restoration is under way and no read is left of any."""
        return not (self._active or self._reads.under_way)

    def begin(self, target: RestoreTarget) -> None:
        """Take a restoration on, before its first work. One whose ports cannot be made is reported as failed."""
        assert target.restore_id not in self._active, f"restoration {target.restore_id} was begun before"
        restoration = _Restoration(target.restore_id, self._given, origin_s=self._clock())
        self._active[target.restore_id] = restoration
        try:
            restoration.ports = self._make_ports(target)
            restoration.answers = restoration.ports[0]
            restoration.record = recorder_of(restoration.ports[0])
        except Exception as error:
            restoration.answers = self._make_answers(target)
            logger.exception("restoration %d of request %s cannot begin", target.restore_id, target.request_id)
            self._break(restoration, (), error)

    def carry_out(self, work: Sequence[StageWork], *, wait_s: float = 0.0) -> None:
        """Carry out one step's work; that of a restoration that is over, or never began, is ignored.

        Args:
            work: At most one per restoration.
            wait_s: How long to wait for a read to end when there was nothing to compute; a restoration's work may say
                longer.
        """
        for each in work:
            restoration = self._active.get(each.restore_id)
            if restoration is not None:
                self._drop_and_read(each, restoration)
        computed = False
        for each in work:
            restoration = self._active.get(each.restore_id)
            if restoration is not None:
                computed = self._compute(each, restoration) or computed
                if each.finish and not restoration.broken:
                    self._finish(restoration)
        wait_s = max(wait_s, max((each.wait_s for each in work), default=0.0))
        if wait_s > 0 and not computed and not self._anything_new():
            self._wait(wait_s)

    def _anything_new(self) -> bool:
        """Whether compute has something to report."""
        self._note_ended()
        return bool(self._computes or self._finished)

    def _wait(self, timeout_s: float) -> None:
        """Wait until a read or a piece of compute has ended, or none is under way."""
        given, until_s = self._given, time.monotonic() + timeout_s
        with given.changed:
            while not given.ended and (given.any_queued or self._reads.under_way or self._queue):
                left_s = until_s - time.monotonic()
                if left_s <= 0 or (self._queue and self._anything_new()):
                    return
                given.changed.wait(min(left_s, DEVICE_POLL_S) if self._queue else left_s)

    def _drop_and_read(self, work: StageWork, restoration: _Restoration) -> None:
        if work.cancel:
            take_unwanted(restoration.answers, work.receives)
            self._end(restoration)
            return
        if work.drops:
            self._drop(restoration, frozenset(work.drops))
        if work.reads and restoration.ports is not None:
            self._given.add(restoration, work.reads, self._clock())
            self._reads.wake()

    def _drop(self, restoration: _Restoration, pieces: Collection[Piece] | None = None) -> None:
        """Give reads up; on return none of them is being placed or will be."""
        self._given.drop(restoration, pieces, self._clock())
        self._reads.drop(restoration, pieces)

    def _compute(self, work: StageWork, restoration: _Restoration) -> bool:
        if not (work.compute or work.receives):
            return False
        if restoration.broken or restoration.ports is None:
            take_unwanted(restoration.answers, work.receives)
            forfeit(restoration.answers, work.compute)
            return False
        port = restoration.ports[0]
        if work.finish and not work.compute:
            take_unwanted(port, work.receives)
            return False
        try:
            receive(port, work.receives)
        except Exception as error:
            logger.exception("restoration %d: a chunk was not handed over", work.restore_id)
            self._break(restoration, (), error)
            forfeit(port, work.compute)
            return True
        if not work.compute:
            return False
        seconds: list[float] = []
        for index, each in enumerate(work.compute):
            try:
                seconds += self._carry_out(restoration, port, each)
            except Exception as error:
                if not isinstance(error, CacheFlowError):  # raised on purpose: whoever hears of it says so in one line
                    logger.exception("restoration %d: compute failed on %s", work.restore_id, each.tile)
                self._break(restoration, tuple(seconds), error)
                forfeit(port, work.compute[index + 1 :])
                return True
        if seconds:
            self._note(restoration, tuple(seconds))
        return True

    def _carry_out(self, restoration: _Restoration, port: ComputePort, work: ComputeWork) -> tuple[float, ...]:
        """Carry out a piece of work; returns the seconds it took, nothing where a device was asked for it."""
        start_s = self._clock()
        if restoration.record is None:
            recompute(port, work)
            return (self._clock() - start_s,)
        self._queue.launch(
            restoration,
            restoration.record,
            partial(recompute, port, work),
            expected_s=work.expected_s,
            now_s=start_s,
        )
        restoration.num_queued += 1
        return ()

    def _note_ended(self) -> None:
        """Note what the device has done since the last call; does not wait."""
        for ended in self._queue.take_ended():
            restoration = ended.what
            restoration.num_queued -= 1
            self._note(restoration, (ended.end_s - ended.start_s,), ended_at_s=ended.end_s)
            if restoration.finishing and not restoration.num_queued:
                self._end(restoration)

    def _finish(self, restoration: _Restoration) -> None:
        assert restoration.ports is not None, "a restoration without ports is broken"
        try:
            restoration.ports[0].finish()
        except Exception as error:
            logger.exception("restoration %d: compute failed at the end", restoration.restore_id)
            self._break(restoration, (), error)
            return
        self._note_ended()
        restoration.finishing = bool(restoration.num_queued)
        if not restoration.finishing:
            self._end(restoration)

    def _end(self, restoration: _Restoration) -> None:
        """Report a restoration finished; nothing that is asked for it from now on touches the KV cache."""
        restoration.finishing = False
        self._drop(restoration)
        del self._active[restoration.restore_id]
        self._finished.append(restoration.restore_id)

    def _break(self, restoration: _Restoration, seconds: tuple[float, ...], error: Exception) -> None:
        restoration.broken = True
        self._note(restoration, seconds, error=f"{type(error).__name__}: {error}")

    def _note(
        self,
        restoration: _Restoration,
        seconds: tuple[float, ...],
        *,
        ended_at_s: float | None = None,
        error: str = "",
    ) -> None:
        end_s = (self._clock() if ended_at_s is None else ended_at_s) - restoration.origin_s
        first = restoration.num_computed
        restoration.num_computed += len(seconds)
        self._computes.append(
            ComputeReport(restore_id=restoration.restore_id, first=first, seconds=seconds, end_s=end_s, error=error)
        )

    def take_report(self) -> RankReport:
        """What was done since the last call; end of a read that ``OK`` reports included."""
        self._note_ended()
        # Finished first: a read of a restoration that is over must not be reported after its end.
        finished, self._finished = tuple(self._finished), []
        computes, self._computes = tuple(self._computes), []
        return RankReport(loads=self._given.take_ended(), computes=computes, finished=finished)

    def close(self) -> None:
        """End the I/O thread; every restoration is over. Does not wait for a store that hangs."""
        self._active.clear()
        self._reads.close(wait=False)
