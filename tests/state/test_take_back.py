"""A link that falls behind the suffix: noticed before a read ends, relieved of what compute restores sooner."""

from __future__ import annotations

import statistics

import pytest

from cacheflow.plan.rates import LiveRates
from cacheflow.state.board import CellState
from cacheflow.state.compute_side import ClaimKind
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome
from support.falling_link import bound_over_falling_link
from support.problems import shared_plan, transformer_problem
from support.virtual_driver import Conditions, VirtualRun, run_virtual

FALLS = (0.1, 0.3, 0.5, 0.7, 0.9)


def run_over_falling_link(problem, fall_s, check=lambda state, claim: None) -> VirtualRun:
    full = problem.link.bytes_per_s
    conditions = Conditions(bandwidth_at=lambda now: full if now < fall_s else full / 4, check=check)
    return run_virtual(problem, shared_plan(problem, bottom_row=True), conditions)


@pytest.mark.parametrize(("num_tokens", "mean", "worst"), [(2048, 1.18, 1.45), (4096, 1.09, 1.28), (8192, 1.05, 1.2)])
def test_a_link_that_falls_to_a_quarter_costs_little_over_the_bound(num_tokens, mean, worst):
    over = []
    for ratio in (0.25, 0.5, 1, 2, 4):
        problem = transformer_problem(num_tokens=num_tokens, ratio=ratio)
        undisturbed_s = run_virtual(problem, shared_plan(problem, bottom_row=True)).ttft_s
        for fall_s in (share * undisturbed_s for share in FALLS):
            run = run_over_falling_link(problem, fall_s)
            over.append(run.ttft_s / bound_over_falling_link(problem, fall_s=fall_s, factor=0.25))
    assert statistics.mean(over) <= mean
    assert max(over) <= worst


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 1, 2, 4, 12])
def test_nothing_is_taken_back_in_vain_when_costs_are_right(ratio):
    problem = transformer_problem(num_tokens=2048, ratio=ratio)
    run = run_virtual(problem, shared_plan(problem, bottom_row=True))
    assert run.state.wasted_bytes == 0


def test_compute_goes_on_through_cells_the_link_has_brought_instead_of_starting_over():
    problem = transformer_problem(num_tokens=2048, ratio=2)
    restarts: list[int] = []

    def check(state, claim):
        if claim.restart:
            restarts.append(claim.tile.chunk_lo)

    run = run_over_falling_link(problem, 0.5 * run_virtual(problem, shared_plan(problem)).ttft_s, check)
    recomputed_in_vain = run.state.compute.num_repaired
    assert recomputed_in_vain > 0, "the link falls far enough that its cells are taken"
    assert len(restarts) <= 1, "at most the chunk that the link had begun from its bottom"


def waiting_state() -> RestoreState:
    problem = transformer_problem(num_tokens=1024, num_blocks=4, ratio=1)
    return RestoreState(problem, shared_plan(problem, bottom_row=True), LiveRates(bytes_per_s=problem.link.bytes_per_s))


def test_a_read_that_is_overdue_counts_before_it_ends_and_no_longer_once_it_has():
    state = waiting_state()
    cell = state.claim_load(0.0)
    expected_s = state.link.expected_s()
    state.claim_compute(0.0)
    assert state.link.expected_s() == pytest.approx(expected_s), "not overdue"
    state.claim_compute(4 * expected_s)
    assert state.link.expected_s() > 1.5 * expected_s
    state.begin_place(cell)
    state.claim_load(4 * expected_s)
    assert state.link.expected_s() == pytest.approx(expected_s)


def test_an_overdue_read_only_ever_slows_the_known_bandwidth():
    rates = LiveRates(bytes_per_s=100.0)
    assert rates.bytes_per_s_while(num_bytes=100, age_s=0.9) == 100.0
    assert rates.bytes_per_s_while(num_bytes=100, age_s=1.4) < 100.0
    assert rates.bytes_per_s == 100.0


def test_two_slow_reads_are_a_falling_link_and_one_is_noise():
    noisy, fallen = LiveRates(bytes_per_s=100.0), LiveRates(bytes_per_s=100.0)
    for rates, second_s in ((noisy, 1.0), (fallen, 4.0)):
        for busy_s in (1.0, 1.0, 1.0, 1.8, second_s):
            rates.observe_load(num_bytes=100, busy_s=busy_s)
    assert noisy.bytes_per_s > 80
    assert fallen.bytes_per_s < 45


def test_a_cell_taken_back_is_placed_all_the_same_when_its_read_comes_first():
    problem = transformer_problem(num_tokens=512, suffix_tokens=64, num_blocks=4, ratio=0.5)
    state = RestoreState(problem, shared_plan(problem), LiveRates(bytes_per_s=problem.link.bytes_per_s))
    reads = [state.claim_load(0.0)]
    state.board.set(*reads[0], CellState.OPEN)
    assert state.begin_place(reads[0])
    state.complete_load(reads[0], 0.0)
    assert state.board.state(*reads[0]) is CellState.LOADED


def test_a_taken_read_that_fails_is_not_asked_for_again():
    state = waiting_state()
    cell = state.claim_load(0.0)
    state.board.set(*cell, CellState.OPEN)
    state.fail_load(cell, LoadOutcome.MISS)
    now_s = 0.0
    while (claim := state.claim_compute(now_s)).kind is not ClaimKind.DONE:
        read = state.claim_load(now_s)
        assert read != cell
        if read is not None and state.begin_place(read):
            state.complete_load(read, now_s)
        if claim.kind is not ClaimKind.WAIT:
            state.complete_compute(claim, actual_s=claim.predicted_s)
        now_s += 0.01
    assert state.board.state(*cell) is CellState.COMPUTED
