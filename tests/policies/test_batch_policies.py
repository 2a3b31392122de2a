from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, UnknownPolicyError
from cacheflow.plan.batch import WaitingRequest, predict_ends
from cacheflow.plan.remaining import Remaining
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES, make_batch_policy
from cacheflow.policies.objective import ObjectivePolicy
from cacheflow.policies.registry import make_policy
from support.examples import examples


def request(
    request_id: int, compute_s: float, load_s: float = 1.0, *, suffix_s=0.0, arrival_s=0.0, first_token_due_s=None
):
    return WaitingRequest(
        request_id=request_id,
        arrival_s=arrival_s,
        remaining=Remaining(compute_s, load_s, suffix_s),
        first_token_due_s=first_token_due_s,
    )


def order(name: str, *waiting: WaitingRequest, now_s: float = 0.0):
    return make_batch_policy(name, make_policy("cacheflow")).rank(now_s, waiting)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UnknownPolicyError, match="fcfs, longest_first, dp, objective"):
        make_batch_policy("quickest", make_policy("cacheflow"))
    with pytest.raises(ConfigError, match="mean_ttft, p99_ttft, makespan, slo"):
        ObjectivePolicy(make_policy("cacheflow"), objective="median")


@pytest.mark.parametrize("name", BATCH_POLICY_NAMES)
def test_every_request_stands_once_in_both_orders(name):
    waiting = [request(index, 1.0 + index % 3, arrival_s=float(index)) for index in range(20)]
    for count in (0, 1, 2, 20):
        ranked = order(name, *waiting[:count], now_s=30.0)
        assert sorted(ranked.compute) == sorted(ranked.link) == list(range(count))


def test_fcfs_goes_by_arrival():
    ranked = order("fcfs", request(7, 9.0), request(3, 1.0, arrival_s=1.0))
    assert (ranked.compute, ranked.link) == ((7, 3), (7, 3))


def test_longest_first_gives_the_link_to_whom_it_saves_most():
    # 1 saves 3 s of compute for each second of the link, 2 only 1 s; equal savings: the longer one.
    ranked = order("longest_first", request(2, 4.0, 4.0), request(1, 6.0, 2.0), request(3, 9.0, 9.0))
    assert (ranked.compute, ranked.link) == ((2, 1, 3), (1, 3, 2))


def test_mean_ttft_serves_the_shortest_first_by_what_is_left_of_it():
    ranked = order("mean_ttft", request(1, 8.0, 8.0), request(2, 2.0, 2.0, suffix_s=0.5), request(3, 1.0, 9.0))
    assert ranked.compute == ranked.link == (3, 2, 1)


def test_p99_ttft_minds_how_long_a_request_has_waited():
    old, young = request(1, 8.0, 8.0, arrival_s=0.0), request(2, 2.0, 2.0, arrival_s=19.0)
    assert order("p99_ttft", old, young, now_s=20.0).compute == (1, 2)
    assert order("mean_ttft", old, young, now_s=20.0).compute == (2, 1)


def test_slo_gives_up_the_longest_when_not_all_can_be_in_time():
    waiting = [
        request(1, 8.0, 8.0, first_token_due_s=4.0),
        request(2, 2.0, 2.0, first_token_due_s=4.5),
        request(3, 4.0, 4.0, first_token_due_s=4.8),
    ]
    assert order("slo", *waiting).compute == (2, 3, 1)


parts = st.lists(st.tuples(*[st.floats(0.1, 10.0)] * 2, st.floats(0.0, 1.0)), min_size=2, max_size=5)


@settings(max_examples=examples(50))
@given(parts)
def test_the_mean_is_near_that_of_the_best_of_all_orders(values):
    waiting = [
        request(index, compute_s, load_s, suffix_s=suffix_s)
        for index, (compute_s, load_s, suffix_s) in enumerate(values)
    ]

    def mean_s(requests) -> float:
        return sum(end.end_s for end in predict_ends(requests)) / len(waiting)

    ranked = mean_s([waiting[request_id] for request_id in order("mean_ttft", *waiting).compute])
    assert ranked <= 1.2 * min(mean_s(each) for each in itertools.permutations(waiting))
