"""Hybrid models: what their configurations say, what they keep, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.hybrid_shape import HybridShape
from cacheflow.model_shape import ModelShape
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import BoundarySource, LinkCost
from cacheflow.plan.stages import RankLayout, rank_problem, stage_problems
from cacheflow.shapes.hardware import GPUS, find_model
from cacheflow.shapes.hf_config import shape_of
from cacheflow.shapes.roofline import Roofline, problem_from_roofline
from cacheflow.sim.costs import roofline_costs

ROWS = ["linear_attention"] * 3 + ["full_attention"]
QWEN3_5_MOE = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {
        "model_type": "qwen3_5_moe_text", "attn_output_gate": True, "dtype": "bfloat16", "head_dim": 256,
        "full_attention_interval": 4, "hidden_size": 2048, "layer_types": ROWS * 10, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "moe_intermediate_size": 512,
        "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40,
        "num_key_value_heads": 2, "shared_expert_intermediate_size": 512, "vocab_size": 248320,
    },
}  # fmt: skip
TEXT = QWEN3_5_MOE["text_config"]
QWEN3_NEXT = {
    "model_type": "qwen3_next", "decoder_sparse_step": 1, "head_dim": 256, "hidden_size": 2048,
    "intermediate_size": 5632, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_value_head_dim": 128, "mlp_only_layers": [], "moe_intermediate_size": 512,
    "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "shared_expert_intermediate_size": 512, "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "state_dtype", "kv_bytes", "state_bytes", "checkpoint_mb", "as_tokens"),
    [
        ("Qwen3.6-35B-A3B", "float32", 20_480, 2_146_304, 64.4, 3144),
        ("Qwen3.6-35B-A3B", "bfloat16", 20_480, 1_097_728, 32.9, 1608),
        ("Qwen3.6-27B", "float32", 65_536, 3_207_168, 153.9, 2349),
        ("Qwen3-Next-80B-A3B", "float32", 24_576, 2_146_304, 77.3, 3144),
    ],
)
def test_what_a_hybrid_keeps(name, state_dtype, kv_bytes, state_bytes, checkpoint_mb, as_tokens):
    shape = replace(find_model(name), state_dtype=state_dtype)
    assert isinstance(shape, HybridShape)
    assert (shape.kv_bytes_per_token, shape.state_bytes) == (kv_bytes, state_bytes)
    assert round(shape.checkpoint_bytes / 1e6, 1) == checkpoint_mb
    assert round(shape.checkpoint_bytes / shape.kv_bytes_per_token) == as_tokens


@pytest.mark.parametrize(
    ("name", "num_tokens", "kv_mb", "share"),
    [
        ("Qwen3.6-35B-A3B", 4096, 84, 0.77),
        ("Qwen3.6-35B-A3B", 32_768, 671, 0.10),
        ("Qwen3.6-27B", 4096, 268, 0.57),
        ("Qwen3.6-27B", 32_768, 2147, 0.07),
        ("Qwen3-Next-80B-A3B", 4096, 101, 0.77),
        ("Qwen3-Next-80B-A3B", 32_768, 805, 0.10),
    ],
)
def test_the_checkpoint_is_much_of_a_short_prefix_and_little_of_a_long_one(name, num_tokens, kv_mb, share):
    shape = find_model(name)
    kv_bytes = num_tokens * shape.kv_bytes_per_token
    assert round(kv_bytes / 1e6) == kv_mb
    assert shape.checkpoint_bytes / kv_bytes == pytest.approx(share, abs=0.006)


def test_rows_come_from_the_configuration():
    found = shape_of(QWEN3_5_MOE, name="Qwen3.6-35B-A3B")
    assert found == find_model("Qwen3.6-35B-A3B")
    assert (found.row_layers, found.num_rows) == (4, 10)
    assert [found.is_recurrent(layer) for layer in range(8)] == [True, True, True, False] * 2
    assert found.kv_bytes_per_token_L[:4] == (0, 0, 0, 2048)
    other = ["linear_attention", "full_attention"] * 20
    assert shape_of({**TEXT, "layer_types": other}, name="x").row_layers == 2
    assert shape_of({**TEXT, "layer_types": None, "full_attention_interval": 5}, name="x").row_layers == 5
    assert shape_of(QWEN3_NEXT, name="Qwen3-Next-80B-A3B") == find_model("Qwen3-Next-80B-A3B")
    assert shape_of({**TEXT, "mamba_ssm_dtype": "bfloat16"}, name="x").state_bytes == 1_097_728


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ROWS * 9 + ROWS[::-1]}, "are not rows of linear_attention layers of one length"),
        ({"layer_types": ROWS * 9}, "36 layers for 40"),
        ({"layer_types": [*ROWS[1:], *(ROWS * 10)[:37]]}, "are not rows"),
        ({"layer_types": ["mamba", "full_attention"] * 20}, "a recurrent state in some layers"),
        ({"layer_types": ["full_attention"] * 40}, "are not rows"),
        ({"layer_types": None, "num_hidden_layers": 38}, "38 layers are not whole rows of 4"),
        ({"linear_num_key_heads": None}, "lacks linear_num_key_heads"),
        ({"linear_num_value_heads": 24}, "no multiple of num_state_k_heads"),
        ({"mamba_ssm_dtype": "float8"}, "mamba_ssm_dtype is 'float8'"),
        ({"n_shared_experts": 1}, "experts that every token visits"),
    ],
    ids=str,
)
def test_what_no_row_can_say_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        shape_of({**TEXT, **changes}, name="x")


def test_blocks_are_whole_rows():
    shape = find_model("Qwen3.6-27B")
    assert (shape.layers_of_block(), shape.layers_of_block(8)) == (4, 8)
    assert shape.state_bytes_B(8) == (6 * 3_207_168,) * 8
    assert shape.kv_bytes_per_token_B(8) == (2 * 4096,) * 8
    with pytest.raises(ConfigError, match="blocks of 6 layers, must be a multiple of 4"):
        shape.layers_of_block(6)
    dense = find_model("Qwen3-8B")
    assert (dense.layers_of_block(), dense.layers_of_block(3), dense.num_rows, dense.checkpoint_bytes) == (1, 3, 36, 0)
    assert dense.state_bytes_B(5) == (0,) * 8


def problem_of(name: str, *, num_tokens: int = 8192, suffix_tokens: int = 0, gbps: float = 10.0):
    shape = find_model(name)
    grid = Grid.regular(
        num_tokens=num_tokens, chunk_tokens=1024, num_blocks=shape.num_rows, suffix_tokens=suffix_tokens
    )
    roofline = Roofline(shape=shape, gpu=GPUS["H100"])
    return shape, problem_from_roofline(roofline, grid, link=LinkCost(bytes_per_s=gbps * 1e9 / 8))


def test_the_checkpoint_comes_with_the_last_chunk():
    shape, problem = problem_of("Qwen3.6-27B")
    token_bytes = shape.kv_bytes_per_token_layer
    assert (problem.load_bytes_KB[:-1] == 1024 * token_bytes).all()
    assert (problem.load_bytes_KB[-1] == 1024 * token_bytes + 3 * 3_207_168).all()
    assert problem.load_bytes_KB.sum() == 8192 * shape.kv_bytes_per_token + shape.checkpoint_bytes
    assert problem.recurrent_B.all()
    assert not problem_of("Qwen3-8B")[1].recurrent_B.any()
    whole = roofline_costs(Roofline(shape=shape, gpu=GPUS["H100"]), chunk_tokens=1024)
    same = whole.problem(problem.grid, link=problem.link)
    for field in ("compute_KB", "kv_only_KB", "load_bytes_KB", "recurrent_B"):
        assert (getattr(same, field) == getattr(problem, field)).all(), field


def test_recurrent_layers_cost_the_same_wherever_a_chunk_lies_and_are_run_for_keys_and_values_too():
    shape = find_model("Qwen3.6-27B")
    roofline = Roofline(shape=shape, gpu=GPUS["H100"])
    tokens, offsets = np.array([1024, 1024]), np.array([0, 262_144])
    full_s, kv_only_s = (each[:, 0] for each in roofline.row_s(tokens, offsets))
    attention_s = roofline.layer_s(tokens, offsets)
    assert full_s[1] - full_s[0] == pytest.approx(attention_s[1] - attention_s[0])
    assert kv_only_s[0] == kv_only_s[1]
    assert 0.6 * full_s[0] < kv_only_s[0] < full_s[0]
    # 27 billion parameters, 2 operations each: what the name says, embeddings left out.
    assert shape.weight_bytes / 2 == pytest.approx(27e9, rel=0.03)
    for name, billions in (("Qwen3.6-35B-A3B", 35), ("Qwen3-Next-80B-A3B", 80), ("Qwen3.5-9B", 9)):
        found = find_model(name).weight_bytes / 2
        assert found == pytest.approx(billions * 1e9, rel=0.06), name


def test_decoding_reads_states_instead_of_a_context():
    roofline = Roofline(shape=find_model("Qwen3.6-27B"), gpu=GPUS["H100"])
    dense = ModelShape(
        name="as if all were attention", num_layers=64, hidden_size=5120, num_q_heads=24, num_kv_heads=4, head_dim=256,
        intermediate_size=17408, vocab_size=248320,
    )  # fmt: skip
    longer = roofline.decode_s(8, 8 * 65_536) - roofline.decode_s(8, 8 * 1024)
    all_longer = Roofline(shape=dense, gpu=GPUS["H100"]).decode_s(8, 8 * 65_536) - Roofline(
        shape=dense, gpu=GPUS["H100"]
    ).decode_s(8, 8 * 1024)
    assert longer == pytest.approx(all_longer / 4, rel=0.05)
    assert roofline.decode_s(9, 0) > roofline.decode_s(8, 0)


def test_ranks_share_states_by_heads_and_stages_begin_with_a_row():
    shape, problem = problem_of("Qwen3.6-35B-A3B")
    own = rank_problem(problem, shape, RankLayout(tensor_parallel_size=8))
    # Two key/value heads for eight ranks are copied; 32 states are not.
    assert own.load_bytes_KB[0, 0] == 1024 * 2048 // 2
    assert own.load_bytes_KB[-1, 0] == 1024 * 2048 // 2 + 3 * 2_146_304 // 8
    stages = stage_problems(problem, shape, RankLayout(pipeline_parallel_size=2), BoundarySource.HANDED_OVER)
    assert [stage.problem.grid.num_blocks for stage in stages] == [5, 5]
    assert all(stage.problem.recurrent_B.all() for stage in stages)
    with pytest.raises(ConfigError, match=r"begin at layers 0, 10, 20, 30, within a row of 4"):
        stage_problems(problem, shape, RankLayout(pipeline_parallel_size=4), BoundarySource.HANDED_OVER)
    with pytest.raises(ConfigError, match="16 key heads of the recurrent layers"):
        RankLayout(tensor_parallel_size=32).kv_parts(replace(shape, num_q_heads=32))


def test_the_bound_of_a_hybrid_lies_under_both_pure_ways():
    _, problem = problem_of("Qwen3.5-9B", num_tokens=32_768, suffix_tokens=256)
    least = bound(problem)
    assert least.restore_s < min(problem.recompute_s, problem.load_s)
    assert least.ttft_s < min(problem.recompute_s, problem.load_s) + problem.suffix_s
