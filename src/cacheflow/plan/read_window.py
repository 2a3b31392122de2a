"""How many reads of a store to keep under way: as many as deliver its bandwidth, and no more.

By Little's law a store that answers a lone read after ``latency`` seconds delivers ``rate`` reads a second with
``rate * latency`` of them under way. The latency counts where nothing else was under way when the read began, since
later reads also wait in line; the rate is what was delivered while a read was under way. While more reads bring more,
the rate rises and the window with it; once they only wait, neither does. Both are measured, and measurements err, above
all on a busy machine. So twice as many reads as before must also prove that they deliver more. A local store needs two
or three reads, a redis at 1 ms some more, a bucket at 40 ms dozens.
Source: the delivery-rate samples and the model of BBR (Cardwell et al., ACM Queue 14(5), 2016).

Pure: no clock, no threads; the owner of the reads' lock calls it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

MAX_READS = 64
"""Reads of one store under way at most, unless somebody asks for more."""
MAX_BYTES = 256 << 20
"""... and what they bring, since each holds a staging buffer: beyond it only the least number of reads is started."""
GAIN = 1.5
"""Times what latency and rate call for: below the store's bandwidth this makes the window, and with it the rate, grow,
although latencies scatter."""
SPARE = 2
"""Reads besides, which wait in line, so that the store is not idle while one is verified or placed."""
NUM_LATENCIES = 9
"""Latencies of lone reads that are remembered; their median counts ..."""
NUM_READS, TIMES_LEAST = 32, 2.0
"""... but no more than so many times what the fastest of as many reads took, lone or not: a thread that woke up late,
or a connection that had to be opened, is no latency of the store."""
WORTH = 1.2
"""Twice as many reads stay only where they deliver so many times as much ..."""
LEAST_JUDGED, RETRY = 16, 8
"""... after at least so many of them, and otherwise are tried again after that was looked at so often."""
RISE, FALL = 0.25, 0.125
"""Part of the way to a new rate that is gone where it is higher, or lower: a restoration begins and ends with few reads
under way, which say less than the store can do."""


@dataclass(frozen=True, slots=True)
class ReadSample:
    """What one read told of its store.

    Attributes:
        took_s: What it took.
        width: Reads that were under way once it had begun, itself included.
        reads_per_s: Reads that ended while it was under way, a second.
    """

    took_s: float
    width: int
    reads_per_s: float


@dataclass(frozen=True, slots=True)
class Flight:
    """The beginning of one read; made by ``ReadMeter``."""

    begin_s: float
    since_s: float
    num_ended: int
    width: int


class ReadMeter:
    """Measures one store's reads where they are carried out."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._num_under_way = self._num_ended = 0
        self._since_s = 0.0
        """When the last read ended, or the first of those under way began."""

    def begin(self, now_s: float) -> Flight:
        """Note that a read begins."""
        if not self._num_under_way:
            self._since_s = now_s
        self._num_under_way += 1
        return Flight(begin_s=now_s, since_s=self._since_s, num_ended=self._num_ended, width=self._num_under_way)

    def end(self, flight: Flight, now_s: float, *, brought: bool = True) -> ReadSample | None:
        """Note that a read ended; what it told, None where it brought nothing or took no time."""
        self._num_under_way -= 1
        if not brought:
            return None
        self._num_ended += 1
        self._since_s = now_s
        took_s, since_s = now_s - flight.begin_s, now_s - flight.since_s
        if took_s <= 0:
            return None
        # From the end before it, not from its own beginning: ends that are noticed together are no faster store.
        num_ended = self._num_ended - flight.num_ended
        return ReadSample(took_s=took_s, width=flight.width, reads_per_s=num_ended / since_s)


class ReadWindow:
    """How many reads of one store to keep under way, learned from what they told."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._lone_s: deque[float] = deque(maxlen=NUM_LATENCIES)
        self._recent_s: deque[float] = deque(maxlen=NUM_READS)
        self._latency_s = self._reads_per_s = 0.0
        self._most, self._proven = 0, 0
        self._proven_per_s, self._tries_in = 0.0, 1
        self._num_full, self._sum_per_s = 0, 0.0

    @property
    def latency_s(self) -> float:
        """Seconds that a lone read takes; 0 before there was one."""
        return self._latency_s

    @property
    def ahead_s(self) -> float:
        """Seconds of work that the store must have so that nobody waits for its latency; 0 before that is known."""
        return GAIN * self._latency_s

    def learn(self, sample: ReadSample) -> None:
        """Take in what a read told."""
        self._recent_s.append(sample.took_s)
        if sample.width == 1:
            self._lone_s.append(sample.took_s)
        if self._lone_s:
            self._latency_s = min(statistics.median_high(self._lone_s), TIMES_LEAST * min(self._recent_s))
        part = RISE if sample.reads_per_s > self._reads_per_s else FALL
        self._reads_per_s += part * (sample.reads_per_s - self._reads_per_s)
        if sample.width >= self._most:
            self._num_full, self._sum_per_s = self._num_full + 1, self._sum_per_s + self._reads_per_s
            if self._num_full >= max(LEAST_JUDGED, self._most // 2):
                self._judge(self._sum_per_s / self._num_full)
                self._num_full, self._sum_per_s = 0, 0.0

    def _judge(self, reads_per_s: float) -> None:
        """Decide on the most reads that latency and rate may call for, by what so many of them deliver."""
        if self._most == self._proven:  # nothing is tried
            self._proven_per_s = reads_per_s
            self._tries_in -= 1
            if self._tries_in <= 0:
                self._most = 2 * self._proven
        elif reads_per_s >= WORTH * self._proven_per_s:
            self._proven, self._proven_per_s = self._most, reads_per_s
            self._most = 2 * self._proven
        else:
            self._most, self._tries_in = self._proven, RETRY

    def reads(self, *, least: int) -> int:
        """Reads to keep under way: at least so many, at most ``MAX_READS`` unless that is less."""
        if self._proven < max(least, SPARE):
            self._most = self._proven = max(least, SPARE)
        wanted = math.floor(self.ahead_s * self._reads_per_s) + SPARE
        return max(least, min(wanted, self._most, MAX_READS))


class ReadWindows:
    """The windows of a store's tiers, by number; 0 is that of a store without tiers."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._windows: defaultdict[int, ReadWindow] = defaultdict(ReadWindow)

    def __getitem__(self, tier: int) -> ReadWindow:
        """A tier's window."""
        return self._windows[tier]
