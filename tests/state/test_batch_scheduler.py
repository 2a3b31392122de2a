from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.plan.bound import bound
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES, make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.compute_side import ClaimKind
from support.batches import MIXED, Arrival, convex_problem, run_batch
from support.count_calls import count_calls
from support.examples import examples

OURS = ("mean_ttft", "p99_ttft", "makespan", "slo")


def policy(name: str, restore: str = "cacheflow"):
    return make_batch_policy(name, make_policy(restore))


def scheduler(name: str = "mean_ttft", **options) -> BatchScheduler:
    return BatchScheduler(policy(name), LiveRates(bytes_per_s=1e8), **options)


def mixed(ratio: float = 1.0, gap_s: float = 0.0) -> list[Arrival]:
    return [Arrival(at_s=index * gap_s, problem=convex_problem(n, ratio=ratio)) for index, n in enumerate(MIXED)]


def test_nothing_waits_nothing_is_claimed():
    empty = scheduler()
    assert empty.claim_compute(0.0) is None
    assert empty.claim_read(0.0) is None
    assert len(empty) == 0


def test_a_name_is_taken_until_it_is_removed():
    batch = scheduler()
    batch.add(1, convex_problem(512), arrival_s=0.0)
    with pytest.raises(ConfigError, match="request 1"):
        batch.add(1, convex_problem(512), arrival_s=0.0)
    batch.remove(1)
    batch.add(1, convex_problem(512), arrival_s=0.0)


def test_a_starvation_bound_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="starvation_s is 0"):
        scheduler(starvation_s=0)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("name", BATCH_POLICY_NAMES)
def test_every_request_of_a_mixed_batch_ends_and_no_sooner_than_its_bound(name, ratio):
    arrivals = mixed(ratio)
    run = run_batch(policy(name), arrivals)
    for arrival, ttft_s in zip(arrivals, run.ttft_s, strict=True):
        assert ttft_s >= bound(arrival.problem).ttft_s * (1 - 1e-9)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_our_mean_is_ahead_of_the_published_ways_and_the_last_end_is_as_early(ratio):
    arrivals = mixed(ratio)
    ours = run_batch(policy("mean_ttft"), arrivals)
    rivals = {
        (name, restore): run_batch(policy(name, restore), arrivals)
        for name, restore in (
            ("fcfs", "cake"), ("fcfs", "cacheflow"), ("longest_first", "cacheflow_v1"), ("dp", "cacheflow_v2"),
        )
    }  # fmt: skip
    for who, rival in rivals.items():
        assert ours.mean_ttft_s * 1.3 <= rival.mean_ttft_s, who
    assert ours.makespan_s <= 1.03 * min(rival.makespan_s for rival in rivals.values())


@pytest.mark.parametrize("name", OURS)
def test_both_resources_stay_busy_across_requests(name):
    run = run_batch(policy(name), mixed())
    assert run.compute_busy_s >= 0.98 * run.makespan_s
    assert run.io_busy_s >= 0.98 * run.makespan_s


def test_a_short_request_that_comes_late_goes_first():
    long_problem, short_problem = convex_problem(8192), convex_problem(512)
    alone_s = run_batch(policy("mean_ttft"), [Arrival(at_s=0.0, problem=short_problem)]).ttft_s[0]
    arrivals = [Arrival(at_s=0.0, problem=long_problem), Arrival(at_s=0.5, problem=short_problem)]
    # The reads of the long one that are under way, and one tile of it, come before.
    assert run_batch(policy("mean_ttft"), arrivals).ttft_s[1] <= 1.8 * alone_s
    assert run_batch(policy("fcfs"), arrivals).ttft_s[1] >= 3 * alone_s


def test_a_long_request_is_not_passed_for_ever():
    long_problem, short_problem = convex_problem(4096), convex_problem(1024)
    alone_s = bound(long_problem).ttft_s
    # Short ones come faster than they can be served: without a bound the long one waits for the last of them.
    arrivals = [Arrival(at_s=0.0, problem=long_problem)]
    arrivals += [Arrival(at_s=0.2 * index, problem=short_problem) for index in range(60)]
    unbounded = run_batch(policy("mean_ttft"), arrivals).ttft_s[0]
    bounded = run_batch(policy("mean_ttft"), arrivals, starvation_s=2.0).ttft_s[0]
    assert unbounded > 10.0
    assert bounded <= 2.0 + 1.1 * alone_s


def test_deadlines_are_met_by_as_many_as_can_be():
    problem = convex_problem(2048)
    alone_s = bound(problem).ttft_s
    # The first has all the time, the others a quarter more than two of them need.
    arrivals = [Arrival(at_s=0.0, problem=problem, first_token_due_s=10 * alone_s)]
    arrivals += [Arrival(at_s=0.0, problem=problem, first_token_due_s=2.5 * alone_s) for _ in range(2)]

    def in_time(name: str) -> int:
        ends = run_batch(policy(name), arrivals).ttft_s
        return sum(end <= arrival.first_token_due_s for end, arrival in zip(ends, arrivals, strict=True))

    assert (in_time("slo"), in_time("fcfs")) == (3, 2)


def test_compute_leaves_a_request_alone_that_is_not_ready_and_the_link_does_not():
    batch = scheduler()
    batch.add(1, convex_problem(2048), arrival_s=0.0, ready=False)
    assert batch.claim_compute(0.0) is None
    load = batch.claim_read(0.0)
    assert load is not None
    assert load.request_id == 1
    batch.make_ready(1)
    claim = batch.claim_compute(0.0)
    assert claim is not None
    assert claim.claim.kind is ClaimKind.RECOMPUTE


def test_a_request_whose_first_token_is_being_chosen_gets_no_more_work():
    batch = scheduler()
    batch.add(1, convex_problem(0, suffix_tokens=64), arrival_s=0.0)
    first = batch.claim_compute(0.0)
    assert first is not None
    assert first.claim.kind is ClaimKind.SUFFIX
    batch.state(1).complete_compute(first.claim, actual_s=0.1)
    done = batch.claim_compute(0.1)
    assert done is not None
    assert done.claim.kind is ClaimKind.DONE
    assert batch.claim_compute(0.1) is None


def test_a_closed_link_leaves_everything_to_compute():
    batch = scheduler()
    batch.add(1, convex_problem(1024), arrival_s=0.0)
    batch.close_link()
    assert batch.claim_read(0.0) is None
    kinds = set()
    while (work := batch.claim_compute(0.0)) is not None and work.claim.kind is not ClaimKind.DONE:
        kinds.add(work.claim.kind)
        batch.state(1).complete_compute(work.claim, actual_s=0.01)
    assert batch.state(1).restored
    assert kinds <= {ClaimKind.RECOMPUTE, ClaimKind.REPAIR, ClaimKind.SUFFIX}


arrivals = st.lists(
    st.tuples(
        st.floats(0.0, 5.0), st.integers(0, 3000), st.integers(0, 200), st.floats(0.5, 2.0), st.floats(0.25, 4.0)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=examples(60))
@given(arrivals, st.sampled_from(BATCH_POLICY_NAMES), st.sampled_from(["cacheflow", "cake", "load", "recompute"]))
def test_whatever_comes_whenever_and_whatever_it_really_costs_every_request_ends(parts, name, restore):
    batch = []
    for at_s, num_tokens, suffix_tokens, error, ratio in parts:
        if num_tokens + suffix_tokens == 0:
            continue
        problem = convex_problem(num_tokens, suffix_tokens=suffix_tokens, ratio=ratio, num_blocks=4)
        truth = convex_problem(num_tokens, suffix_tokens=suffix_tokens, ratio=ratio * error, num_blocks=4)
        batch.append(Arrival(at_s=at_s, problem=problem, truth=truth))
    if batch:
        run_batch(policy(name, restore), batch, starvation_s=3.0)


def test_one_run_is_like_the_other():
    first, second = (run_batch(policy("mean_ttft"), mixed(gap_s=0.3)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", OURS)
def test_ranking_takes_as_many_calls_for_each_request_however_many_wait(name):
    def calls(num_requests):
        batch = scheduler(name)
        for index in range(num_requests):
            batch.add(index, convex_problem(512 + 64 * index), arrival_s=0.0, first_token_due_s=1.0 + index)
        return count_calls(lambda: batch.ranking(1.0))

    assert calls(64) < 5000
    assert calls(128) < 2 * calls(64)
