"""The state machine under a virtual clock: every cell once, staircases, the bound, and what failures cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Tile
from cacheflow.plan.plan import Share, SuffixStart
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.registry import make_policy
from cacheflow.state.board import CellState
from cacheflow.state.compute_pointer import SUFFIX_CLAIM_S
from cacheflow.state.compute_side import ClaimKind
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.problems import shared_plan, transformer_problem, whole_chunk_plan
from support.virtual_driver import Conditions, run_virtual


def assert_complete(state: RestoreState) -> None:
    grid = state.problem.grid
    cells = [state.board.state(k, b) for k in range(grid.num_chunks) for b in range(grid.num_blocks)]
    assert set(cells) <= {CellState.COMPUTED, CellState.LOADED}
    assert state.restored


class StaircaseCheck:
    """A claim may only continue a chunk where it was left, with every earlier chunk resident in its blocks."""

    def __init__(self) -> None:
        self.height: dict[int, int] = {}
        self.suffix_next = 0

    def __call__(self, state: RestoreState, claim) -> None:
        if claim.kind is ClaimKind.SUFFIX:
            assert claim.block_lo == self.suffix_next
            self.suffix_next = claim.block_hi
            for block in range(claim.block_lo, claim.block_hi):
                for chunk in range(state.problem.grid.num_chunks):
                    assert state.board.state(chunk, block) in (CellState.COMPUTED, CellState.LOADED)
        if claim.tile is None:
            return
        tile: Tile = claim.tile
        for chunk in range(tile.chunk_lo, tile.chunk_hi):
            if claim.restart:
                self.height[chunk] = 0
            assert self.height.get(chunk, 0) == tile.block_lo, "activations of the block below are missing"
            for block in range(tile.block_lo, tile.block_hi):
                for earlier in range(tile.chunk_lo):
                    assert state.board.state(earlier, block) in (CellState.COMPUTED, CellState.LOADED)
            self.height[chunk] = -1 if claim.kv_only_top else tile.block_hi


@settings(max_examples=examples(60))
@given(
    num_tokens=st.integers(1, 3000),
    suffix_tokens=st.sampled_from([0, 1, 64, 700]),
    ratio=st.floats(0.05, 20),
    num_blocks=st.integers(1, 9),
    depth=st.integers(1, 5),
    cost_error=st.floats(0.3, 3),
    claim_s=st.sampled_from([0.0, 0.02]),
    kind=st.sampled_from(["shared", "bottom row", "whole"]),
)
def test_every_cell_is_restored_and_every_claim_is_a_staircase(
    num_tokens, suffix_tokens, ratio, num_blocks, depth, cost_error, claim_s, kind
):
    args = {"num_tokens": num_tokens, "suffix_tokens": suffix_tokens, "ratio": ratio, "num_blocks": num_blocks}
    truth = transformer_problem(**args)
    planned = transformer_problem(**args, cost_error=cost_error)
    plan = whole_chunk_plan(planned) if kind == "whole" else shared_plan(planned, bottom_row=kind == "bottom row")
    run = run_virtual(planned, plan, Conditions(truth=truth, check=StaircaseCheck()), depth=depth, min_claim_s=claim_s)
    assert_complete(run.state)


@settings(max_examples=examples(60))
@given(
    failing=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=36),
    outcome=st.sampled_from([LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR, LoadOutcome.LATE]),
    suffix_tokens=st.sampled_from([0, 100]),
    ratio=st.sampled_from([0.2, 1.0, 4.0]),
    kind=st.sampled_from(["shared", "bottom row", "whole", "load"]),
)
def test_failed_reads_are_recomputed_and_counted(failing, outcome, suffix_tokens, ratio, kind):
    problem = transformer_problem(num_tokens=3000, suffix_tokens=suffix_tokens, ratio=ratio, num_blocks=6)
    plan = whole_chunk_plan(problem) if kind == "whole" else shared_plan(problem, bottom_row=kind == "bottom row")
    if kind == "load":
        plan = replace(whole_chunk_plan(problem), compute_sequence=())
    run = run_virtual(
        problem,
        plan,
        Conditions(fails=lambda k, b: outcome if (k, b) in failing else None, check=StaircaseCheck()),
    )
    assert_complete(run.state)
    for cell in failing:
        assert run.state.board.state(*cell) is CellState.COMPUTED
    assert run.state.outcomes[outcome] <= len(failing)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 2, 4])
def test_ttft_stays_near_the_bound_when_costs_are_right(ratio):
    problem = transformer_problem(ratio=ratio)
    run = run_virtual(problem, shared_plan(problem, bottom_row=True))
    assert run.ttft_s <= 1.02 * bound(problem).ttft_s


@pytest.mark.parametrize("ratio", [0.5, 1, 2])
@pytest.mark.parametrize(("cost_error", "bandwidth_error"), [(2, 1), (0.5, 1), (1, 2), (1, 0.5), (2, 0.5), (0.5, 2)])
def test_wrong_costs_cost_little(ratio, cost_error, bandwidth_error):
    truth = transformer_problem(ratio=ratio)
    planned = transformer_problem(ratio=ratio, cost_error=cost_error, bandwidth_error=bandwidth_error)
    run = run_virtual(planned, shared_plan(planned, bottom_row=True), Conditions(truth=truth))
    assert run.ttft_s <= 1.10 * bound(truth).ttft_s


@pytest.mark.parametrize("suffix_tokens", [0, 256])
@pytest.mark.parametrize("drop_at", [0.1, 0.5, 0.9])
def test_a_link_that_falls_to_a_quarter_never_costs_more_than_recomputing(suffix_tokens, drop_at):
    problem = transformer_problem(suffix_tokens=suffix_tokens)
    full = problem.link.bytes_per_s
    fall_s = drop_at * problem.recompute_s / 2
    run = run_virtual(
        problem, shared_plan(problem), Conditions(bandwidth_at=lambda now: full if now < fall_s else full / 4)
    )
    assert run.ttft_s <= 1.02 * (problem.recompute_s + problem.suffix_s)


def test_a_slow_link_is_relieved_of_a_chunk_when_the_suffix_waits_for_it():
    problem = transformer_problem(ratio=1)
    full = problem.link.bytes_per_s
    unit_s = run_virtual(problem, shared_plan(problem)).ttft_s
    run = run_virtual(
        problem, shared_plan(problem), Conditions(bandwidth_at=lambda now: full if now < 0.8 * unit_s else full / 20)
    )
    assert run.state.compute.num_repaired > 0
    assert run.ttft_s < 2 * unit_s


def test_link_closes_after_failures_in_a_row_and_compute_restores_the_rest():
    problem = transformer_problem(num_tokens=2048, ratio=0.25)
    run = run_virtual(problem, shared_plan(problem), Conditions(fails=lambda k, b: LoadOutcome.ERROR))
    assert_complete(run.state)
    assert not run.state.loads_possible
    assert run.state.outcomes[LoadOutcome.ERROR] <= 4 + 3
    assert run.ttft_s <= 1.1 * (problem.recompute_s + problem.suffix_s) + problem.link.load_s(8 * 768 * 512)


def test_a_read_of_a_cell_taken_back_is_wasted_not_placed():
    problem = transformer_problem(num_tokens=512, suffix_tokens=0, num_blocks=4)
    state = RestoreState(problem, shared_plan(problem), LiveRates(bytes_per_s=problem.link.bytes_per_s))
    top, below = state.claim_load(0.0), state.claim_load(0.0)
    assert (top.block, below.block) == (3, 2)
    state.fail_load(top, LoadOutcome.MISS)
    kinds = []
    while (claim := state.claim_compute(0.0)).kind is not ClaimKind.DONE:
        kinds.append(claim.kind)
        state.complete_compute(claim, actual_s=0.1)
    assert kinds[-1] is ClaimKind.REPAIR
    assert not state.begin_place(below), "compute went through this cell to repair the one above"
    assert state.wasted_bytes == 512 * 768
    assert state.restored


def test_empty_prefix_runs_the_suffix_at_once():
    problem = transformer_problem(num_tokens=0, suffix_tokens=40)
    run = run_virtual(problem, shared_plan(problem))
    assert run.ttft_s == pytest.approx(problem.suffix_s)


def test_layerwise_load_climbs_behind_the_load():
    problem = transformer_problem(ratio=0.25)
    grid = problem.grid
    rows = tuple(Tile(0, grid.num_chunks, b, b + 1) for b in range(grid.num_blocks))
    plan = replace(
        whole_chunk_plan(problem),
        compute_sequence=(),
        load_sequence=rows,
        share=Share.NONE,
        suffix_start=SuffixStart.BLOCK_BY_BLOCK,
    )
    run = run_virtual(problem, plan)
    expected = problem.load_s + problem.suffix_B[-1] + problem.head_s
    assert run.ttft_s == pytest.approx(max(expected, problem.suffix_s), rel=0.02)


def test_rates_follow_the_hardware_and_refuse_nonsense():
    rates = LiveRates(bytes_per_s=100.0)
    for _ in range(12):
        rates.observe_compute(predicted_s=1.0, actual_s=2.0)
        rates.observe_load(num_bytes=25, busy_s=1.0)
    assert rates.compute_factor == pytest.approx(2.0, rel=0.1)
    assert rates.bytes_per_s == pytest.approx(25.0, rel=0.5)
    assert rates.trusted
    rates.observe_compute(predicted_s=0.0, actual_s=5.0)
    rates.observe_load(num_bytes=0, busy_s=5.0)
    assert rates.compute_factor == pytest.approx(2.0, rel=0.1)
    with pytest.raises(ValueError, match="above 0"):
        LiveRates(bytes_per_s=0)


def test_new_tokens_are_claimed_in_short_pieces_once_the_prefix_is_there():
    problem = transformer_problem(num_tokens=0, suffix_tokens=1000)
    assert 2 * problem.suffix_B[0] < SUFFIX_CLAIM_S < problem.suffix_s / 5, "several pieces of several blocks"
    state = RestoreState(problem, shared_plan(problem), LiveRates(bytes_per_s=problem.link.bytes_per_s))
    ends = [0]
    while (claim := state.claim_compute(0.0)).kind is ClaimKind.SUFFIX:
        assert claim.block_lo == ends[-1]
        assert claim.predicted_s <= SUFFIX_CLAIM_S or claim.block_hi == claim.block_lo + 1
        ends.append(claim.block_hi)
        state.complete_compute(claim, actual_s=claim.predicted_s)
    assert ends[-1] == problem.grid.num_blocks
    assert claim.kind is ClaimKind.DONE


@pytest.mark.parametrize("ratio", [0.25, 1, 4])
def test_a_last_chunk_that_is_heavier_to_load_is_weighed_by_its_bytes(ratio):
    """As one whose cells bring the running states of recurrent blocks too."""
    problem = transformer_problem(num_tokens=2048, suffix_tokens=0, ratio=ratio)
    heavy_KB = problem.load_bytes_KB.copy()
    heavy_KB[-1] *= 7
    heavy = replace(problem, load_bytes_KB=heavy_KB)
    run = run_virtual(heavy, make_policy("cacheflow").plan(heavy))
    assert_complete(run.state)
    assert run.restore_s <= 1.05 * bound(heavy).restore_s
