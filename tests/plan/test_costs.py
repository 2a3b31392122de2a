import json
from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError, CostRangeError, ProfileError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable, GoldenPoint, build_problem
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost

IDENTITY = CostIdentity(
    model="toy", fingerprint="abc", num_layers=4, device_type="cpu", device="Xeon", dtype="float32", num_threads=2,
    attention="split",
)  # fmt: skip
SHAPE = ModelShape(
    name="toy", num_layers=4, hidden_size=8, num_q_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=16,
    vocab_size=32, dtype="float32",
)  # fmt: skip
LINK = LinkCost(bytes_per_s=1e6)


def cost_grid(scale=1.0):
    """Bilinear by construction, so that interpolation must be exact everywhere: q * (1 + p / 100)."""
    q, p = np.array([4, 16, 32]), np.array([0, 64, 256])
    return CostGrid(
        chunk_tokens=tuple(q.tolist()),
        offsets=tuple(p.tolist()),
        full_QP=scale * q[:, None] * (1 + p / 100),
        kv_only_QP=scale * 0.1 * np.repeat(q[:, None], 3, axis=1),
    )


def table(**changes):
    base = CostTable(
        identity=IDENTITY,
        layer_kinds=("sliding", "sliding", "full", "full"),
        kinds={"sliding": cost_grid(0.5), "full": cost_grid()},
        head_s=0.25,
        call_overhead_s=0.001,
        golden=(GoldenPoint(kind="full", chunk_tokens=16, offset=64, kv_only=False, expected_s=16 * 1.64),),
    )
    return replace(base, **changes)


def test_measured_points_come_back_exactly_and_the_rest_is_bilinear():
    costs = cost_grid()
    for i, q in enumerate(costs.chunk_tokens):
        for j, p in enumerate(costs.offsets):
            assert costs.full_s(q, p) == costs.full_QP[i, j]
            assert costs.kv_only_s(q, p) == costs.kv_only_QP[i, j]
    assert costs.full_s(10, 100) == pytest.approx(10 * 2.0)
    assert costs.kv_only_s(10, 100) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("point", "message"), [((33, 0), r"33 .* 4\.\.32"), ((3, 0), r"3 .* 4\.\.32"), ((8, 257), r"257 .* 0\.\.256")]
)
def test_nothing_is_extrapolated(point, message):
    with pytest.raises(CostRangeError, match=message):
        cost_grid().full_s(*point)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_tokens": (4, 4, 8)},
        {"chunk_tokens": (0, 4, 8)},
        {"offsets": ()},
        {"offsets": (0, 64)},
        {"full_QP": np.full((3, 3), np.nan)},
        {"kv_only_QP": np.full((3, 3), 1e9)},
    ],
)
def test_a_malformed_grid_is_refused(changes):
    with pytest.raises(ProfileError):
        replace(cost_grid(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_kinds": ("full",)},
        {"layer_kinds": ("full", "full", "full", "linear")},
        {"head_s": -1.0},
        {"golden": (GoldenPoint(kind="full", chunk_tokens=16, offset=64, kv_only=False, expected_s=26.0),)},
        {"golden": (GoldenPoint(kind="other", chunk_tokens=16, offset=64, kv_only=False, expected_s=26.0),)},
    ],
)
def test_a_table_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ProfileError):
        table(**changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "other"), ("fingerprint", "x"), ("device", "EPYC"), ("dtype", "bfloat16"), ("num_threads", 8)],
)
def test_costs_of_another_model_or_machine_are_refused_by_name(field, value):
    IDENTITY.require(IDENTITY)
    with pytest.raises(ProfileError, match=f"{field} .*{value}"):
        IDENTITY.require(replace(IDENTITY, **{field: value}))


def test_a_table_survives_json():
    data = json.loads(json.dumps(table().to_dict()))
    again = CostTable.from_dict(data)
    assert again.to_dict() == table().to_dict()
    assert again.identity == IDENTITY


@pytest.mark.parametrize(
    ("key", "value"), [("format_version", 2), ("identity", {}), ("kinds", {}), ("golden", [1]), ("kinds", {"full": {}})]
)
def test_a_malformed_file_is_a_profile_error(key, value):
    with pytest.raises(ProfileError):
        CostTable.from_dict({**table().to_dict(), key: value})


def test_a_problem_has_the_costs_of_its_chunks_kinds_and_bytes():
    grid = Grid.regular(num_tokens=40, chunk_tokens=16, num_blocks=4, suffix_tokens=20)
    problem = build_problem(table(), grid, SHAPE, link=LINK)
    assert problem.compute_KB[:, 2].tolist() == pytest.approx([16.0, 16 * 1.16, 8 * 1.32])
    assert problem.compute_KB[:, 0].tolist() == pytest.approx([8.0, 8 * 1.16, 4 * 1.32])
    assert problem.kv_only_KB[:, 3].tolist() == pytest.approx([1.6, 1.6, 0.8])
    assert problem.load_bytes_KB[:, 1].tolist() == [16 * 32, 16 * 32, 8 * 32]
    assert problem.suffix_B[3] == pytest.approx(16 * 1.40 + 4 * 1.56)
    assert problem.head_s == 0.25


def test_a_block_of_layers_skips_only_its_top_layer():
    grid = Grid.regular(num_tokens=32, chunk_tokens=16, num_blocks=2)
    problem = build_problem(table(), grid, SHAPE, link=LINK, layers_per_block=3)
    assert problem.compute_KB[0].tolist() == pytest.approx([8.0 + 8.0 + 16.0, 16.0])
    assert problem.kv_only_KB[0].tolist() == pytest.approx([8.0 + 8.0 + 1.6, 1.6])
    assert problem.load_bytes_KB[0].tolist() == [3 * 16 * 32, 16 * 32]
    assert problem.head_s == 0


def test_bytes_are_those_of_each_layer():
    grid = Grid.regular(num_tokens=24, chunk_tokens=16, num_blocks=2)
    shape = replace(SHAPE, kv_token_bytes=(32, 32, 128, 64))
    problem = build_problem(table(), grid, shape, link=LINK, layers_per_block=3)
    assert problem.load_bytes_KB.tolist() == [[16 * 192, 16 * 64], [8 * 192, 8 * 64]]
    assert problem.load_bytes_KB.sum() == 24 * shape.kv_bytes_per_token


def test_a_grid_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ConfigError, match="3 blocks"):
        build_problem(table(), Grid.regular(num_tokens=16, chunk_tokens=16, num_blocks=3), SHAPE, link=LINK)


def test_nothing_to_restore_is_a_problem_too():
    grid = Grid.regular(num_tokens=0, chunk_tokens=16, num_blocks=4, suffix_tokens=8)
    assert build_problem(table(), grid, SHAPE, link=LINK).recompute_s == 0
