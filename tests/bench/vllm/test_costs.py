from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cacheflow.bench.vllm.costs import (
    PrefixSize,
    VllmCosts,
    fit_chunks,
    kv_only_share,
    least_times,
    prefix_bytes,
    sample_lengths,
)
from cacheflow.bench.vllm.counts import counts_between
from cacheflow.hybrid_shape import HybridShape
from cacheflow.model_shape import ModelShape

SHAPE = ModelShape(
    name="smol", num_layers=30, hidden_size=576, num_q_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536,
    vocab_size=49152,
)  # fmt: skip
SIZE = PrefixSize(num_tokens=4096, suffix_tokens=37, chunk_tokens=512)
HYBRID = HybridShape(
    name="hybrid", num_layers=24, hidden_size=512, num_q_heads=8, num_kv_heads=2, head_dim=64, intermediate_size=2560,
    vocab_size=4096, layers_per_attention=4, num_state_k_heads=5, num_state_v_heads=15, state_k_dim=64, state_v_dim=64,
    conv_kernel=4,
)  # fmt: skip
ENDS = SIZE.grid_ends


def _costs(**changes: Any) -> VllmCosts:
    values: dict[str, Any] = {
        "chunk_s": tuple(0.3 + 0.08 * k for k in range(8)), "suffix_s": 0.06, "full_s": 4.7, "fit_error": 0.0,
    }  # fmt: skip
    return VllmCosts(**{**values, **changes})


def test_a_fit_returns_the_costs_it_was_made_from():
    def prefill_s(n: int) -> float:
        return 5e-4 * n + 1e-7 * n * n

    lengths = sample_lengths(ENDS)
    assert lengths == [512, 1024, 2048, 4096]
    chunk_s, error = fit_chunks(ENDS, lengths, [prefill_s(n) for n in lengths])
    expected = np.diff([0.0, *(prefill_s(n) for n in ENDS)])
    assert chunk_s == pytest.approx(tuple(expected))
    assert error == pytest.approx(0.0, abs=1e-9)


def test_noise_never_makes_later_chunks_cheaper():
    chunk_s, error = fit_chunks(ENDS, [512, 2048, 4096], [0.5, 1.6, 2.9])
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(chunk_s))
    assert error > 0.0


def test_a_prefix_of_one_chunk_needs_no_fit():
    chunk_s, _ = fit_chunks((512,), [512], [0.4])
    assert chunk_s == pytest.approx((0.4,))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_the_bound_lies_below_either_pure_way_and_above_half_of_the_better(ratio: float):
    costs = _costs()
    load_s = ratio * costs.recompute_s
    least = least_times(costs, SHAPE, SIZE, bytes_per_s=prefix_bytes(SHAPE, SIZE) / load_s)
    better_s = min(load_s, costs.recompute_s)
    assert least.ttft_s < better_s + costs.suffix_s
    assert least.restore_s > 0.4 * better_s  # two resources at best halve the time
    assert least.ttft_s >= least.restore_s


def test_the_bound_follows_the_machine():
    costs = _costs()
    slow = least_times(costs, SHAPE, SIZE, bytes_per_s=1e3, drift=1.5)  # nothing is worth loading
    fast = least_times(costs, SHAPE, SIZE, bytes_per_s=1e3)
    assert slow.ttft_s == pytest.approx(1.5 * fast.ttft_s, rel=0.02)


def test_the_share_of_keys_and_values_is_that_of_the_weights():
    assert kv_only_share(SHAPE) == pytest.approx(384 / (384 + 2 * 576 + 3 * 1536))


def test_a_hybrid_loads_its_running_states_too():
    kv_bytes = 4096 * 6 * 512
    assert prefix_bytes(HYBRID, SIZE) == kv_bytes + 18 * (15 * 64 * 64 * 4 + 3 * 2 * (2 * 5 * 64 + 15 * 64))
    loaded_s = prefix_bytes(HYBRID, SIZE) / 1e9
    assert least_times(_costs(), HYBRID, SIZE, bytes_per_s=1e9).restore_s == pytest.approx(loaded_s, rel=0.02)


def test_of_a_row_its_recurrent_layers_are_computed_for_keys_and_values_too():
    alone = 256 / (256 + 2 * 512 + 3 * 2560)
    assert kv_only_share(HYBRID) == pytest.approx((3 + alone) / 4)


def test_counts_are_differences_and_sum_over_labels():
    before = {'vllm:cacheflow_tokens_total{engine="0",source="loaded"}': 100.0}
    after = {
        'vllm:cacheflow_tokens_total{engine="0",source="loaded"}': 300.0,
        'vllm:cacheflow_tokens_total{engine="0",source="recomputed"}': 50.0,
        'vllm:cacheflow_loaded_bytes_total{engine="0"}': 4e6,
        'vllm:kv_offload_load_bytes_total{engine="0"}': 1e6,
        'vllm:cacheflow_tokens_total_created{engine="0"}': 1e9,
    }
    counts = counts_between(before, after)
    assert counts.loaded_tokens == 200.0
    assert counts.recomputed_tokens == 50.0
    assert counts.wasted_tokens == 0.0
    assert counts.loaded_bytes == 5e6
