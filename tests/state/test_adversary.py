"""The state machine against a hostile world: absurd costs, failing reads, times off by a thousand, any order of ends.

Every run must end with each cell restored once, every claim possible for a transformer, and the books balanced.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cacheflow.plan.grid import Cell, Grid, Tile
from cacheflow.plan.plan import RestorePlan
from cacheflow.plan.problem import LinkCost, RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.state.board import CellState
from cacheflow.state.compute_side import ClaimKind, ComputeClaim
from cacheflow.state.restoration import RestoreState
from cacheflow.types import LoadOutcome

FAILURES = [outcome for outcome in LoadOutcome if outcome is not LoadOutcome.OK]
RESIDENT = (CellState.LOADED, CellState.COMPUTED)
ONCE_DEADLOCKED = (523810,)
"""Compute waited for a chunk whose activations were spent, the link for compute to be first."""


def absurd_problem(rng: np.random.Generator) -> RestoreProblem:
    num_chunks, num_blocks = int(rng.choice([1, 1, 2, 3, 5, 9, 16])), int(rng.choice([1, 1, 2, 3, 4, 8]))
    cells = (num_chunks, num_blocks)
    draw = [
        lambda: np.zeros(cells),
        lambda: np.ones(cells),
        lambda: 10.0 ** rng.uniform(-9, 6, cells),
        lambda: rng.uniform(0, 1, cells) * (rng.random(cells) < 0.5),
        lambda: np.repeat(np.sort(rng.uniform(0.1, 1, num_chunks))[:, None], num_blocks, 1),
        lambda: np.repeat(np.sort(rng.uniform(0.1, 1, num_chunks))[::-1][:, None], num_blocks, 1),
        lambda: rng.uniform(0.1, 1, cells),
    ]
    compute_KB = draw[rng.integers(7)]()
    kv_only_KB = compute_KB * rng.choice([0.01, 0.1, 0.5, 1])
    tokens_K = rng.integers(1, 600, num_chunks)
    bytes_KB = (tokens_K[:, None] * rng.choice([1, 1000, 10**6])).repeat(num_blocks, 1)
    if rng.random() < 0.2:
        bytes_KB = rng.integers(0, 1000, cells)
    if rng.random() < 0.05:
        bytes_KB = np.zeros(cells, dtype=np.int64)
    ratio = 10 ** rng.uniform(-6, 6)
    rate = float("inf") if rng.random() < 0.05 else max(1, bytes_KB.sum()) / ((compute_KB.sum() or 1.0) * ratio)
    has_suffix = rng.random() < 0.6
    suffix_B = (
        rng.choice([0, 1, 10.0 ** rng.uniform(-6, 3)]) * rng.random(num_blocks) if has_suffix else np.zeros(num_blocks)
    )
    ends = tuple(tokens_K.cumsum().tolist())
    return RestoreProblem(
        grid=Grid(chunk_ends=ends, num_blocks=num_blocks, suffix_ends=(ends[-1] + 8,) if has_suffix else ()),
        compute_KB=compute_KB,
        kv_only_KB=kv_only_KB,
        load_bytes_KB=bytes_KB.astype(np.int64),
        link=LinkCost(bytes_per_s=rate, latency_s=float(rng.choice([0, 0.01, 10]))),
        suffix_B=suffix_B,
        head_s=float(rng.choice([0, 0.1])) if has_suffix else 0.0,
    )


def with_checkpoint(problem: RestoreProblem, recurrent_B: np.ndarray) -> RestoreProblem:
    """Some blocks recurrent: their last cells bring a state too, of as many bytes as three chunks."""
    bytes_KB = problem.load_bytes_KB.copy()
    bytes_KB[-1] += recurrent_B * 3 * bytes_KB.max()
    return replace(problem, load_bytes_KB=bytes_KB, recurrent_B=recurrent_B)


@dataclass
class World:
    """Ends work in any order after any time; fails reads; may close the link."""

    problem: RestoreProblem
    plan: RestorePlan
    rng: np.random.Generator
    min_claim_s: float
    depth: int
    fail_share: float
    any_order: bool
    wild_times: bool
    closes_link: bool
    reads: list[Cell] = field(default_factory=list)
    work: ComputeClaim | None = None
    now_s: float = 0.0
    suffix_next: int = 0
    climbed: dict[int, int | None] = field(default_factory=dict)
    loaded: Counter = field(default_factory=Counter)
    passed: dict[int, int] = field(default_factory=dict)
    """Of each recurrent block, the leading chunks whose recomputation its running state holds."""

    def run(self) -> RestoreState:
        self.rates = LiveRates(bytes_per_s=self.problem.link.bytes_per_s)
        self.state = RestoreState(self.problem, self.plan, self.rates, min_claim_s=self.min_claim_s)
        waits = 0
        while self._give_work():
            if not self.reads and self.work is None:
                waits += 1
                self.now_s += 10 ** self.rng.uniform(-6, 6)
                assert waits < 50, "deadlock: compute waits, nothing is in flight, the link claims nothing"
                continue
            waits = 0
            if self.reads and (self.work is None or self.rng.random() < 0.5):
                self._end_read()
            else:
                elapsed_s = self._elapsed_s(self.work.predicted_s)
                self.state.complete_compute(self.work, actual_s=elapsed_s)
                self.work = None
            if self.closes_link and self.rng.random() < 0.02:
                self.state.close_link()
        for cell in self.reads:
            assert not self.state.begin_place(cell), "done while a read was still wanted"
        return self.state

    def _give_work(self) -> bool:
        self._start_reads()
        if self.work is None:
            claim = self.state.claim_compute(self.now_s)
            if claim.kind is ClaimKind.DONE:
                return False
            if claim.kind is not ClaimKind.WAIT:
                self.work = claim
                self._check_claim(claim)
            self._start_reads()
        return True

    def _start_reads(self) -> None:
        while len(self.reads) < self.depth and (cell := self.state.claim_load(self.now_s)) is not None:
            self.reads.append(cell)

    def _end_read(self) -> None:
        cell = self.reads.pop(int(self.rng.integers(len(self.reads))) if self.any_order else 0)
        num_bytes = int(self.problem.load_bytes_KB[cell])
        elapsed_s = self._elapsed_s(num_bytes / self.problem.link.bytes_per_s)
        if self.rng.random() < self.fail_share:
            self.state.fail_load(cell, FAILURES[int(self.rng.integers(len(FAILURES)))])
            return
        self.rates.observe_load(num_bytes=num_bytes, busy_s=elapsed_s)
        if self.state.begin_place(cell):
            self.rng.random()
            self.state.complete_load(cell, self.now_s)
            self.loaded[cell] += 1

    def _elapsed_s(self, expected_s: float) -> float:
        elapsed_s = expected_s * (10 ** self.rng.uniform(-3, 3) if self.wild_times else 1)
        self.now_s += elapsed_s
        return elapsed_s

    def _check_claim(self, claim: ComputeClaim) -> None:
        grid = self.problem.grid
        if claim.tile is None:
            assert claim.block_lo == self.suffix_next < claim.block_hi
            self.suffix_next = claim.block_hi
            needed = Tile(0, grid.num_chunks, claim.block_lo, claim.block_hi).cells() if grid.num_chunks else ()
            assert all(self.state.board.state(*cell) in RESIDENT for cell in needed)
            return
        tile = claim.tile
        for chunk in range(tile.chunk_lo, tile.chunk_hi):
            height = 0 if claim.restart else self.climbed.get(chunk, 0)
            assert height == tile.block_lo, "the activations below the claim are gone"
            self.climbed[chunk] = None if claim.kv_only_top else tile.block_hi
            for block in np.flatnonzero(self.problem.recurrent_B[tile.block_lo : tile.block_hi]) + tile.block_lo:
                assert chunk in (0, self.passed.get(block, 0)), "the running state is not that of the chunks before"
                self.passed[block] = chunk + 1
        for head in range(tile.chunk_lo):
            assert all(self.state.board.state(head, block) in RESIDENT for block in range(tile.block_lo, tile.block_hi))


def run_seed(seed: int, *, recurrent: bool = False) -> None:
    rng = np.random.default_rng(seed)
    problem = absurd_problem(rng)
    if recurrent:
        problem = with_checkpoint(problem, rng.random(problem.grid.num_blocks) < rng.choice([0.3, 1.0]))
    plan = make_policy(list(RESTORE_POLICIES)[int(rng.integers(len(RESTORE_POLICIES)))]).plan(problem)
    world = World(
        problem,
        plan,
        rng,
        min_claim_s=float(rng.choice([0, 0, 1e-3, 1, 1e6])),
        depth=int(rng.choice([1, 2, 3, 8])),
        fail_share=[float(rng.choice([0, 0, 0.1, 0.5, 1])), rng.choice([0, 0, 0, 0])][0],
        any_order=bool(rng.random() < 0.3),
        wild_times=bool(rng.random() < 0.5),
        closes_link=bool(rng.random() < 0.2),
    )
    state = world.run()
    assert state.restored
    assert state.link.in_flight_bytes == 0
    assert recurrent or all(count == 1 for count in world.loaded.values())
    for block in np.flatnonzero(problem.recurrent_B):
        last = problem.grid.num_chunks - 1
        brought = state.board.state(last, block) is CellState.LOADED
        assert brought or world.passed[block] == last + 1, "the state at the end is neither loaded nor recomputed"
    assert world.suffix_next == (problem.grid.num_blocks if problem.grid.suffix_ends else 0)
    board = state.board
    assert abs(board.open_bytes) < 1e-6
    assert abs(board.open_compute_s) <= 1e-9 * max(1.0, problem.compute_KB.sum())


@pytest.mark.parametrize("seed", ONCE_DEADLOCKED)
def test_seeds_that_once_deadlocked(seed):
    run_seed(seed)


@pytest.mark.parametrize("block", range(10))
def test_any_world_ends_with_every_cell_restored_once(block):
    for seed in range(1000 * block, 1000 * block + 200):
        run_seed(seed)


@pytest.mark.parametrize("block", range(5))
def test_recurrent_blocks_are_recomputed_in_sequence_whatever_the_link_fails_to_bring(block):
    for seed in range(1000 * block, 1000 * block + 200):
        run_seed(seed, recurrent=True)
