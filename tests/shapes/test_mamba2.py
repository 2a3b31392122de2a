"""Models of which each layer does one thing (Nemotron-H): their rows, what they keep, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import Mamba2Shape
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost
from cacheflow.plan.stages import RankLayout, rank_problem, split_rows
from cacheflow.shapes.hardware import GPUS, find_model
from cacheflow.shapes.hf_config import shape_of
from cacheflow.shapes.roofline import Roofline, problem_from_roofline
from cacheflow.sim.costs import roofline_costs

NAME = "Nemotron-3-Nano-30B-A3B"
NEMOTRON_3_NANO = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "chunk_size": 128, "conv_kernel": 4,
    "head_dim": 128, "hidden_size": 2688, "intermediate_size": 1856, "mamba_head_dim": 64, "mamba_num_heads": 64,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_ssm_cache_dtype": "float32", "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1,
    "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 52, "num_key_value_heads": 2,
    "sliding_window": None, "ssm_state_size": 128, "torch_dtype": "bfloat16", "vocab_size": 131072,
}  # fmt: skip
STATE_BYTES = 2_134_016


def problem_of(shape, num_tokens=8192):
    grid = Grid.regular(num_tokens=num_tokens, chunk_tokens=2048, num_blocks=shape.num_rows, suffix_tokens=256)
    return problem_from_roofline(Roofline(shape=shape, gpu=GPUS["H100"]), grid, link=LinkCost(bytes_per_s=1e9))


def test_rows_come_from_the_pattern():
    shape = shape_of(NEMOTRON_3_NANO, name=NAME)
    assert shape == find_model(NAME)
    assert isinstance(shape, Mamba2Shape)
    assert shape.rows == (*("MEMEM*E",) * 5, "MEMEMEM*EMEMEMEME")
    assert "".join(shape.rows) == shape.pattern
    assert shape.num_rows == 6


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("M-M*-MM*-M*M-", ("M-M*-", "MM*-", "M*M-")),
        ("M*-*", ("M*-", "*")),
        ("*M*", ("*", "M*")),
        ("--M*", ("--M*",)),
    ],
)
def test_a_row_begins_with_the_recurrent_layers_below_its_attention(pattern, rows):
    config = NEMOTRON_3_NANO | {"hybrid_override_pattern": pattern, "n_routed_experts": None}
    assert shape_of(config, name="x").rows == rows


def test_layers_may_be_listed_by_name():
    names = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    others = {**names, "M": "linear_attention", "*": "full_attention"}
    for each in (names, others):
        listed = [each[letter] for letter in NEMOTRON_3_NANO["hybrid_override_pattern"]]
        config = NEMOTRON_3_NANO | {"hybrid_override_pattern": None, "layers_block_type": listed}
        assert shape_of(config, name=NAME) == find_model(NAME)


def test_what_it_keeps():
    shape = find_model(NAME)
    assert shape.kv_bytes_per_token == 6_144
    assert shape.state_bytes == STATE_BYTES
    assert shape.state_bytes_B(1) == (*(3 * STATE_BYTES,) * 5, 8 * STATE_BYTES)
    assert shape.state_bytes_B(4) == (12 * STATE_BYTES, 11 * STATE_BYTES)
    assert shape.checkpoint_bytes == 23 * STATE_BYTES == sum(shape.state_bytes_B(1))
    assert round(shape.checkpoint_bytes / shape.kv_bytes_per_token) == 7989
    half = shape_of(NEMOTRON_3_NANO | {"mamba_ssm_cache_dtype": "bfloat16"}, name="x")
    assert half.state_bytes == 1_085_440
    with pytest.raises(ConfigError, match="different numbers of recurrent layers"):
        _ = shape.row_state_bytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hybrid_override_pattern": "MEM*-"}, "some layers are dense and some have experts"),
        ({"hybrid_override_pattern": "MOM*"}, r"pattern 'MOM\*' must have 1 attention layers"),
        ({"hybrid_override_pattern": "MEME"}, "a recurrent state in some layers"),
        ({"hybrid_override_pattern": None}, "lacks hybrid_override_pattern"),
        ({"moe_latent_size": 1024}, "moe_latent_size is 1024"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"n_groups": 5}, "num_state_heads 64 is no multiple of num_state_groups 5"),
        ({"mamba_ssm_cache_dtype": "float8"}, "state_dtype 'float8' is not one of"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"ssm_state_size": None}, "lacks ssm_state_size"),
        ({"model_type": "granitemoehybrid"}, "has MLPs in the same layers"),
    ],
    ids=str,
)
def test_what_the_shape_cannot_say_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        shape_of(NEMOTRON_3_NANO | changes, name="x")


def test_the_weights_are_as_many_as_its_authors_say():
    """31.6 billion parameters, embeddings included."""
    found = find_model(NAME).weight_bytes / 2
    assert found == pytest.approx(31.6e9, rel=0.005)


def test_the_last_row_is_longer_and_run_whole_for_its_states():
    shape = find_model(NAME)
    problem = problem_of(shape)
    assert (problem.load_bytes_KB[:-1] == 2048 * 1024).all()
    assert (problem.load_bytes_KB[-1] == 2048 * 1024 + np.array(shape.state_bytes_B(1))).all()
    assert problem.recurrent_B.all()
    assert (problem.compute_KB[:, :5] == problem.compute_KB[:, :1]).all()
    assert (problem.compute_KB[:, 5] > 2 * problem.compute_KB[:, 0]).all()
    assert (problem.kv_only_KB[:, 5] == problem.compute_KB[:, 5]).all()
    assert (problem.kv_only_KB[:, :5] < problem.compute_KB[:, :5]).all()
    assert problem.suffix_B[5] > 2 * problem.suffix_B[0]
    same = roofline_costs(Roofline(shape=shape, gpu=GPUS["H100"]), chunk_tokens=2048).problem(
        problem.grid, link=problem.link
    )
    for field in ("compute_KB", "kv_only_KB", "load_bytes_KB", "recurrent_B", "suffix_B"):
        assert np.allclose(getattr(same, field), getattr(problem, field)), field


def test_only_attention_costs_more_the_further_a_chunk_lies():
    roofline = Roofline(shape=find_model(NAME), gpu=GPUS["H100"])
    tokens, offsets = np.array([2048, 2048]), np.array([0, 262_144])
    attention_s = roofline.layer_s(tokens, offsets)
    full_s, _ = roofline.row_s(tokens, offsets)
    assert full_s[1] - full_s[0] == pytest.approx(np.full(2, attention_s[1] - attention_s[0]))
    assert roofline.decode_s(8, 8 * 65_536) > roofline.decode_s(8, 8 * 1024)
    assert roofline.decode_s(9, 0) > roofline.decode_s(8, 0)


def test_ranks_share_states_by_groups_and_stages_are_refused():
    shape = find_model(NAME)
    own = rank_problem(problem_of(shape), shape, RankLayout(tensor_parallel_size=2))
    assert own.load_bytes_KB[-1, 5] == 2048 * 1024 // 2 + 8 * STATE_BYTES // 2
    with pytest.raises(ConfigError, match="8 groups of heads of the recurrent layers"):
        RankLayout(tensor_parallel_size=16).kv_parts(replace(shape, num_q_heads=32))
    with pytest.raises(ConfigError, match="would begin within its rows, which differ in length"):
        split_rows(shape, 2)
