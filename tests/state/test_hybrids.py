"""Rows with recurrent layers: their checkpoint, lost reads, and links that are not what was planned with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cacheflow.plan.bound import bound
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.planner import Objective, plan_levels
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.state.board import CellState
from cacheflow.types import LoadOutcome
from support.hybrids import Witness, hybrid_problem, random_hybrid
from support.virtual_driver import Conditions, VirtualRun, run_virtual

LINKS = {"as planned": 1.0, "a quarter": 0.25, "three times": 3.0}
"""What the link really does, over what was planned with."""


def run(
    problem: RestoreProblem, plan: RestorePlan, *, speed: float = 1.0, fails=lambda chunk, block: None, depth: int = 3
) -> tuple[VirtualRun, Witness]:
    witness = Witness(problem)
    truth = replace(problem, link=LinkCost(bytes_per_s=problem.link.bytes_per_s * speed))
    return run_virtual(problem, plan, Conditions(truth=truth, fails=fails, check=witness), depth=depth), witness


def failing(rng: np.random.Generator, share: float):
    outcomes = [outcome for outcome in LoadOutcome if outcome is not LoadOutcome.OK]
    return lambda chunk, block: outcomes[rng.integers(len(outcomes))] if rng.random() < share else None


@pytest.mark.parametrize("fail_share", [0.0, 0.05])
@pytest.mark.parametrize("link", LINKS)
def test_no_claim_needs_a_state_that_is_not_there(link: str, fail_share: float):
    num_claims = num_failed = 0
    for seed in range(120):
        rng = np.random.default_rng([seed, 17])
        problem = random_hybrid(rng)
        plan = make_policy(list(RESTORE_POLICIES)[seed % len(RESTORE_POLICIES)]).plan(problem)
        fails = failing(rng, fail_share)
        found, witness = run(problem, plan, speed=LINKS[link], fails=fails, depth=int(rng.integers(1, 5)))
        assert not witness.broken, (seed, witness.broken[:3])
        assert found.state.restored, seed
        assert not witness.lacks_end_states(found.state), seed
        num_claims += witness.num_claims
        num_failed += sum(n for outcome, n in found.state.outcomes.items() if outcome is not LoadOutcome.OK)
    assert num_claims > 1000
    assert (num_failed > 50) == (fail_share > 0)


@pytest.mark.parametrize("row", [0, 4, 9])
def test_without_the_checkpoint_of_a_row_it_and_all_below_are_recomputed_to_the_end(row: int):
    problem = hybrid_problem(num_tokens=16 * 1056, bytes_per_s=8e9)
    last = problem.grid.num_chunks - 1

    def fails(chunk: int, block: int) -> LoadOutcome | None:
        return LoadOutcome.MISS if (chunk, block) == (last, row) else None

    for policy in ("load", "cacheflow", "cake"):
        found, witness = run(problem, make_policy(policy).plan(problem), fails=fails)
        assert not witness.broken
        assert not witness.lacks_end_states(found.state)
        assert {letters[: row + 1] for letters in found.state.board.letters()} == {"c" * (row + 1)}, policy
        assert any("l" in letters[row + 1 :] for letters in found.state.board.letters()) or row == 9


def test_lost_keys_and_values_are_recomputed_from_the_front_over_cells_that_are_there():
    problem = hybrid_problem(num_tokens=16 * 1056, bytes_per_s=8e9)

    def fails(chunk: int, block: int) -> LoadOutcome | None:
        return LoadOutcome.CORRUPT if (chunk, block) == (5, 3) else None

    found, witness = run(problem, make_policy("load").plan(problem), fails=fails)
    assert not witness.broken
    letters = found.state.board.letters()
    assert {each[:4] for each in letters[:6]} == {"cccc"}
    assert all(set(each) == {"l"} for each in letters[6:])
    assert found.state.board.state(len(letters) - 1, 3) is CellState.LOADED


def test_a_short_prefix_is_split_by_layers_because_a_row_recomputed_to_the_end_needs_no_checkpoint():
    slow = hybrid_problem(bytes_per_s=0.5e9)
    planned = plan_levels(slow)
    assert planned.levels_K[-1] >= 4, planned
    assert planned.levels_K[0] == planned.levels_K[-1]
    load = make_policy("load").plan(slow).predicted.restore_s
    assert planned.predicted.restore_s < 0.6 * min(load, slow.recompute_s)
    # The checkpoint alone, of all rows, would take longer than that.
    assert 0.9 * planned.predicted.restore_s < 10 * 6_438_912 / 0.5e9


def test_a_long_prefix_is_split_as_if_there_were_no_checkpoint():
    long = hybrid_problem(num_tokens=128 * 1056, growth=0.01, bytes_per_s=1e9)
    bytes_KB = long.load_bytes_KB.copy()
    bytes_KB[-1] = bytes_KB[0]
    with_it, without = plan_levels(long), plan_levels(replace(long, load_bytes_KB=bytes_KB))
    assert with_it.levels_K[-1] == without.levels_K[-1] == 0
    cells = long.compute_KB.size
    assert abs(sum(with_it.levels_K) - sum(without.levels_K)) < 0.02 * cells


@pytest.mark.parametrize("bytes_per_s", [0.5e9, 2e9, 8e9])
@pytest.mark.parametrize("num_tokens", [2112, 4224, 33_792])
def test_no_policy_beats_the_bound_and_ours_keeps_near_it(num_tokens: int, bytes_per_s: float):
    problem = hybrid_problem(num_tokens=num_tokens, growth=0.01, bytes_per_s=bytes_per_s)
    least_s = bound(problem).restore_s
    for name in RESTORE_POLICIES:
        found, witness = run(problem, make_policy(name).plan(problem))
        assert not witness.broken
        assert found.restore_s >= least_s * (1 - 1e-9), name
    assert found.state.plan.policy == "cacheflow"
    assert found.restore_s <= 1.06 * least_s + 0.001


def test_the_bound_counts_the_checkpoint():
    problem = hybrid_problem(num_tokens=1056, bytes_per_s=1e9)
    bytes_KB = problem.load_bytes_KB.copy()
    bytes_KB[-1] -= 6_438_912
    assert bound(problem).restore_s > 1.5 * bound(replace(problem, load_bytes_KB=bytes_KB)).restore_s
    suffix = hybrid_problem(num_tokens=4224, suffix_tokens=512, bytes_per_s=2e9)
    planned = plan_levels(suffix, Objective.TTFT)
    assert planned.predicted.ttft_s >= bound(suffix).ttft_s


@pytest.mark.parametrize("num_tokens", [4224, 8448, 33_792])
@pytest.mark.parametrize(("speed", "at_most"), [(1.0, 1.06), (0.5, 1.25), (2.0, 1.25)])
def test_with_new_tokens_compute_keeps_the_bottom_rows_and_the_link_does_not_climb_into_them(
    num_tokens: int, speed: float, at_most: float
):
    """Nothing can be taken back: had the link brought a bottom row of the last chunk, compute would end below it."""
    problem = hybrid_problem(num_tokens=num_tokens, suffix_tokens=256, growth=0.01, bytes_per_s=1e9)
    truth = replace(problem, link=LinkCost(bytes_per_s=problem.link.bytes_per_s * speed))
    found, witness = run(problem, make_policy("cacheflow").plan(problem), speed=speed)
    assert not witness.broken
    assert found.ttft_s <= at_most * bound(truth).ttft_s + 0.001


def at_ratio(problem: RestoreProblem, ratio: float) -> RestoreProblem:
    """The link takes ``ratio`` times as long for all of it as compute does."""
    load_s = ratio * float(problem.compute_KB.sum())
    return replace(problem, link=LinkCost(bytes_per_s=float(problem.load_bytes_KB.sum()) / load_s))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("suffix_tokens", [0, 128])
def test_of_a_chunk_that_the_link_ends_compute_does_keys_and_values_alone_at_last(ratio: float, suffix_tokens: int):
    problem = at_ratio(hybrid_problem(num_tokens=16 * 1056, suffix_tokens=suffix_tokens, num_rows=6), ratio)
    found, witness = run(problem, make_policy("cacheflow").plan(problem))
    assert not witness.broken
    assert found.ttft_s <= 1.025 * bound(problem).ttft_s


def test_the_link_takes_no_row_of_a_short_prefix_whose_end_compute_has_come_to():
    """What it takes ahead of time is what compute would come to last, not the top of the last chunk."""
    problem = at_ratio(hybrid_problem(num_tokens=4 * 1056, suffix_tokens=37, num_rows=6), 2.0)
    found, _ = run(problem, make_policy("cacheflow").plan(problem))
    assert found.ttft_s <= 1.06 * bound(problem).ttft_s
