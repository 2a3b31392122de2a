"""Restored keys, values and logits are the recomputed ones, bit for bit, however the grid was split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.engine.families import FAMILIES
from cacheflow.errors import ConfigError
from cacheflow.plan.grid import Tile
from support.engine_cases import prefilled, restore, same_kv
from support.examples import examples

pytestmark = pytest.mark.torch

DTYPES = ["float32", "bfloat16"]
CASES = [(family, False) for family in FAMILIES] + [("mistral", True), ("qwen2", True), ("qwen3_moe", True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "windowed"), CASES)
@settings(max_examples=examples(8))
@given(levels=st.lists(st.integers(0, 3), min_size=4, max_size=4), kv_only_top=st.booleans())
def test_every_staircase_is_bit_equal(family, windowed, dtype, levels, kv_only_top):
    case = prefilled(family, dtype, windowed=windowed)
    kv, port = restore(case, sorted(levels, reverse=True), kv_only_top=kv_only_top)
    assert same_kv(case, kv)
    assert torch.equal(port.logits, case.logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [[2, 2, 2, 2], [2, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
def test_blocks_of_several_layers(dtype, levels):
    case = prefilled("qwen3", dtype, layers_per_block=2)
    kv, port = restore(case, levels)
    assert same_kv(case, kv)
    assert torch.equal(port.logits, case.logits)


@pytest.mark.parametrize(
    ("chunk_ends", "suffix_ends"), [((5,), (6,)), ((64, 128, 130), (131,)), ((1, 2, 3), (40,)), ((), (33, 40))]
)
def test_partial_short_and_missing_chunks(chunk_ends, suffix_ends):
    case = prefilled("llama", "bfloat16", chunk_ends=chunk_ends, suffix_ends=suffix_ends)
    kv, port = restore(case, [3 if chunk == 0 else 1 for chunk in range(len(chunk_ends))])
    assert same_kv(case, kv)
    assert torch.equal(port.logits, case.logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_only_equals_the_whole_layer(dtype):
    case = prefilled("qwen3_moe", dtype)
    kv, _ = restore(case, [3, 3, 3, 3], kv_only_top=True)
    whole, _ = restore(case, [3, 3, 3, 3], kv_only_top=False)
    n = len(case.tokens)
    assert torch.equal(kv.kv_L2THD[:, :, :n], whole.kv_L2THD[:, :, :n])


def test_tall_tiles_equal_single_cells():
    case = prefilled("llama", "bfloat16")
    kv = case.runner.new_kv(case.saved.capacity)
    port = case.new_port(kv)
    for chunk in range(4):
        port.recompute(Tile(chunk, chunk + 1, 0, 3), kv_only_top=chunk % 2 == 0)
    port.run_suffix(0, 1)
    port.run_suffix(1, 3)
    port.finish()
    assert same_kv(case, kv)
    assert torch.equal(port.logits, case.logits)


def test_layer_by_layer_order_equals_chunk_by_chunk():
    case = prefilled("llama", "float32")
    kv = case.runner.new_kv(case.saved.capacity)
    port = case.new_port(kv)
    for block in range(3):
        for chunk in range(4):
            port.recompute(Tile(chunk, chunk + 1, block, block + 1), kv_only_top=block == 2)
        port.run_suffix(block, block + 1)
    port.finish()
    assert same_kv(case, kv)
    assert torch.equal(port.logits, case.logits)


def test_restart_recomputes_a_chunk_from_the_bottom():
    case = prefilled("llama", "bfloat16")
    kv = case.runner.new_kv(case.saved.capacity)
    port = case.new_port(kv)
    port.recompute(Tile(0, 1, 0, 1), kv_only_top=True)
    with pytest.raises(ValueError, match="restart"):
        port.recompute(Tile(0, 1, 1, 2), kv_only_top=False)
    port.restart(0)
    port.recompute(Tile(0, 1, 0, 3), kv_only_top=True)
    lo, hi = case.grid.chunk_range(0)
    assert torch.equal(kv.cell(0, 3, lo, hi), case.saved.cell(0, 3, lo, hi))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_cell_changes_the_logits(dtype):
    """Negative control: what the suffix reads is the restored cache."""
    case = prefilled("llama", dtype)
    kv = case.runner.new_kv(case.saved.capacity)
    port = case.new_port(kv)
    for chunk in range(4):
        for block in range(3):
            case.copy_cell(kv, chunk, block)
    kv.cell(1, 2, 0, 40).neg_()
    port.run_suffix(0, 3)
    port.finish()
    assert not torch.equal(port.logits, case.logits)


def test_an_unrestored_cell_shows_as_nan():
    case = prefilled("qwen2", "float32")
    kv = case.runner.new_kv(case.saved.capacity)
    port = case.new_port(kv)
    for chunk in range(4):
        for block in range(3):
            if (chunk, block) != (1, 1):
                case.copy_cell(kv, chunk, block)
    port.run_suffix(0, 3)
    port.finish()
    assert port.logits.isnan().all()


def test_calls_out_of_order_are_refused():
    case = prefilled("llama", "float32")
    port = case.new_port(case.runner.new_kv(case.saved.capacity))
    with pytest.raises(ValueError, match="does not continue chunk 0 at block 0"):
        port.recompute(Tile(0, 1, 1, 2), kv_only_top=False)
    with pytest.raises(ValueError, match="does not continue"):
        port.recompute(Tile(0, 2, 0, 1), kv_only_top=False)
    with pytest.raises(ValueError, match="below block 0"):
        port.run_suffix(1, 2)
    with pytest.raises(ValueError, match="below block 0 of 3"):
        port.finish()


def test_without_a_suffix_finish_yields_nothing():
    case = prefilled("llama", "float32", suffix_ends=())
    kv, port = restore(case, [3, 2, 1, 0])
    assert same_kv(case, kv)
    assert port.logits is None


def test_grid_and_prompt_must_fit():
    case = prefilled("llama", "float32")
    with pytest.raises(ConfigError, match="the KV buffer holds 100"):
        case.new_port(case.runner.new_kv(100))
