"""The arithmetic of a link, on a clock of numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.link import LinkSchedule


def test_transfers_queue_behind_each_other_and_idle_time_is_lost():
    link = LinkSchedule(100.0)
    first = link.submit(200, now_s=10.0)
    second = link.submit(50, now_s=10.5)
    assert link.done_at_s(first) == pytest.approx(12.0)
    assert link.done_at_s(second) == pytest.approx(12.5)
    late = link.submit(100, now_s=20.0)
    assert link.done_at_s(late) == pytest.approx(21.0)
    assert link.done_at_s(first) == pytest.approx(12.0)


def test_a_late_wake_up_does_not_delay_what_is_queued():
    link = LinkSchedule(100.0)
    tickets = [link.submit(100, now_s=0.0) for _ in range(3)]
    link.forget(tickets[0], now_s=1.7)  # noticed 0.7 s late
    next_one = link.submit(100, now_s=1.7)
    assert [link.done_at_s(ticket) for ticket in (*tickets[1:], next_one)] == pytest.approx([2.0, 3.0, 4.0])


def test_a_larger_priority_overtakes_the_queue_but_not_what_is_under_way():
    link = LinkSchedule(1.0)
    running, low, other_low = (link.submit(1, now_s=0.0) for _ in range(3))
    high = link.submit(1, now_s=0.5, priority=1)
    done = [link.done_at_s(ticket) for ticket in (running, high, low, other_low)]
    assert done == pytest.approx([1.0, 2.0, 3.0, 4.0])


def test_a_change_of_bandwidth_reaches_what_is_under_way():
    link = LinkSchedule(100.0)
    running, queued = link.submit(100, now_s=0.0), link.submit(100, now_s=0.0)
    link.set_bandwidth(25.0, now_s=0.5)
    assert link.bytes_per_s == 25.0
    assert link.done_at_s(running) == pytest.approx(0.5 + 50 / 25)
    assert link.done_at_s(queued) == pytest.approx(0.5 + 150 / 25)


def test_a_change_after_bytes_comes_at_that_byte():
    link = LinkSchedule(100.0)
    done = link.submit(60, now_s=0.0)
    link.set_bandwidth(10.0, now_s=1.0, after_bytes=50)
    link.set_bandwidth(1000.0, now_s=1.0, after_bytes=70)
    slow = link.submit(100, now_s=1.0)
    assert link.done_at_s(done) == pytest.approx(0.6)
    assert link.done_at_s(slow) == pytest.approx(1.0 + 50 / 100 + 20 / 10 + 30 / 1000)
    assert link.bytes_per_s == 100.0


def test_what_proves_shorter_ends_sooner_and_so_does_what_waits():
    link = LinkSchedule(1.0)
    through, running, queued = (link.submit(10, now_s=0.0) for _ in range(3))
    for ticket in (through, running, queued):
        link.shorten(ticket, 4, now_s=15.0)
    assert link.done_at_s(through) == pytest.approx(10.0)
    assert link.done_at_s(running) == pytest.approx(16.0)
    assert link.done_at_s(queued) == pytest.approx(22.0)
    link.shorten(queued, 100, now_s=18.0)
    assert link.done_at_s(queued) == pytest.approx(18.0), "what was moved in vain is not given back"
    assert link.done_at_s(link.submit(1, now_s=18.0)) == pytest.approx(19.0)


def test_forgetting_leaves_the_rest_of_the_link_to_the_others():
    link = LinkSchedule(1.0)
    running, queued, last = (link.submit(10, now_s=0.0) for _ in range(3))
    link.forget(queued, now_s=1.0)
    assert link.done_at_s(last) == pytest.approx(20.0)
    link.forget(running, now_s=4.0)
    assert link.done_at_s(last) == pytest.approx(14.0)


def test_transfers_of_no_bytes_and_links_without_limit_take_no_time():
    link = LinkSchedule(float("inf"))
    assert link.done_at_s(link.submit(10**12, now_s=3.0)) == 3.0
    slow = LinkSchedule(1.0)
    assert slow.done_at_s(slow.submit(0, now_s=5.0)) == 5.0


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0, float("nan")])
def test_a_link_that_never_delivers_is_refused(bytes_per_s):
    with pytest.raises(ConfigError, match="must be above 0"):
        LinkSchedule(bytes_per_s)
    with pytest.raises(ConfigError, match="must be above 0"):
        LinkSchedule(1.0).set_bandwidth(bytes_per_s, now_s=0.0)
    with pytest.raises(ConfigError, match="0 or more"):
        LinkSchedule(1.0).set_bandwidth(1.0, now_s=0.0, after_bytes=-1.0)


@settings(deadline=None)
@given(
    transfers=st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 10)), min_size=1, max_size=20),
    bytes_per_s=st.floats(1, 1e6),
)
def test_it_is_max_of_now_and_free_plus_bytes_over_bandwidth(transfers, bytes_per_s):
    link = LinkSchedule(bytes_per_s)
    now_s, free_at_s = 0.0, float("-inf")
    for num_bytes, pause_s in transfers:
        now_s += pause_s
        ticket = link.submit(num_bytes, now_s=now_s)
        free_at_s = max(now_s, free_at_s) + num_bytes / bytes_per_s
        assert link.done_at_s(ticket) == pytest.approx(free_at_s)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=10),
    changes=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 1e4)), max_size=6),
)
def test_no_byte_is_lost_or_doubled_by_changes_of_bandwidth(sizes, changes):
    link = LinkSchedule(100.0)
    tickets = [link.submit(size, now_s=0.0) for size in sizes]
    now_s, rate, left = 0.0, 100.0, float(sum(sizes))
    for pause_s, bytes_per_s in changes:
        left -= min(left, pause_s * rate)
        now_s, rate = now_s + pause_s, bytes_per_s
        link.set_bandwidth(bytes_per_s, now_s=now_s)
    if left > 1e-6:
        assert link.done_at_s(tickets[-1]) == pytest.approx(now_s + left / rate)
    assert [link.done_at_s(ticket) for ticket in tickets] == sorted(link.done_at_s(ticket) for ticket in tickets)
