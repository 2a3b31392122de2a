import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.plan.grid import Tile
from cacheflow.plan.staircase import (
    check_levels,
    compute_tiles,
    heights_of,
    levels_of,
    load_tiles,
    staircase_compute_s,
    staircase_load_bytes,
    upper_tiles,
)
from support import exact_solver
from support.examples import examples
from support.random_problems import problems


def test_levels_and_heights_are_transposed_views_of_one_staircase():
    levels = check_levels([4, 4, 2, 1, 0], 4)
    heights = heights_of(levels, 4)
    assert heights.tolist() == [4, 3, 2, 2]
    assert levels_of(heights, 5).tolist() == levels.tolist()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_heights_invert_levels(values):
    levels = np.array(sorted(values, reverse=True))
    assert levels_of(heights_of(levels, 6), len(levels)).tolist() == levels.tolist()


@pytest.mark.parametrize(("levels", "message"), [([1, 2], "chunk 1 has 2 after 1"), ([5], "0..4"), ([0, -1], "0..4")])
def test_what_is_no_staircase_is_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        check_levels(levels, 4)


@settings(max_examples=examples(60))
@given(problems(), st.data())
def test_cost_is_the_definition_summed_cell_by_cell(problem, data):
    grid = problem.grid
    levels = sorted(
        data.draw(st.lists(st.integers(0, grid.num_blocks), min_size=grid.num_chunks, max_size=grid.num_chunks)),
        reverse=True,
    )
    for kv_only_top in (True, False):
        compute_s, load_s = exact_solver.ends(problem, levels, kv_only_top=kv_only_top)
        array = check_levels(levels, grid.num_blocks)
        assert staircase_compute_s(problem, array, kv_only_top=kv_only_top) == pytest.approx(compute_s)
        assert problem.link.load_s(staircase_load_bytes(problem, array)) == pytest.approx(load_s)


def test_tiles_cover_the_grid_once_and_loads_begin_at_the_tail():
    levels = (3, 2, 2, 0)
    assert compute_tiles(levels) == (Tile(0, 1, 0, 3), Tile(1, 2, 0, 2), Tile(2, 3, 0, 2))
    assert load_tiles(levels, 3) == (Tile(3, 4, 0, 3), Tile(2, 3, 2, 3), Tile(1, 2, 2, 3))
    assert upper_tiles(levels, 3) == load_tiles(levels, 3)[::-1]
    cells = [cell for tile in (*compute_tiles(levels), *load_tiles(levels, 3)) for cell in tile.cells()]
    assert sorted(cells) == [(chunk, block) for chunk in range(4) for block in range(3)]
