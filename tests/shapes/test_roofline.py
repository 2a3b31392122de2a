from dataclasses import replace

import numpy as np
import pytest

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid
from cacheflow.plan.problem import LinkCost
from cacheflow.shapes.roofline import Efficiency, GpuPeaks, Roofline, problem_from_roofline

LLAMA_8B = ModelShape(
    name="Llama-3.1-8B", num_layers=32, hidden_size=4096, num_q_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, vocab_size=128256,
)  # fmt: skip
A100 = GpuPeaks(
    name="A100", memory_bytes=80 * 10**9, memory_bytes_per_s=2.039e12, dense_flops_per_s=299e12, pcie_bytes_per_s=32e9
)
H100 = GpuPeaks(
    name="H100", memory_bytes=80 * 10**9, memory_bytes_per_s=3.35e12, dense_flops_per_s=956e12, pcie_bytes_per_s=64e9
)


@pytest.mark.parametrize(
    ("gpu", "gbit_per_s", "num_tokens", "recompute_s", "load_s", "bound_s"),
    [(A100, 80, 8192, 0.781, 0.162, 0.101), (H100, 10, 32768, 2.131, 3.484, 1.195)],
)
def test_the_default_efficiency_agrees_with_the_design_within_15_percent(
    gpu, gbit_per_s, num_tokens, recompute_s, load_s, bound_s
):
    grid = Grid.regular(num_tokens=num_tokens, chunk_tokens=512, num_blocks=32, suffix_tokens=512)
    link = LinkCost(bytes_per_s=gbit_per_s * 1e9 / 8)
    problem = problem_from_roofline(Roofline(shape=LLAMA_8B, gpu=gpu), grid, link=link)
    assert problem.recompute_s + problem.suffix_s == pytest.approx(recompute_s, rel=0.15)
    assert problem.load_s + problem.suffix_s == pytest.approx(load_s, rel=0.1)
    assert bound(problem).ttft_s == pytest.approx(bound_s, rel=0.15)


def test_arithmetic_is_counted_as_by_hand():
    """2 flops a weight and token; 4 * heads * head_dim a pair of query and key."""
    perfect = Efficiency(gemm=1.0, attention=1.0, memory=1.0, layer_overhead_s=0.0)
    unlimited = replace(A100, dense_flops_per_s=1.0, memory_bytes_per_s=1e30)
    roofline = Roofline(shape=LLAMA_8B, gpu=unlimited, efficiency=perfect)
    weights = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    pairs = 3 * 10 + 1 + 2 + 3
    assert roofline.layer_s(np.array([3]), np.array([10]))[0] == pytest.approx(2 * 3 * weights + 4 * 4096 * pairs)
    assert roofline.kv_only_s(np.array([3]))[0] == pytest.approx(2 * 3 * 4096 * 2048)


def test_a_window_bounds_what_a_token_sees():
    windowed = Roofline(shape=replace(LLAMA_8B, sliding_window=4), gpu=A100)
    full = Roofline(shape=LLAMA_8B, gpu=A100)
    tokens, offsets = np.array([512, 512]), np.array([0, 100_000])
    assert (windowed.layer_s(tokens, offsets) < full.layer_s(tokens, offsets)).all()
    assert windowed.layer_s(tokens, offsets)[1] == pytest.approx(windowed.layer_s(tokens, offsets)[0], rel=0.01)


def test_experts_cost_what_is_active_but_all_touched_weights_are_read():
    moe = replace(LLAMA_8B, num_experts=64, num_active_experts=2, intermediate_size=1024)
    few, many = Roofline(shape=moe, gpu=A100).layer_s(np.array([1, 64]), np.array([0, 0]))
    assert many < 64 * few
    overhead_free = Roofline(shape=moe, gpu=A100, efficiency=Efficiency(layer_overhead_s=0.0))
    assert overhead_free.layer_s(np.array([64]), np.array([0]))[0] > 64 * 3 * 4096 * 1024 * 2 * 0.8 / 2.039e12


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="31 blocks"):
        problem_from_roofline(
            Roofline(shape=LLAMA_8B, gpu=A100),
            Grid.regular(num_tokens=512, chunk_tokens=512, num_blocks=31),
            link=LinkCost(bytes_per_s=1e9),
        )
    with pytest.raises(ConfigError, match="pcie"):
        replace(A100, pcie_bytes_per_s=0.0)
    with pytest.raises(ConfigError, match="gemm"):
        Efficiency(gemm=1.5)
    with pytest.raises(ConfigError, match="layer_overhead_s"):
        Efficiency(layer_overhead_s=-1.0)
