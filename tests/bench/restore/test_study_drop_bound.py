"""The bound over a link whose bandwidth falls on the way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.bound import bound
from cacheflow.plan.problem import LinkCost
from support.examples import examples
from support.problems import transformer_problem

pytestmark = pytest.mark.torch  # the module lies beside links that need it

CLOSE = 1e-6


def problems():
    return st.builds(
        transformer_problem,
        num_tokens=st.sampled_from([512, 1024, 1700, 3072]),
        suffix_tokens=st.sampled_from([0, 16, 256, 1500]),
        ratio=st.sampled_from([0.1, 0.5, 1.0, 2.0, 8.0]),
        num_blocks=st.sampled_from([1, 3, 6]),
    )


def at(problem, factor):
    """The bound over a link that has this share of the bandwidth from the start."""
    from dataclasses import replace

    return bound(replace(problem, link=LinkCost(bytes_per_s=problem.link.bytes_per_s * factor)))


def with_drop(problem, factor, share):
    """The bound when the link falls to ``factor`` after ``share`` of the prefix's bytes."""
    from cacheflow.bench.restore.drop_bound import bound_with_drop
    from cacheflow.bench.restore.link import LinkDrop

    num_bytes = int(problem.load_bytes_KB.sum() * share)
    return bound_with_drop(problem, LinkDrop(factor=factor, after_bytes=num_bytes))


def times(least):
    return least.restore_s, least.ttft_s


shares = st.floats(0.0, 1.0)
factors = st.floats(0.05, 1.0)


@settings(max_examples=examples(20))
@given(problems(), factors, shares)
def test_a_drop_costs_at_most_a_link_that_was_slow_from_the_start(problem, factor, share):
    low, high = at(problem, 1.0), at(problem, factor)
    for least, full, slow in zip(times(with_drop(problem, factor, share)), times(low), times(high), strict=True):
        assert full * (1 - CLOSE) <= least <= slow * (1 + CLOSE)


@settings(max_examples=examples(15))
@given(problems(), factors, factors, shares)
def test_a_deeper_drop_never_helps(problem, one, other, share):
    deep, shallow = with_drop(problem, min(one, other), share), with_drop(problem, max(one, other), share)
    for slower, faster in zip(times(deep), times(shallow), strict=True):
        assert slower >= faster * (1 - CLOSE)


@settings(max_examples=examples(15))
@given(problems(), factors, shares, shares)
def test_an_earlier_drop_never_helps(problem, factor, one, other):
    early, late = with_drop(problem, factor, min(one, other)), with_drop(problem, factor, max(one, other))
    for slower, faster in zip(times(early), times(late), strict=True):
        assert slower >= faster * (1 - CLOSE)


@settings(max_examples=examples(15))
@given(problems(), factors, st.floats(1.0, 5.0))
def test_a_drop_behind_the_last_byte_never_happens(problem, factor, share):
    assert times(with_drop(problem, factor, share + 1e-3)) == pytest.approx(times(bound(problem)), rel=CLOSE)


@settings(max_examples=examples(10))
@given(problems(), shares)
def test_a_drop_to_the_same_bandwidth_is_none(problem, share):
    assert times(with_drop(problem, 1.0, share)) == pytest.approx(times(bound(problem)), rel=CLOSE)


@settings(max_examples=examples(10))
@given(problems(), factors)
def test_a_drop_before_the_first_byte_is_a_slow_link(problem, factor):
    assert times(with_drop(problem, factor, 0.0)) == pytest.approx(times(at(problem, factor)), rel=CLOSE)


@settings(max_examples=examples(15))
@given(problems(), factors, shares)
def test_neither_pure_way_beats_it(problem, factor, share):
    num_bytes, full = int(problem.load_bytes_KB.sum()), problem.link.bytes_per_s
    before = min(num_bytes, int(num_bytes * share))
    load_s = before / full + (num_bytes - before) / (full * factor)
    least = with_drop(problem, factor, share)
    assert least.restore_s <= min(load_s, problem.recompute_s) * (1 + CLOSE)
    assert least.ttft_s <= (min(load_s, problem.recompute_s) + problem.suffix_s) * (1 + CLOSE)
