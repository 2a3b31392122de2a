from __future__ import annotations

import pytest

from cacheflow.plan.problem import LinkCost
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.link import SimulatedLink


def test_events_run_by_time_then_priority_then_age():
    loop, seen = EventLoop(), []
    for name, time_s, priority in (("late", 2.0, 0), ("b", 1.0, 1), ("a", 1.0, 0), ("c", 1.0, 1)):
        loop.at(time_s, lambda name=name: seen.append((name, loop.now_s)), priority=priority)
    loop.run(until_s=1.5)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    loop.run()
    assert seen[-1] == ("late", 2.0)


def test_nothing_happens_in_the_past():
    loop = EventLoop()
    loop.at(1.0, lambda: None)
    loop.run()
    with pytest.raises(ValueError, match="was asked for at"):
        loop.at(0.5, lambda: None)


def test_reads_queue_and_only_the_first_waits_for_the_latency():
    loop, ends = EventLoop(), []
    link = SimulatedLink(loop, LinkCost(bytes_per_s=100.0, latency_s=0.5))
    for size in (100, 200):
        link.read(size, lambda busy_s: ends.append((loop.now_s, busy_s)))
    loop.run()
    assert ends == [(1.5, 1.0), (3.5, 2.0)]
    assert (link.busy_s, link.moved_bytes) == (3.0, 300)
    link.read(100, lambda busy_s: ends.append((loop.now_s, busy_s)))
    loop.run()
    assert ends[-1] == (5.0, 1.0)
