from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.policies.dp import DynamicProgram, Splits, best_splits
from cacheflow.policies.registry import make_policy
from support.batches import convex_problem


def makespan_s(requests, chosen, suffix_s: float = 0.0) -> float:
    compute_s = suffix_s + sum(each.compute_s[index] for each, index in zip(requests, chosen, strict=True))
    load_s = sum(each.load_s[index] for each, index in zip(requests, chosen, strict=True))
    return max(compute_s, load_s)


def splits(compute_s: float, load_s: float, count: int) -> Splits:
    shares = np.linspace(0.0, 1.0, count + 1)
    return Splits(np.arange(count + 1), compute_s * shares**1.3, load_s * (1 - shares))


seconds = st.floats(0.1, 10.0)


@given(st.lists(st.tuples(seconds, seconds, st.integers(1, 5)), min_size=1, max_size=4), st.floats(0.0, 3.0))
def test_the_program_is_as_good_as_trying_every_combination(parts, suffix_s):
    requests = [splits(*part) for part in parts]
    best_s = min(
        makespan_s(requests, chosen, suffix_s)
        for chosen in itertools.product(*(range(len(each.num_cells)) for each in requests))
    )
    chosen = best_splits(requests, suffix_s=suffix_s)
    # It counts compute in quanta of 1/256 of all of it: half of one is lost for each request.
    slack_s = len(requests) * sum(each.compute_s[-1] for each in requests) / 256
    assert makespan_s(requests, chosen, suffix_s) <= best_s + slack_s


def test_one_program_plans_all_that_have_not_started():
    problems = {index: convex_problem(n) for index, n in enumerate((512, 2048, 4096))}
    plans = DynamicProgram(make_policy("cacheflow_v2")).plans(1, problems)
    assert sorted(plans) == [0, 1, 2]
    compute_s = sum(plan.predicted.compute_s for plan in plans.values()) + sum(p.suffix_s for p in problems.values())
    load_s = sum(plan.predicted.load_s for plan in plans.values())
    assert compute_s == pytest.approx(load_s, rel=0.05)
    for index, plan in plans.items():
        cells = [cell for tile in (*plan.compute_sequence, *plan.load_sequence) for cell in tile.cells()]
        assert len(cells) == len(set(cells)) == problems[index].compute_KB.size
