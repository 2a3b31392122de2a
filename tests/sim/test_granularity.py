from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.sim.granularity import CELLS, COLUMNS, EXACT, ROWS, Grain, coarse_cut, coarsen
from support.random_problems import random_problem


@given(
    seed=st.integers(0, 10**6),
    num_chunks=st.integers(1, 70),
    num_blocks=st.integers(1, 40),
    grain=st.sampled_from([COLUMNS, ROWS, CELLS, Grain(max_cells=20), Grain(max_cells=2), EXACT]),
    cut_share=st.floats(0, 1),
)
def test_seconds_and_bytes_stay_what_they_are(seed, num_chunks, num_blocks, grain, cut_share):
    problem = random_problem(np.random.default_rng(seed), num_chunks=num_chunks, num_blocks=num_blocks)
    cut = int(cut_share * (num_chunks - 1))
    coarse = coarsen(problem, grain, cut=cut)
    assert coarse.recompute_s == pytest.approx(problem.recompute_s)
    assert coarse.suffix_s == pytest.approx(problem.suffix_s)
    assert coarse.compute_KB.sum() == pytest.approx(problem.compute_KB.sum())
    assert coarse.load_bytes_KB.sum() == problem.load_bytes_KB.sum()
    assert set(coarse.grid.chunk_ends) <= set(problem.grid.chunk_ends)
    assert coarse.grid.num_tokens == problem.grid.num_tokens
    assert coarse.grid.suffix_ends == problem.grid.suffix_ends
    begin = coarse_cut(coarse, problem, cut)
    assert coarse.load_bytes_KB[:begin].sum() == problem.load_bytes_KB[:cut].sum()
    if grain.max_cells:
        blocks = coarse.grid.num_blocks
        assert coarse.grid.num_chunks * blocks <= max(grain.max_cells, blocks) + (blocks if cut else 0)
        assert blocks <= grain.max_cells


def test_columns_keep_chunks_and_rows_keep_layers():
    problem = random_problem(np.random.default_rng(1), num_chunks=24, num_blocks=32, equal=True)
    assert coarsen(problem, COLUMNS).compute_KB.shape == (24, 1)
    assert coarsen(problem, ROWS).compute_KB.shape == (1, 32)
    assert coarsen(problem, CELLS).compute_KB.shape == (6, 16)
    assert coarsen(problem, EXACT) is problem


def test_a_grid_that_is_small_enough_is_left_alone():
    problem = random_problem(np.random.default_rng(1), num_chunks=3, num_blocks=32)
    assert coarsen(problem, CELLS) is problem


def test_chunks_are_fine_where_compute_and_the_link_meet():
    problem = random_problem(np.random.default_rng(3), num_chunks=200, num_blocks=1, equal=True, suffix=False)
    compute_K = problem.compute_KB.sum(axis=1).cumsum()
    link_K = problem.load_bytes_KB.sum(axis=1)[::-1].cumsum()[::-1] / problem.link.bytes_per_s
    meeting = int(np.argmax(compute_K >= link_K))
    ends = np.array(coarsen(problem, Grain(max_cells=20)).grid.chunk_ends)
    chunks = np.searchsorted(problem.grid.chunk_ends, ends)
    sizes = np.diff([-1, *chunks.tolist()])
    group = int(np.searchsorted(chunks, meeting))
    assert sizes[group] < sizes.max() / 2


@pytest.mark.parametrize("values", [{"max_cells": 1}, {"max_cells": -1}, {"max_blocks": 0}, {"max_chunks": 0}])
def test_counts_that_cannot_be_are_refused(values):
    with pytest.raises(ConfigError, match="must be"):
        Grain(**values)
