"""How many reads of a store to keep under way: as many as deliver its bandwidth, and no more.

By Little's law a store that answers a lone read after ``latency`` seconds delivers ``rate`` reads a second with
``rate * latency`` of them under way. The latency counts where nothing else was under way when the read began, since
later reads also wait in line; the rate is what was delivered while a read was under way. While more reads bring more,
the rate rises and the window with it; once they only wait, neither does. A local store needs two or three reads, a
redis at 1 ms some more, a bucket at 40 ms dozens.
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
"""Latencies of lone reads that are remembered; their median counts."""
RISE, FALL = 0.5, 0.125
"""Part of the way to a new rate that is gone where it is higher, or lower: a restoration begins and ends with few reads
under way, which say less than the store can do."""


@dataclass(frozen=True, slots=True)
class ReadSample:
    """What one read told of its store.

    Attributes:
        latency_s: What it took; None where others were under way when it began.
        reads_per_s: Reads that ended while it was under way, a second.
    """

    latency_s: float | None
    reads_per_s: float


@dataclass(frozen=True, slots=True)
class Flight:
    """The beginning of one read; made by ``ReadMeter``."""

    begin_s: float
    since_s: float
    num_ended: int
    alone: bool


class ReadMeter:
    """Measures one store's reads where they are carried out."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._num_under_way = self._num_ended = 0
        self._since_s = 0.0
        """When the last read ended, or the first of those under way began."""

    def begin(self, now_s: float) -> Flight:
        """Note that a read begins."""
        alone = self._num_under_way == 0
        if alone:
            self._since_s = now_s
        self._num_under_way += 1
        return Flight(begin_s=now_s, since_s=self._since_s, num_ended=self._num_ended, alone=alone)

    def end(self, flight: Flight, now_s: float, *, brought: bool = True) -> ReadSample | None:
        """Note that a read ended; what it told, None where it brought nothing or took no time."""
        self._num_under_way -= 1
        if not brought:
            return None
        self._num_ended += 1
        self._since_s = now_s
        took_s = now_s - flight.since_s
        if took_s <= 0:
            return None
        # From the end before it, not from its own beginning: ends that are noticed together are no faster store.
        return ReadSample(
            latency_s=now_s - flight.begin_s if flight.alone else None,
            reads_per_s=(self._num_ended - flight.num_ended) / took_s,
        )


class ReadWindow:
    """How many reads of one store to keep under way, learned from what they told."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._latencies: deque[float] = deque(maxlen=NUM_LATENCIES)
        self._latency_s = self._reads_per_s = 0.0

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
        if sample.latency_s is not None:
            self._latencies.append(sample.latency_s)
            self._latency_s = statistics.median_high(self._latencies)
        part = RISE if sample.reads_per_s > self._reads_per_s else FALL
        self._reads_per_s += part * (sample.reads_per_s - self._reads_per_s)

    def reads(self, *, least: int) -> int:
        """Reads to keep under way: at least so many, at most ``MAX_READS`` unless that is less."""
        wanted = math.floor(self.ahead_s * self._reads_per_s) + SPARE
        return max(least, min(wanted, MAX_READS))


class ReadWindows:
    """The windows of a store's tiers, by number; 0 is that of a store without tiers."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self._windows: defaultdict[int, ReadWindow] = defaultdict(ReadWindow)

    def __getitem__(self, tier: int) -> ReadWindow:
        """A tier's window."""
        return self._windows[tier]
