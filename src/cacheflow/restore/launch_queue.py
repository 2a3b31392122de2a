"""What a device was asked and has not done yet, where a port's calls return before their work is done.

The host may run ahead of the device by ``QUEUE_S`` and a piece, so that launching never leaves the device idle, and no
further, so that where compute meets the link is still decided late. The device's own seconds of each piece are known
once it has done it: about one claim after it was launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from cacheflow.restore.ports import DeviceEvent, QueueingPort

QUEUE_S = 0.004
"""Seconds of work that stay queued, as expected, when the host waits for the device to get on."""

W = TypeVar("W")


def recorder_of(port: object) -> Callable[[], DeviceEvent] | None:
    """What records events after all that a compute port was asked; None where its calls return when work is done."""
    if not isinstance(port, QueueingPort) or port.record() is None:
        return None
    return partial(_event, port)


def _event(port: QueueingPort) -> DeviceEvent:
    event = port.record()
    assert event is not None, "a queueing port records events"
    return event


@dataclass(frozen=True, slots=True, eq=False)
class _Launched(Generic[W]):
    what: W
    begin: DeviceEvent
    end: DeviceEvent
    expected_s: float


@dataclass(frozen=True, slots=True)
class Ended(Generic[W]):
    """A piece that the device has done, and when, on the host's clock."""

    what: W
    start_s: float
    end_s: float


class LaunchQueue(Generic[W]):
    """The pieces of one device stream; one thread."""

    def __init__(self) -> None:
        """Nothing is launched."""
        self._launched: deque[_Launched[W]] = deque()
        self._origin: tuple[DeviceEvent, float] | None = None

    def __len__(self) -> int:
        """Pieces that were launched and did not come back from ``take_ended`` yet."""
        return len(self._launched)

    def launch(
        self, what: W, record: Callable[[], DeviceEvent], work: Callable[[], None], *, expected_s: float, now_s: float
    ) -> None:
        """Launch a piece, and wait for earlier ones while more is queued than needs to be; never for this one.

        Args:
            what: Comes back when it has ended.
            record: Makes an event after all that the stream was asked so far.
            work: Asks the stream for it.
            expected_s: How long the device should take.
            now_s: The host's clock.
        """
        begin = record()
        if self._origin is None:
            # Nothing is queued, so the event passes now: that is how device time becomes the host's.
            self._origin = begin, now_s
        work()
        self._launched.append(_Launched(what, begin, record(), expected_s))
        queued = [piece for piece in self._launched if not piece.end.done()]
        queued_s = sum(piece.expected_s for piece in queued)
        for piece in queued:
            queued_s -= piece.expected_s
            if queued_s < QUEUE_S:  # so of the newest, after which nothing is queued
                break
            piece.end.wait()

    def take_ended(self) -> list[Ended[W]]:
        """The pieces that have ended since the last call, in sequence; does not wait."""
        ended: list[Ended[W]] = []
        while self._launched and self._launched[0].end.done():
            piece = self._launched.popleft()
            assert self._origin is not None, "pieces come after their origin"
            origin, origin_s = self._origin
            start_s, end_s = (origin_s + event.seconds_after(origin) for event in (piece.begin, piece.end))
            ended.append(Ended(piece.what, start_s, end_s))
        if not self._launched:
            self._origin = None  # a new one next time: the two clocks drift apart
        return ended
