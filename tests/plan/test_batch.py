from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.plan.batch import Ranking, WaitingRequest, bounded, predict_ends
from cacheflow.plan.remaining import Remaining, compute_share, together_s


def waiting(request_id: int, compute_s: float, load_s: float, suffix_s: float = 0.0, arrival_s: float = 0.0):
    return WaitingRequest(request_id=request_id, arrival_s=arrival_s, remaining=Remaining(compute_s, load_s, suffix_s))


seconds = st.floats(0.01, 100.0)


@given(seconds, seconds)
def test_without_new_tokens_both_sides_end_by_the_closed_form(compute_s, load_s):
    assert together_s(compute_s=compute_s, load_s=load_s, suffix_s=0.0) == pytest.approx(
        compute_s * load_s / (compute_s + load_s)
    )


@given(seconds, seconds, st.floats(-100.0, 100.0))
def test_the_share_ends_both_sides_together_or_is_all_or_nothing(compute_s, load_s, ahead_s):
    share = compute_share(compute_s=compute_s, load_s=load_s, ahead_s=ahead_s)
    compute_end_s, link_end_s = ahead_s + share * compute_s, (1 - share) * load_s
    if 0 < share < 1:
        assert compute_end_s == pytest.approx(link_end_s, abs=1e-6)
    elif share == 0:
        assert ahead_s >= load_s - 1e-9
    else:
        assert ahead_s + compute_s <= 1e-9


def test_a_request_alone_ends_as_its_remaining_work_says():
    request = waiting(1, 2.0, 3.0, 0.5)
    assert predict_ends([request])[0].end_s == pytest.approx(request.remaining.alone_s)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=8))
def test_the_pipeline_uses_no_more_than_it_has_and_keeps_the_order(parts):
    requests = [waiting(index, *part) for index, part in enumerate(parts)]
    ends = predict_ends(requests)
    compute_s = link_s = 0.0
    for request, end in zip(requests, ends, strict=True):
        compute_s += end.compute_share * request.remaining.compute_s + request.remaining.suffix_s
        link_s += (1 - end.compute_share) * request.remaining.load_s
        assert end.end_s >= compute_s - 1e-9
        assert end.end_s == pytest.approx(max(compute_s, link_s if end.compute_share < 1 else 0.0))


def test_equal_requests_take_equally_long_one_after_the_other():
    ends = predict_ends([waiting(index, 1.0, 1.0) for index in range(4)])
    assert [end.end_s for end in ends] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_the_link_goes_on_while_compute_runs_new_tokens():
    # 1 s of new tokens first: meanwhile the link brings all of the second request.
    first, second = predict_ends([waiting(0, 0.0, 0.0, 1.0), waiting(1, 1.0, 1.0)])
    assert first.end_s == pytest.approx(1.0)
    assert (second.end_s, second.compute_share) == (pytest.approx(1.0), 0.0)


def test_who_has_waited_too_long_goes_first_in_the_order_of_arrival():
    requests = [waiting(0, 9, 9, arrival_s=0.0), waiting(1, 1, 1, arrival_s=4.0), waiting(2, 5, 5, arrival_s=1.0)]
    order = Ranking(compute=(1, 2, 0), link=(1, 0, 2))
    in_order_of_arrival = sorted(requests, key=lambda request: request.arrival_s)
    assert bounded(order, in_order_of_arrival, 5.0, starvation_s=10.0) == order
    bound = bounded(order, in_order_of_arrival, 5.0, starvation_s=3.0)
    assert (bound.compute, bound.link) == ((0, 2, 1), (0, 2, 1))
