"""Reads of one prefix from two stores: each has its own reads under way, by the same pointer."""

import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.rates import LiveRates
from cacheflow.plan.tiers import over_tiers
from cacheflow.policies.registry import make_policy
from cacheflow.state.board import CellState
from cacheflow.state.restoration import RestoreState
from support.examples import examples
from support.problems import shared_plan, transformer_problem, whole_chunk_plan

DEPTH = 2
TIERS = (0, 1)


def state_over(tiers, *, plan="shared", suffix_tokens=0, slowness=4.0):
    problem = transformer_problem(num_tokens=512 * len(tiers), num_blocks=6, suffix_tokens=suffix_tokens)
    rate = problem.link.bytes_per_s
    problem = over_tiers(problem, tiers, [rate, rate / slowness])
    made = {"shared": shared_plan, "whole": whole_chunk_plan, "load": make_policy("load").plan}[plan](problem)
    return RestoreState(problem, made, LiveRates(bytes_per_s=rate))


def claim_all(state, under_way, now_s):
    """Claim as a driver does that keeps ``DEPTH`` reads of each tier under way."""
    while True:
        busy = {tier for tier in TIERS if len(under_way[tier]) >= DEPTH}
        cell = state.claim_load(now_s, busy)
        if cell is None:
            return
        tier = state.board.tier(*cell)
        assert tier not in busy
        under_way[tier].append(cell)
        assert state.link.reads_by_tier[tier] == len(under_way[tier])


def end_read(state, cell, now_s):
    if state.begin_place(cell):
        state.complete_load(cell, now_s)


def test_a_fast_tier_goes_on_while_a_slow_one_has_not_answered():
    """Loading alone, the head in the slow tier: its first reads never end, all of the fast tier's do."""
    state, under_way = state_over([1, 1, 1, 0, 0, 0], plan="load"), {tier: deque() for tier in TIERS}
    for step in range(18):
        claim_all(state, under_way, step * 0.01)
        assert len(under_way[1]) == DEPTH
        end_read(state, under_way[0].popleft(), step * 0.01)
    claim_all(state, under_way, 1.0)
    assert not under_way[0]
    assert all(state.board.is_resident(chunk, block) for chunk in (3, 4, 5) for block in range(6))
    assert not state.restored


def test_without_tiers_a_busy_link_claims_nothing():
    state = state_over([0] * 4)
    assert state.claim_load(0.0, {0}) is None
    assert state.claim_load(0.0) is not None


def test_bytes_are_reported_as_moved_and_rates_are_those_of_the_fastest_tier():
    state = state_over([1, 1, 0, 0], plan="load", slowness=10.0)
    moved, rate, now_s = 512 * 768, state.rates.bytes_per_s, 0.0
    while (cell := state.claim_load(now_s)) is not None:
        busy_s = state.num_bytes(cell) / rate
        now_s += busy_s
        state.observe_read(cell, num_bytes=moved, busy_s=busy_s)
        end_read(state, cell, now_s)
    assert state.restored
    assert state.rates.bytes_per_s == pytest.approx(rate, rel=1e-3)
    assert state.report(restore_s=1.0, spans=()).loaded_bytes == 24 * moved


@settings(max_examples=examples(60))
@given(
    tiers=st.lists(st.sampled_from(TIERS), min_size=1, max_size=8),
    plan=st.sampled_from(["shared", "whole", "load"]),
    suffix_tokens=st.sampled_from([0, 64, 700]),
    seed=st.integers(0, 1000),
)
def test_every_cell_is_restored_whichever_tier_is_ahead(tiers, plan, suffix_tokens, seed):
    state = state_over(tiers, plan=plan, suffix_tokens=suffix_tokens)
    under_way, choose, now_s = {tier: deque() for tier in TIERS}, random.Random(seed), 0.0
    for _ in range(20 * 6 * len(tiers)):
        if state.restored:
            break
        now_s += 0.01
        claim_all(state, under_way, now_s)
        side = choose.choice(["compute", 0, 1])
        if side == "compute":
            claim = state.claim_compute(now_s)
            if claim.tile is not None:
                state.complete_compute(claim, actual_s=claim.predicted_s)
        elif under_way[side]:
            end_read(state, under_way[side].popleft(), now_s)
    assert state.restored
    num_blocks = state.problem.grid.num_blocks
    cells = {state.board.state(chunk, block) for chunk in range(len(tiers)) for block in range(num_blocks)}
    assert cells <= {CellState.COMPUTED, CellState.LOADED}


def test_a_problem_of_other_tiers_is_another_problem():
    problem = state_over([1, 0]).problem
    assert replace(problem, tier_KB=np.zeros_like(problem.tier_KB)).num_tiers == 1
