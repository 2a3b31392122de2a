"""One of several stores that hold the same objects: whether it delivers, how fast, and what waits to be written to it.

A tier that under-delivers (reads that fail or hang, or come far slower than was measured) is taken out: nobody reads
from it, asks it or waits for it until a probe, a read of its own thread, was answered in time. So a tier that hangs
costs the reads that are under way when it begins to, and no request after those.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import TimeoutError
from typing import TypeVar

import numpy as np

from cacheflow.stores.asker import Asker
from cacheflow.stores.base import GetRequest, Priority, Store, TierStats
from cacheflow.stores.breaker import SILENCE_S, Breaker
from cacheflow.stores.copy_queue import CopyQueue
from cacheflow.stores.keys import ObjectKey, ObjectKind
from cacheflow.stores.meter import Meter
from cacheflow.threads import start_thread
from cacheflow.types import Clock, LoadOutcome

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHANGING = (ObjectKind.NEXT, ObjectKind.IDENTITY)
"""Notes: read from and written to the slowest tier first, and not copied to others."""
ANSWERS = (LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.CORRUPT)
"""What a store says that works, whatever it holds."""
MAX_STRIKES = 3
"""A tier is out after so many failed reads in a row."""
PATIENCE_S = 1.0
"""A read may always take so long ..."""
SLOWNESS = 8.0
"""... and so many times what it should take, all that is under way included, before the tier counts as hung."""
LEAST_STRIKE_S = 0.02
"""A read that was given up sooner is no failure of the tier."""
FAR_BELOW = 32.0
"""A tier is out that delivers so many times less than was measured, with a read that took so many times what it should
have: small objects take the latency, and deliver little wherever they lie. Large, because reads that were measured may
have come out of a cache. What lies above is for the plans, which know how fast each tier is."""
NUM_READS = 8
"""Reads before that is judged."""
TRUST_READS = 3
"""Reads before their bandwidth counts instead of the one that was measured at the start."""
QUESTION_S = 2.0
"""Longest wait for what a tier says without a deadline of the caller's, such as which objects it holds ..."""
QUESTION_KEY_S = 0.005
"""... and so much longer for each object that is asked for: a bucket is asked for one after the other."""
LONGEST_SILENCE_S = 60.0
"""Longest time between two probes of a tier that is out."""
UNKNOWN_BYTES_PER_S = 100e6
"""Of a tier that nobody has measured or read from; only how long to wait for it is judged by this."""
UNKNOWN_LATENCY_S = 0.002
"""The same of its latency."""

RACE_TIMES = 4.0
"""A read is asked of the next tier too after so many times what the tier's recent reads took, or what all that is
under way should take, whichever is longer ..."""
LEAST_RACE_S = 0.02
"""... and not before this."""
RACE_READS = 16
"""Reads before that can be judged."""
RACE_SHARE = 0.05
"""Of a tier's reads so many are asked of the next one too, at most (and one more): a tier that has become slow must not
double the load of the one after it ..."""
RACE_BURST = 4.0
"""... and no more than these at once, however many were not used."""
APART_READS = 64
"""Reads into buffers of their own after one that was slow."""


class Tier:
    """A store among others, owned by a ``TieredStore``. Thread-safe.

    Attributes:
        name: For people, logs and metrics.
        store: The store.
        copies: What waits to be written to it.
    """

    def __init__(
        self, name: str, store: Store, *, copy_bytes: int, clock: Clock, probe_after_s: float = SILENCE_S
    ) -> None:
        """Start in service.

        Args:
            name: For people, logs and metrics.
            store: The store; closed with this tier.
            copy_bytes: Bound on what waits to be written to it.
            clock: Monotonic clock.
            probe_after_s: Seconds from going out of service to the first probe.
        """
        self.name, self.store = name, store
        self.copies = CopyQueue(name, store, capacity_bytes=copy_bytes, delivers=lambda: self.delivers)
        self._clock = clock
        self._breaker = Breaker(name, clock=clock, silence_s=probe_after_s, longest_s=LONGEST_SILENCE_S)
        self._asker = Asker("cacheflow-tier", num_threads=2) if store.capabilities().shared else None
        self._lock = threading.Lock()
        self._unread = threading.Condition(self._lock)
        self._closed = threading.Event()
        self._meter = Meter()
        self._num_reads = self._strikes = self._in_flight_bytes = 0
        self._promised_bytes_per_s: float | None = None
        self._promised_latency_s = UNKNOWN_LATENCY_S
        self._out_since_s: float | None = None
        self._num_outages = 0
        self._races_left, self._num_apart = 1.0, 0
        self._num_raced = self._num_overtaken = 0
        self._suspect = ObjectKey(namespace="0" * 32, chain_hash=uuid.uuid4().hex * 2, kind=ObjectKind.NEXT), 64

    @property
    def delivers(self) -> bool:
        """Whether it is in service."""
        return self._out_since_s is None

    @property
    def may_hang(self) -> bool:
        """Whether to ask it what it holds is more than a look at this process's memory."""
        return self._asker is not None

    @property
    def bytes_per_s(self) -> float | None:
        """Its bandwidth: of recent reads of cells, or what was promised before there were any; None when unknown."""
        with self._lock:
            return self._bytes_per_s()

    def _bytes_per_s(self) -> float | None:
        seen = self._seen_bytes_per_s() if self._num_reads >= TRUST_READS else None
        return self._promised_bytes_per_s if seen is None else seen

    def _seen_bytes_per_s(self) -> float | None:
        return self._meter.snapshot(num_objects=0, used_bytes=0, num_evicted=0).read_bytes_per_s

    def promise(self, *, bytes_per_s: float, latency_s: float) -> None:
        """Take note of what its link was measured to do."""
        with self._lock:
            self._promised_bytes_per_s, self._promised_latency_s = bytes_per_s, latency_s

    # What it holds.

    def ask(self, question: Callable[[], T], nothing: T, *, num_keys: int) -> T:
        """Ask its store something without a deadline; ``nothing`` while it is out, or where the answer is late."""
        if not self.delivers:
            return nothing
        if self._asker is None:
            return question()
        future = self._asker.ask(question, nothing)
        patience_s = QUESTION_S + num_keys * QUESTION_KEY_S
        try:
            return future.result(patience_s)
        except TimeoutError:
            future.cancel()
            self._take_out(f"a question about {num_keys} objects was not answered for {patience_s:.3g} s")
            return nothing

    def tell(self, order: Callable[[], T], nothing: T) -> T:
        """Have its store do something, later where it cannot be now: what is deleted must not come back.

        Returns:
            What came of it; ``nothing`` while the tier is out, or where that takes long, which is no failure.
        """
        if self._asker is None:
            return order()
        future = self._asker.ask(order, nothing)
        try:
            return future.result(QUESTION_S) if self.delivers else nothing
        except TimeoutError:
            return nothing

    # Reads.

    def begin_read(self, num_bytes: int) -> float:
        """Note a read under way; returns the seconds after which the tier counts as hung."""
        with self._lock:
            self._in_flight_bytes += num_bytes
            self._races_left = min(RACE_BURST, self._races_left + RACE_SHARE)
            self._num_apart = max(0, self._num_apart - 1)
            return PATIENCE_S + SLOWNESS * self._expected_s()

    # Races, see ``routed``.

    @property
    def reads_apart(self) -> bool:
        """Whether a read that begins now is likely enough to be slow that it should not hold its caller's buffer."""
        return self._num_apart > 0

    def race_after_s(self) -> float:
        """Seconds after which a read that begins now is slow; ``inf`` while too little is known."""
        with self._lock:
            took_s = self._meter.read_latency_s
            if self._num_reads < RACE_READS or took_s is None:
                return float("inf")
            return max(LEAST_RACE_S, RACE_TIMES * max(took_s, self._expected_s()))

    def begin_race(self) -> bool:
        """Note a slow read; whether it may be asked of the next tier too."""
        with self._lock:
            self._num_apart = APART_READS
            if self._races_left < 1:
                return False
            self._races_left -= 1
            self._num_raced += 1
            return True

    def note_overtaken(self) -> None:
        """Note that the next tier was faster."""
        with self._lock:
            self._num_overtaken += 1

    def _expected_s(self) -> float:
        """Seconds for all that is under way."""
        return self._promised_latency_s + self._in_flight_bytes / (self._bytes_per_s() or UNKNOWN_BYTES_PER_S)

    def wait_until_unread(self, timeout_s: float) -> bool:
        """Wait until no read is under way that somebody waits for; whether that is so."""
        with self._lock:
            return self._unread.wait_for(lambda: not self._in_flight_bytes, timeout_s)

    def end_read(
        self, key: ObjectKey, num_bytes: int, outcome: LoadOutcome, *, start_s: float, patience_s: float
    ) -> None:
        """Note how a read ended; anything but an answer or an ``ERROR`` means that nobody waits for it any more.

        Args:
            key: What was read.
            num_bytes: Bytes that were asked for.
            outcome: How it ended.
            start_s: When it began, on the tier's clock.
            patience_s: What ``begin_read`` said.
        """
        end_s, failure = self._clock(), ""
        with self._lock:
            expected_s = self._expected_s()
            self._in_flight_bytes -= num_bytes
            if not self._in_flight_bytes:
                self._unread.notify_all()
            if outcome in ANSWERS:
                self._strikes = 0
                if outcome is LoadOutcome.OK and key.kind not in CHANGING:
                    failure = self._note_speed(num_bytes, start_s=start_s, end_s=end_s)
            elif outcome is LoadOutcome.ERROR:
                self._strikes += 1
            elif end_s - start_s >= patience_s:
                self._strikes = MAX_STRIKES
            elif end_s - start_s >= max(LEAST_STRIKE_S, SLOWNESS * expected_s):
                self._strikes += 1
            if self._strikes >= MAX_STRIKES:
                failure = f"reads fail or hang, the last one ended as {outcome.value} after {end_s - start_s:.2g} s"
            if failure:
                self._suspect = key, num_bytes
        if failure:
            self._take_out(failure)

    def _note_speed(self, num_bytes: int, *, start_s: float, end_s: float) -> str:
        """Take in a read; why that makes the tier useless, or nothing."""
        self._meter.record_get(LoadOutcome.OK, num_bytes, start_s=start_s, end_s=end_s)
        self._num_reads += 1
        seen, promised = self._seen_bytes_per_s(), self._promised_bytes_per_s
        if self._num_reads < NUM_READS or seen is None or promised is None or seen * FAR_BELOW >= promised:
            return ""
        if end_s - start_s < FAR_BELOW * (self._promised_latency_s + num_bytes / promised):
            return ""
        return f"it delivers {seen / 1e6:.3g} MB/s, {promised / 1e6:.3g} MB/s were measured"

    # Out of service.

    def _take_out(self, why: str) -> None:
        with self._lock:
            if self._out_since_s is not None or self._closed.is_set():
                return
            self._out_since_s = self._clock()
            self._num_outages += 1
            self._breaker.trip()
        if start_thread(self._probe, name="cacheflow-tier-probe") is None:
            with self._lock:  # it stays in service: nobody would bring it back
                self._out_since_s = None
                self._num_outages -= 1
            return
        logger.warning("tier %s is taken out of service: %s. It is probed until it delivers", self.name, why)

    def _probe(self) -> None:
        while not self._closed.wait(self._breaker.left_s):
            try:
                is_back = self._is_back()
            except Exception:  # a bug in the store, or no memory: it must not end the probes
                logger.exception("tier %s could not be probed", self.name)
                is_back = False
            if is_back:
                with self._lock:
                    out_s = self._clock() - (self._out_since_s or 0.0)
                    self._meter, self._num_reads, self._strikes = Meter(), 0, 0
                    self._breaker.reset()
                    self._out_since_s = None
                logger.warning("tier %s delivers again and is back in service after %.1f s", self.name, out_s)
                return
            self._breaker.trip()

    def _is_back(self) -> bool:
        """Read once more what failed last; a store that hangs holds up this thread alone."""
        key, num_bytes = self._suspect
        self.store.contains([key])
        buffer = np.empty(num_bytes, np.uint8)
        patience_s, start_s = self.begin_read(num_bytes), self._clock()
        try:
            handle = self.store.submit_get([GetRequest(key, buffer)], priority=Priority.AWAITED, deadline_s=patience_s)
            (outcome,) = handle.wait()
            took_s = self._clock() - start_s
            handle.cancel()
        finally:
            with self._lock:
                self._in_flight_bytes -= num_bytes
                promised = self._promised_bytes_per_s
        if outcome is LoadOutcome.OK and promised is not None:
            # Half of what takes it out: or it would go in and out.
            return took_s <= FAR_BELOW / 2 * (self._promised_latency_s + num_bytes / promised)
        return outcome in ANSWERS

    def stats(self) -> TierStats:
        """What it did."""
        copies = self.copies.counts()
        return TierStats(
            name=self.name,
            delivers=self.delivers,
            num_outages=self._num_outages,
            bytes_per_s=self.bytes_per_s,
            num_copied=copies.num_written,
            num_dropped=copies.num_dropped,
            num_promoted=copies.num_promoted,
            num_unpromoted=copies.num_unpromoted,
            num_raced=self._num_raced,
            num_overtaken=self._num_overtaken,
            store=self.store.stats(),
        )

    def close(self) -> None:
        """Close the store; what waits to be written is lost."""
        self._closed.set()
        self.copies.close()
        if self._asker is not None:
            self._asker.close()
        self.store.close()
