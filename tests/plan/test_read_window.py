"""How many reads are kept under way, of stores near and far, by a virtual clock."""

import heapq
import random

import pytest

from cacheflow.plan.read_window import MAX_READS, SPARE, ReadMeter, ReadSample, ReadWindow

LEAST = 3


class VirtualStore:
    """A link that moves one object at a time, in front of ``slots`` that take ``latency_s`` for each.

    Without a ``service_s`` there is no link that they share: objects may overtake each other.
    """

    def __init__(self, *, service_s, latency_s, slots=10_000, scatter=0.0, seed=0):
        self.service_s, self.latency_s, self.scatter = service_s, latency_s, scatter
        self._random = random.Random(seed)
        self.free_s = 0.0
        self._slots_s = [0.0] * slots

    def end_s(self, now_s):
        latency_s = self.latency_s * (1 + self.scatter * (2 * self._random.random() - 0.5))
        answered_s = max(now_s, heapq.heappop(self._slots_s)) + latency_s
        heapq.heappush(self._slots_s, answered_s)
        if not self.service_s:
            return answered_s
        self.free_s = max(answered_s, self.free_s) + self.service_s
        return self.free_s


class Reader:
    """Keeps as many reads under way as the window says; what it learns outlives a restoration."""

    def __init__(self, store, *, notices_every_s=0.0, least=LEAST):
        self.store, self.least, self.notices_every_s = store, least, notices_every_s
        self.window, self.meter = ReadWindow(), ReadMeter()
        self.now_s = 0.0

    def restore(self, num_reads):
        """Reads under way, as each of them began, and how many a second there were in the second half."""
        self.now_s += 10.0
        under_way, widths, left, ends = [], [], num_reads, []
        while left or under_way:
            while left and len(under_way) < self.window.reads(least=self.least):
                begun = self.meter.begin(self.now_s)
                heapq.heappush(under_way, (self.store.end_s(self.now_s), left, begun))
                left -= 1
                widths.append(len(under_way))
            self.now_s = max(self.now_s + self.notices_every_s, under_way[0][0])
            while under_way and under_way[0][0] <= self.now_s:
                _, _, begun = heapq.heappop(under_way)
                sample = self.meter.end(begun, self.now_s)
                if sample is not None:
                    self.window.learn(sample)
                ends.append(self.now_s)
        half = len(ends) // 2
        return widths, (len(ends) - half) / (ends[-1] - ends[half - 1])


@pytest.mark.parametrize("service_s", [0.0002, 0.004, 0.3])
def test_a_store_nearby_is_read_as_before(service_s):
    reader = Reader(VirtualStore(service_s=service_s, latency_s=0.0))
    for _ in range(5):
        widths, rate = reader.restore(60)
        assert max(widths) == LEAST
        assert rate == pytest.approx(1 / service_s)


@pytest.mark.parametrize(("latency_s", "service_s"), [(0.001, 0.0005), (0.04, 0.004), (0.04, 0.001), (0.2, 0.01)])
def test_the_window_holds_what_bandwidth_and_latency_call_for_and_no_more(latency_s, service_s):
    needed = latency_s / service_s + 1
    reader = Reader(VirtualStore(service_s=service_s, latency_s=latency_s))
    reader.restore(200)
    for _ in range(3):
        widths, rate = reader.restore(400)
        assert rate >= 0.97 / service_s
        assert needed - 1 <= max(widths) <= 1.5 * needed + SPARE + 1


def test_a_narrow_window_is_what_holds_a_far_store_back():
    """The fault that the window is for: three reads deliver a fifteenth of what the store could."""
    reader = Reader(VirtualStore(service_s=0.001, latency_s=0.04))
    reader.window.reads = lambda *, least: least
    assert reader.restore(100)[1] < 0.08 / 0.001


def test_the_window_is_there_within_the_first_restoration():
    widths, _ = Reader(VirtualStore(service_s=0.002, latency_s=0.04)).restore(120)
    assert max(widths) >= 21


@pytest.mark.parametrize("slots", [4, 16])
def test_a_store_of_so_many_connections_is_not_asked_for_many_more(slots):
    """Without a bandwidth that they share: S3 through a pool of threads."""
    reader = Reader(VirtualStore(service_s=0.0, latency_s=0.04, slots=slots))
    for _ in range(4):
        widths, rate = reader.restore(300)
    assert rate >= 0.9 * slots / 0.04
    assert max(widths) <= 2.25 * slots + SPARE  # they end together, so some samples say a little more


@pytest.mark.parametrize("seed", range(3))
def test_latencies_that_scatter_do_not_hold_it_back(seed):
    """From half to two and a half times the usual, once the first few restorations were not lucky alone."""
    reader = Reader(VirtualStore(service_s=0.0, latency_s=0.04, slots=20, scatter=1.0, seed=seed))
    for _ in range(6):
        widths, rate = reader.restore(400)
    assert rate >= 0.9 * 20 / 0.06
    assert max(widths) <= MAX_READS


def test_ends_that_are_noticed_together_are_no_faster_store():
    reader = Reader(VirtualStore(service_s=0.004, latency_s=0.0), notices_every_s=0.05)
    for _ in range(4):
        widths, _ = reader.restore(200)
    # What waits to be noticed is under way: 50 ms of the link and one read.
    assert max(widths) <= 1.5 * (0.05 / 0.004 + 1) + SPARE + 1


def test_a_link_that_falls_has_less_under_way():
    store = VirtualStore(service_s=0.001, latency_s=0.04)
    reader = Reader(store)
    before, _ = reader.restore(400)
    store.service_s = 0.008
    reader.restore(100)
    after, rate = reader.restore(100)
    assert max(before) >= 40
    assert max(after) <= 1.5 * (0.04 / 0.008 + 1) + SPARE + 1
    assert rate == pytest.approx(1 / 0.008)


def test_more_reads_that_bring_nothing_more_are_taken_back():
    """Whatever latency and rate call for."""
    window, widths = ReadWindow(), []
    for _ in range(1000):
        widths.append(window.reads(least=LEAST))
        window.learn(ReadSample(took_s=1.0, width=1, reads_per_s=1000.0))
        window.learn(ReadSample(took_s=1.0, width=widths[-1], reads_per_s=1000.0))
    assert set(widths) == {LEAST, 2 * LEAST}
    assert widths.count(LEAST) > 0.8 * len(widths)


def test_it_forgets_a_latency_that_is_no_more():
    store = VirtualStore(service_s=0.001, latency_s=0.04)
    reader = Reader(store)
    for _ in range(9):
        reader.restore(100)
    store.latency_s = 0.001
    for _ in range(9):
        reader.restore(100)
    assert reader.window.latency_s == pytest.approx(0.002)
    assert max(reader.restore(100)[0]) <= 1.5 * 2 + SPARE


def test_lone_reads_that_a_busy_machine_held_up_are_no_latency_of_the_store():
    """Each restoration's first read waits for a thread that wakes up 30 ms late."""
    reader = Reader(VirtualStore(service_s=0.0005, latency_s=0.0))
    for _ in range(20):
        reader.store.free_s = reader.now_s + 10.03
        assert max(reader.restore(100)[0]) <= 12


def test_it_is_bounded_and_never_below_what_is_asked_for():
    window = ReadWindow()
    assert window.reads(least=1) == SPARE
    window.learn(ReadSample(took_s=1.0, width=1, reads_per_s=1000.0))
    for width in (8, 16, 32, 64):
        while window.reads(least=8) == width < MAX_READS:
            window.learn(ReadSample(took_s=1.0, width=width, reads_per_s=1000.0 * width))
        assert window.reads(least=8) == min(MAX_READS, 2 * width)
    assert window.reads(least=8) == MAX_READS
    assert window.reads(least=100) == 100
    assert window.ahead_s == 1.5


def test_what_brought_nothing_tells_nothing():
    meter = ReadMeter()
    first, second = meter.begin(1.0), meter.begin(1.0)
    assert meter.end(first, 1.001, brought=False) is None, "a miss is quick"
    assert meter.end(second, 1.5) == ReadSample(took_s=0.5, width=2, reads_per_s=2.0)
    assert meter.end(meter.begin(2.0), 2.0) is None, "in no time"
    assert meter.end(meter.begin(3.0), 3.5) == ReadSample(took_s=0.5, width=1, reads_per_s=2.0)
