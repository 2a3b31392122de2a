"""The worker's side of restorations that are decided elsewhere: carries out orders over the two ports, and reports.

Orders come once per engine step and are carried out strictly in order, so that whoever gave them may count what was
ordered earlier as done. Compute runs on the calling thread, reads on one I/O thread for all restorations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cacheflow.restore.hand_over import forfeit, receive, recompute, take_unwanted
from cacheflow.restore.ports import ComputePort, HandOverPort, TransferPort
from cacheflow.restore.reads import Reads
from cacheflow.restore.work import ComputeReport, RankReport, RestoreTarget, StageWork
from cacheflow.types import Clock

logger = logging.getLogger(__name__)

Ports = tuple[ComputePort, TransferPort[Any]]


@dataclass(slots=True, eq=False)
class _Restoration:
    """One restoration under way; without ports when they could not be made, broken once compute failed.

    ``answers``: the compute port, or what answers for it where there is none.
    """

    ports: Ports | None
    answers: object
    origin_s: float
    num_computed: int = 0
    broken: bool = False


class StepExecutor:
    """Obeys ``StageWork`` and tells what came of them. Every method is called on one thread.

    A port that raises costs its own restoration only. ``TransferPort.cancel`` is called from threads of its own, so
    that a store that hangs holds up nobody; all other methods of a transfer port are called on the I/O thread.
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
        self._reads = Reads(clock=clock, poll_s=poll_s)
        self._active: dict[int, _Restoration] = {}
        self._computes: list[ComputeReport] = []
        self._finished: list[int] = []

    def begin(self, target: RestoreTarget) -> None:
        """Take a restoration on, before its first order. One whose ports cannot be made is reported as failed."""
        assert target.restore_id not in self._active, f"restoration {target.restore_id} was begun before"
        restoration = _Restoration(None, None, self._clock())
        self._active[target.restore_id] = restoration
        try:
            restoration.ports = self._make_ports(target)
            restoration.answers = restoration.ports[0]
        except Exception as error:
            restoration.answers = self._make_answers(target)
            logger.exception("restoration %d of request %s cannot begin", target.restore_id, target.request_id)
            self._break(target.restore_id, restoration, (), error)

    def carry_out(self, orders: Sequence[StageWork], *, wait_s: float = 0.0) -> None:
        """Carry out one step's orders; orders of a restoration that is over, or never began, are ignored.

        Args:
            orders: At most one per restoration.
            wait_s: How long to wait for a read to end when there was nothing to compute; an order may say longer.
        """
        for each in orders:
            restoration = self._active.get(each.restore_id)
            if restoration is not None:
                self._drop_and_read(each, restoration)
        computed = False
        for each in orders:
            restoration = self._active.get(each.restore_id)
            if restoration is not None:
                computed = self._compute(each, restoration) or computed
                if each.finish and not restoration.broken:
                    self._finish(each.restore_id, restoration)
        wait_s = max(wait_s, max((each.wait_s for each in orders), default=0.0))
        if wait_s > 0 and not computed and not (self._computes or self._finished) and self._reads.under_way:
            self._reads.wait(wait_s)

    def _drop_and_read(self, orders: StageWork, restoration: _Restoration) -> None:
        if orders.cancel:
            take_unwanted(restoration.answers, orders.receives)
            self._end(orders.restore_id)
            return
        if orders.drops:
            self._reads.drop(orders.restore_id, frozenset(orders.drops))
        if orders.reads and restoration.ports is not None:
            transfer = restoration.ports[1]
            self._reads.start(orders.restore_id, transfer, orders.reads, origin_s=restoration.origin_s)

    def _compute(self, orders: StageWork, restoration: _Restoration) -> bool:
        if not (orders.compute or orders.receives):
            return False
        if restoration.broken or restoration.ports is None:
            take_unwanted(restoration.answers, orders.receives)
            forfeit(restoration.answers, orders.compute)
            return False
        port = restoration.ports[0]
        if orders.finish and not orders.compute:
            take_unwanted(port, orders.receives)
            return False
        try:
            receive(port, orders.receives)
        except Exception as error:
            logger.exception("restoration %d: a chunk was not handed over", orders.restore_id)
            self._break(orders.restore_id, restoration, (), error)
            forfeit(port, orders.compute)
            return True
        if not orders.compute:
            return False
        seconds: list[float] = []
        for index, order in enumerate(orders.compute):
            before_s = self._clock()
            try:
                recompute(port, order)
            except Exception as error:
                logger.exception("restoration %d: compute failed on %s", orders.restore_id, order.tile)
                self._break(orders.restore_id, restoration, tuple(seconds), error)
                forfeit(port, orders.compute[index + 1 :])
                return True
            seconds.append(self._clock() - before_s)
        self._note(orders.restore_id, restoration, tuple(seconds))
        return True

    def _finish(self, restore_id: int, restoration: _Restoration) -> None:
        assert restoration.ports is not None, "a restoration without ports is broken"
        try:
            restoration.ports[0].finish()
        except Exception as error:
            logger.exception("restoration %d: compute failed at the end", restore_id)
            self._break(restore_id, restoration, (), error)
            return
        self._end(restore_id)

    def _end(self, restore_id: int) -> None:
        """Report a restoration finished; nothing of it touches the KV cache from now on."""
        self._reads.drop(restore_id)
        del self._active[restore_id]
        self._finished.append(restore_id)

    def _break(self, restore_id: int, restoration: _Restoration, seconds: tuple[float, ...], error: Exception) -> None:
        restoration.broken = True
        self._note(restore_id, restoration, seconds, error=f"{type(error).__name__}: {error}")

    def _note(self, restore_id: int, restoration: _Restoration, seconds: tuple[float, ...], *, error: str = "") -> None:
        end_s = self._clock() - restoration.origin_s
        first = restoration.num_computed
        restoration.num_computed += len(seconds)
        self._computes.append(
            ComputeReport(restore_id=restore_id, first=first, seconds=seconds, end_s=end_s, error=error)
        )

    def take_report(self) -> RankReport:
        """What was done since the last call; end of a read that ``OK`` reports included."""
        # Finished first: a read of a restoration that is over must not be reported after its end.
        finished, self._finished = tuple(self._finished), []
        computes, self._computes = tuple(self._computes), []
        return RankReport(loads=self._reads.take(), computes=computes, finished=finished)

    def close(self) -> None:
        """End the I/O thread; every restoration is over. Does not wait for a store that hangs."""
        self._active.clear()
        self._reads.close()
