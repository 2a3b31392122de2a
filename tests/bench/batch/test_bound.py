"""The bounds on a batch: below every simulated schedule, and exact where that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.bench.batch.policies import CONTENDERS, find_contender
from cacheflow.bench.batch.simulate import BatchCase, simulate_batch
from cacheflow.bench.batch_bound import batch_bound
from cacheflow.errors import UnknownPolicyError
from cacheflow.plan.bound import bound
from support.examples import examples
from support.problems import transformer_problem


def problems_of(lengths, ratio=1.0):
    link = transformer_problem(num_tokens=4096, ratio=ratio).link
    made = [transformer_problem(num_tokens=length, suffix_tokens=64, num_blocks=6) for length in lengths]
    return [replace(each, link=link) for each in made]


def test_one_request_alone_has_its_own_bound():
    (problem,) = problems_of([2048])
    least = batch_bound([problem], [3.0])
    assert least.makespan_s == pytest.approx(bound(problem).ttft_s)
    assert least.mean_ttft_s == pytest.approx(bound(problem).ttft_s)


def test_many_equal_requests_end_one_after_the_other():
    """With a link too slow to help, compute does everything: the k-th of n ends after k times the work of one."""
    problems = problems_of([1024] * 4, ratio=1e6)
    work_s = bound(problems[0]).ttft_s
    least = batch_bound(problems, [0.0] * 4)
    assert least.makespan_s == pytest.approx(4 * work_s, rel=1e-3)
    assert least.mean_ttft_s == pytest.approx(2.5 * work_s, rel=1e-3)


def test_late_arrivals_do_not_add_up():
    problems = problems_of([1024] * 3)
    least = batch_bound(problems, [0.0, 100.0, 200.0])
    alone_s = bound(problems[0]).ttft_s
    assert least.makespan_s == pytest.approx(200.0 + alone_s)
    assert least.mean_ttft_s == pytest.approx(alone_s)


@settings(max_examples=examples(30))
@given(
    lengths=st.lists(st.sampled_from([256, 512, 1024, 2048, 3000]), min_size=1, max_size=6),
    ratio=st.sampled_from([0.2, 0.5, 1.0, 2.0, 8.0]),
    gap_s=st.sampled_from([0.0, 0.05, 0.4]),
    name=st.sampled_from(list(CONTENDERS)),
)
def test_no_simulated_schedule_beats_them(lengths, ratio, gap_s, name):
    problems = problems_of(lengths, ratio)
    arrivals_s = [gap_s * index for index in range(len(lengths))]
    case = BatchCase(problems=problems, arrivals_s=arrivals_s, deadlines_s=[1.0] * len(lengths), starvation_s=2.0)
    times = simulate_batch(find_contender(name), case, problems)
    least = batch_bound(problems, arrivals_s)
    assert least.makespan_s <= times.makespan_s * (1 + 1e-9)
    assert least.mean_ttft_s <= times.mean_ttft_s * (1 + 1e-9)


def test_slower_compute_than_believed_takes_longer():
    problems = problems_of([1024, 2048], ratio=8.0)
    case = BatchCase(problems=problems, arrivals_s=[0.0, 0.0], deadlines_s=[1.0, 1.0])
    slow = [replace(p, compute_KB=2 * p.compute_KB, suffix_B=2 * p.suffix_B) for p in problems]
    contender = find_contender("mean_ttft")
    believed = simulate_batch(contender, case, problems)
    assert simulate_batch(contender, case, slow).makespan_s > 1.2 * believed.makespan_s


@pytest.mark.parametrize("bad", [([], []), (problems_of([512]), [0.0, 1.0])])
def test_requests_and_arrivals_must_fit(bad):
    with pytest.raises(ValueError, match="requests with"):
        batch_bound(*bad)


def test_unknown_contenders_are_refused_with_the_known_ones():
    with pytest.raises(UnknownPolicyError, match="mean_ttft"):
        find_contender("best")
