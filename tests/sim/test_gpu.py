from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.sim.clock import EventLoop
from cacheflow.sim.gpu import Gpu


def make_gpu(step_s=lambda num, tokens: 0.01, budget_s=0.1):
    loop, ended = EventLoop(), {}
    return loop, Gpu(loop, step_s, budget_s=budget_s, ended=lambda name: ended.__setitem__(name, loop.now_s)), ended


def test_an_order_alone_takes_what_it_says():
    loop, gpu, _ = make_gpu()
    ends = []
    gpu.run(0.35, lambda: ends.append(loop.now_s))
    assert not gpu.acquire()
    loop.run()
    assert ends == [0.35]
    assert (gpu.given_busy_s, gpu.decode_busy_s) == (0.35, 0.0)


def test_a_decode_step_follows_every_budget_of_orders():
    """3.5 budgets of orders: three steps of 10 ms; half a budget carries over to the next order."""
    loop, gpu, ended = make_gpu(budget_s=0.125)
    gpu.decode(7, context_tokens=100, num_tokens=4)
    ends = []
    gpu.run(0.4375, lambda: ends.append(loop.now_s))
    loop.run()
    assert ends == [pytest.approx(0.4675)]
    assert gpu.decoded_tokens == 3
    gpu.run(0.0625, lambda: ends.append(loop.now_s))
    loop.run()
    assert ends[1] == pytest.approx(0.54)
    assert ended == {7: pytest.approx(0.54)}


def test_a_request_that_ends_within_an_order_ends_at_its_step():
    loop, gpu, ended = make_gpu()
    gpu.decode(1, context_tokens=100, num_tokens=2)
    gpu.run(1.0, lambda: None)
    loop.run()
    assert ended == {1: pytest.approx(0.22)}
    assert gpu.given_busy_s + gpu.decode_busy_s == pytest.approx(loop.now_s)


def test_steps_without_orders_are_one_event_and_an_order_waits_for_the_step_under_way():
    loop, gpu, ended = make_gpu()
    gpu.decode(1, context_tokens=100, num_tokens=100)
    gpu.leave()
    started = []
    gpu.wake = lambda: started.append(loop.now_s) or gpu.run(0.05, gpu.leave)
    loop.at(0.234, lambda: started.append(gpu.acquire()))
    loop.run(until_s=0.3)
    assert started == [False, pytest.approx(0.24)]
    gpu.wake = lambda: None
    loop.run()
    assert ended == {1: pytest.approx(1.05)}
    assert gpu.decoded_tokens == 100


def test_a_step_costs_what_all_contexts_cost():
    """Two requests of 10 and 20 tokens of context: steps read 30, 32, 34 tokens."""
    loop, gpu, _ = make_gpu(step_s=lambda num, tokens: tokens * 0.01)
    gpu.decode(1, context_tokens=10, num_tokens=3)
    gpu.decode(2, context_tokens=20, num_tokens=3)
    gpu.leave()
    loop.run()
    assert loop.now_s == pytest.approx(0.96)


def test_no_budget_is_refused():
    with pytest.raises(ConfigError, match="recompute_budget_s is 0"):
        make_gpu(budget_s=0)


@given(
    tokens=st.lists(st.integers(1, 30), max_size=6),
    orders=st.lists(st.tuples(st.floats(0.0, 2.0), st.floats(0.001, 0.5)), max_size=8),
)
def test_every_request_gets_its_tokens_and_nothing_overlaps(tokens, orders):
    loop, gpu, ended = make_gpu(step_s=lambda num, context: 0.002 * num + 1e-5 * context)
    waiting: list[float] = []

    def pump():
        if waiting and gpu.acquire():
            gpu.run(waiting.pop(), pump)
        elif not waiting and gpu.acquire():
            gpu.leave()

    gpu.wake = pump
    for name, count in enumerate(tokens):
        gpu.decode(name, context_tokens=50, num_tokens=count)
    pump()
    for at_s, seconds in orders:
        loop.at(at_s, lambda seconds=seconds: (waiting.append(seconds), pump()))
    loop.run()
    assert sorted(ended) == list(range(len(tokens)))
    assert gpu.decoded_tokens == sum(tokens)
    assert gpu.num_decoding == 0
    assert gpu.given_busy_s == pytest.approx(sum(seconds for _, seconds in orders))
    assert gpu.given_busy_s + gpu.decode_busy_s <= loop.now_s + 1e-9
