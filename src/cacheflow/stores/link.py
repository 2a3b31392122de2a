"""When bytes arrive over one link: a pure schedule, exact for any order of calls with ascending times."""

from __future__ import annotations

import copy
import heapq
from dataclasses import dataclass, field

from cacheflow.errors import ConfigError


@dataclass(slots=True)
class _Line:
    """The state that time moves; everything in it is plain data, so that a forecast runs on a copy."""

    bytes_per_s: float
    at_s: float = float("-inf")
    """The state is that of this moment."""
    delivered_bytes: float = 0.0
    current: int | None = None
    queue: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (negative priority, ticket)."""
    left_bytes: dict[int, float] = field(default_factory=dict)
    """Of the transfers queued and under way; a ticket in the queue but not here was dropped."""
    done_at_s: dict[int, float] = field(default_factory=dict)
    changes: list[tuple[float, float]] = field(default_factory=list)
    """(delivered bytes at which it takes effect, new bandwidth), ascending."""

    def advance(self, until_s: float) -> None:
        """Move bytes until ``until_s``."""
        while self.at_s < until_s:
            if self.current is None and not self._take_next():
                self.at_s = max(self.at_s, until_s)
                return
            self._move(until_s)

    def _take_next(self) -> bool:
        while self.queue:
            _, ticket = heapq.heappop(self.queue)
            if ticket in self.left_bytes:
                self.current = ticket
                return True
        return False

    def _move(self, until_s: float) -> None:
        """Serve the current transfer up to its end, the next change of bandwidth, or ``until_s``."""
        assert self.current is not None
        left = self.left_bytes[self.current]
        to_change = self.changes[0][0] - self.delivered_bytes if self.changes else float("inf")
        step = min(left, max(to_change, 0.0))
        end_s = self.at_s + step / self.bytes_per_s
        if end_s > until_s:
            step = (until_s - self.at_s) * self.bytes_per_s
            self.at_s = until_s
        else:
            self.at_s = end_s
            if step >= to_change:
                self.bytes_per_s = self.changes.pop(0)[1]
        self.delivered_bytes += step
        self.left_bytes[self.current] = left - step
        if step >= left:
            self.done_at_s[self.current] = self.at_s
            del self.left_bytes[self.current]
            self.current = None

    def copy(self) -> _Line:
        """An independent copy."""
        twin = copy.copy(self)
        twin.queue, twin.changes = list(self.queue), list(self.changes)
        twin.left_bytes, twin.done_at_s = dict(self.left_bytes), dict(self.done_at_s)
        return twin


class LinkSchedule:
    """A link that serves one transfer at a time, by priority and then in the order of submission.

    A transfer that starts at once on an idle link is done at ``now + bytes / bandwidth``; one queued after others at
    the end of theirs plus its own. So the link is busy whenever something is queued, however late its users wake up.
    Not thread-safe; times passed in never decrease.
    """

    def __init__(self, bytes_per_s: float) -> None:
        """Create an idle link.

        Raises:
            ConfigError: The bandwidth is not above 0.
        """
        self._line = _Line(bytes_per_s=_checked(bytes_per_s))
        self._num_tickets = 0
        self._forecast: dict[int, float] | None = {}

    @property
    def bytes_per_s(self) -> float:
        """The bandwidth as of the last call."""
        return self._line.bytes_per_s

    def submit(self, num_bytes: int, *, now_s: float, priority: int = 0) -> int:
        """Queue a transfer; returns its ticket. One under way is not interrupted by a larger priority."""
        ticket = self._num_tickets
        self._num_tickets += 1
        self._line.advance(now_s)
        self._line.left_bytes[ticket] = float(num_bytes)
        heapq.heappush(self._line.queue, (-priority, ticket))
        self._forecast = None
        return ticket

    def done_at_s(self, ticket: int) -> float:
        """When the last byte of a transfer arrives, if nothing changes; exact once that time has passed."""
        if self._forecast is None:
            future = self._line.copy()
            future.advance(float("inf"))
            self._forecast = future.done_at_s
        return self._forecast[ticket]

    def forget(self, ticket: int, *, now_s: float) -> None:
        """Drop a transfer; bytes it has not moved by now are left to the others."""
        self._line.advance(now_s)
        if self._line.done_at_s.pop(ticket, None) is None and self._line.left_bytes.pop(ticket, None) is not None:
            if self._line.current == ticket:
                self._line.current = None
            self._forecast = None
        elif self._forecast is not None:
            self._forecast.pop(ticket, None)

    def shorten(self, ticket: int, by_bytes: int, *, now_s: float) -> None:
        """A transfer has so many bytes less than was said; one that is through by now stays as it was."""
        self._line.advance(now_s)
        left_bytes = self._line.left_bytes.get(ticket)
        if left_bytes is not None and by_bytes > 0:
            self._line.left_bytes[ticket] = max(0.0, left_bytes - by_bytes)
            self._forecast = None

    def set_bandwidth(self, bytes_per_s: float, *, now_s: float, after_bytes: float = 0.0) -> None:
        """Change the bandwidth, for what is under way too, once ``after_bytes`` more bytes were delivered.

        Raises:
            ConfigError: The bandwidth is not above 0, or ``after_bytes`` is below 0.
        """
        _checked(bytes_per_s)
        if after_bytes < 0:
            raise ConfigError(f"after_bytes is {after_bytes}, must be 0 or more")
        self._line.advance(now_s)
        if after_bytes:
            self._line.changes.append((self._line.delivered_bytes + after_bytes, bytes_per_s))
            self._line.changes.sort()
        else:
            self._line.bytes_per_s = bytes_per_s
        self._forecast = None


def _checked(bytes_per_s: float) -> float:
    if not bytes_per_s > 0:
        raise ConfigError(f"link bytes_per_s is {bytes_per_s}, must be above 0")
    return bytes_per_s
