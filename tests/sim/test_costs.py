from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError, CostRangeError
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable, build_problem
from cacheflow.plan.grid import Grid, regular_ends
from cacheflow.plan.problem import LinkCost
from cacheflow.shapes.roofline import Efficiency, Roofline, problem_from_roofline
from cacheflow.sim.costs import measured_costs
from support.clusters import GPU, SHAPE, TOKENS, tiny_costs

LINK = LinkCost(bytes_per_s=1e9)


def table(num_layers: int = 8) -> CostTable:
    chunks, offsets = (16, 64, 128), (0, 256, 1024)
    full_QP = np.array([[1e-4 * q + 1e-7 * q * p for p in offsets] for q in chunks])
    kinds = ("full", "sliding")
    identity = CostIdentity(
        model="tiny-8", fingerprint="f", num_layers=num_layers, device_type="cpu", device="box", dtype="bfloat16",
        num_threads=1, attention="sdpa",
    )  # fmt: skip
    grids = {
        kind: CostGrid(chunk_tokens=chunks, offsets=offsets, full_QP=full_QP * factor, kv_only_QP=full_QP * 0.1)
        for kind, factor in zip(kinds, (1.0, 0.5), strict=True)
    }
    return CostTable(
        identity=identity, layer_kinds=tuple(kinds[i % 2] for i in range(num_layers)), kinds=grids, head_s=0.003
    )


GRIDS = [
    Grid.regular(num_tokens=640, chunk_tokens=TOKENS, num_blocks=8, suffix_tokens=100),
    Grid(chunk_ends=regular_ends(128, 512, TOKENS), num_blocks=8, suffix_ends=(530,), start=128),
    Grid(chunk_ends=(50, 114, 200), num_blocks=8, suffix_ends=(264, 290)),
    Grid(chunk_ends=(), num_blocks=8, suffix_ends=(64, 128, 130)),
    Grid(chunk_ends=(64, 128, 150), num_blocks=8),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_table_of_chunks_says_what_the_roofline_says(grid):
    costs = tiny_costs()
    costs.problem(GRIDS[0], link=LINK)
    expected = problem_from_roofline(Roofline(shape=SHAPE, gpu=GPU), grid, link=LINK)
    actual = costs.problem(grid, link=LINK)
    for name in ("compute_KB", "kv_only_KB", "load_bytes_KB", "suffix_B"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-12, err_msg=name)
    assert actual.head_s == expected.head_s


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("token_bytes", [None, (512, 1024) * 4])
def test_a_profile_gives_what_its_table_gives_kinds_of_layers_included(grid, token_bytes):
    shape = replace(SHAPE, kv_token_bytes=token_bytes)
    costs = measured_costs(table(), shape, path="p.json", chunk_tokens=TOKENS)
    if any(end - start < 16 for start, end in map(grid.suffix_range, range(len(grid.suffix_ends)))):
        return  # the table refuses chunks that short; see below
    expected = build_problem(table(), grid, shape, link=LINK)
    actual = costs.problem(grid, link=LINK)
    for name in ("compute_KB", "kv_only_KB", "load_bytes_KB", "suffix_B"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-12, err_msg=name)
    assert costs.source == "measured:p.json"
    assert costs.gpu == "box"


def test_a_chunk_shorter_than_measured_costs_as_much_as_the_shortest():
    costs = measured_costs(table(), SHAPE, path="p.json", chunk_tokens=TOKENS)
    short, least = (
        costs.problem(Grid(chunk_ends=(64,), num_blocks=8, suffix_ends=(64 + tokens,)), link=LINK) for tokens in (1, 16)
    )
    assert short.suffix_s == pytest.approx(least.suffix_s)


def test_a_profile_is_refused_outside_its_range_and_for_another_model():
    costs = measured_costs(table(), SHAPE, path="p.json", chunk_tokens=TOKENS)
    with pytest.raises(CostRangeError, match="outside the measured"):
        costs.problem(Grid.regular(num_tokens=2048, chunk_tokens=TOKENS, num_blocks=8), link=LINK)
    with pytest.raises(CostRangeError, match="outside the measured"):
        costs.decode_step_s(4, 4 * 2000)
    with pytest.raises(ConfigError, match="no costs for chunks of 512"):
        measured_costs(table(), SHAPE, path="p.json", chunk_tokens=512)
    with pytest.raises(ConfigError, match="costs of 6 layers"):
        measured_costs(table(6), SHAPE, path="p.json", chunk_tokens=TOKENS)
    with pytest.raises(ConfigError, match="4 blocks"):
        costs.problem(Grid(chunk_ends=(64,), num_blocks=4), link=LINK)


def test_a_decode_step_of_a_profile_is_a_chunk_at_the_mean_context():
    costs = measured_costs(table(), SHAPE, path="p.json", chunk_tokens=TOKENS)
    layer_s = 64 * 1e-4 + 1e-7 * 64 * 256
    assert costs.decode_step_s(64, 64 * 256) == pytest.approx(8 * 0.75 * layer_s + 0.003)
    assert costs.decode_step_s(0, 0) == 0.0


def test_a_decode_step_reads_weights_once_and_every_context():
    """Memory-bound by hand: all weights and the LM head once, keys and values of 10,000 tokens."""
    perfect = Efficiency(gemm=1.0, attention=1.0, memory=1.0, layer_overhead_s=0.0)
    roofline = Roofline(shape=SHAPE, gpu=replace(GPU, dense_flops_per_s=1e30), efficiency=perfect)
    layer = 1024 * 128 * 2 * (8 + 4) + 3 * 1024 * 4096
    moved = 2 * (8 * layer + 32_000 * 1024) + 10_000 * SHAPE.kv_bytes_per_token
    assert roofline.decode_s(4, 10_000) == pytest.approx(moved / GPU.memory_bytes_per_s)
    assert roofline.decode_s(0, 0) == 0.0
    assert SHAPE.weight_bytes == 2 * (8 * layer + 2 * 32_000 * 1024)


def test_a_large_batch_is_bound_by_arithmetic():
    perfect = Efficiency(gemm=1.0, attention=1.0, memory=1.0, layer_overhead_s=0.0)
    roofline = Roofline(shape=SHAPE, gpu=replace(GPU, memory_bytes_per_s=1e30), efficiency=perfect)
    layer = 1024 * 128 * 2 * (8 + 4) + 3 * 1024 * 4096
    flops = 8 * (2 * 64 * layer + 4 * 8 * 128 * 6_400)
    assert roofline.decode_s(64, 6_400) == pytest.approx(flops / GPU.dense_flops_per_s)
