"""Admission against KV memory: what fits goes in, nobody is passed for ever, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, PromptError
from cacheflow.state.batch import Admission


def test_without_a_limit_everybody_goes_in_at_once_in_order():
    door = Admission()
    for name in range(3):
        door.ask(name, 10**9, arrival_s=0.0)
    assert door.admit([2, 0, 1], 0.0) == [2, 0, 1]
    assert door.held_tokens == 3 * 10**9


def test_who_does_not_fit_is_passed_by_who_does_and_goes_in_when_there_is_room():
    door = Admission(100)
    for name, tokens in enumerate((60, 70, 40)):
        door.ask(name, tokens, arrival_s=0.0)
    assert door.admit([0, 1, 2], 0.0) == [0, 2]
    assert door.admit([1], 1.0) == []
    door.release(0)
    assert door.held_tokens == 40
    assert door.admit([1], 2.0) == []
    door.release(2)
    assert door.admit([1], 3.0) == [1]


def test_one_that_has_starved_is_passed_by_nobody():
    door = Admission(100, starvation_s=5.0)
    door.ask(0, 60, arrival_s=0.0)
    assert door.admit([0], 0.0) == [0]
    door.ask(1, 90, arrival_s=1.0)
    door.ask(2, 10, arrival_s=2.0)
    assert door.admit([1, 2], 3.0) == [2]
    door.ask(3, 10, arrival_s=4.0)
    assert door.admit([3, 1], 6.1) == []
    door.release(2)
    door.release(0)
    assert door.admit([3, 1], 6.2) == [1, 3]


@pytest.mark.parametrize("num_tokens", [101, 10**6])
def test_what_can_never_fit_is_refused_with_the_numbers(num_tokens):
    door = Admission(100)
    with pytest.raises(PromptError, match=f"{num_tokens} tokens, memory holds 100"):
        door.ask(0, num_tokens, arrival_s=0.0)
    assert door.admit([], 0.0) == []


@pytest.mark.parametrize("bad", [{"capacity_tokens": 0}, {"starvation_s": 0.0}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Admission(**bad)


def test_a_name_asks_once():
    door = Admission(10)
    door.ask(0, 5, arrival_s=0.0)
    with pytest.raises(ConfigError, match="request 0"):
        door.ask(0, 5, arrival_s=0.0)
    door.release(0)
    door.ask(0, 5, arrival_s=0.0)


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    starvation_s=st.sampled_from([0.5, 3.0, float("inf")]),
    data=st.data(),
)
def test_memory_is_never_overbooked_and_everybody_gets_in(sizes, starvation_s, data):
    door, waiting, inside, now_s, entered = Admission(50, starvation_s=starvation_s), [], [], 0.0, []
    for name, size in enumerate(sizes):
        door.ask(name, size, arrival_s=now_s)
        waiting.append(name)
        now_s += 0.3
    while waiting:
        order = data.draw(st.permutations(waiting))
        starved = [name for name in waiting if now_s - 0.3 * name > starvation_s]
        admitted = door.admit(order, now_s)
        if starved and min(starved) not in admitted:
            assert admitted == [] or set(admitted) <= set(starved)
        assert admitted
        waiting = [name for name in waiting if name not in admitted]
        inside += admitted
        entered += admitted
        assert door.held_tokens == sum(sizes[name] for name in inside) <= 50
        while inside:
            door.release(inside.pop())
        now_s += 1.0
    assert sorted(entered) == list(range(len(sizes)))
