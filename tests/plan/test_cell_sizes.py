"""Chunks, cells and reads that suit a device."""

from dataclasses import replace

import pytest

from cacheflow.errors import ConfigError
from cacheflow.plan.cell_sizes import (
    LEAST_CELL_S,
    LEAST_OBJECT_BYTES,
    chunk_tokens_of,
    layers_of_cell,
    layers_of_object,
)
from cacheflow.shapes.hardware import find_model

LLAMA = find_model("Llama-3.1-8B")


def layers(gbps, *, device_type="cuda", chunk_tokens=1024, shape=LLAMA, asked=None):
    return layers_of_cell(
        shape, device_type=device_type, chunk_tokens=chunk_tokens, bytes_per_s=gbps * 1e9 / 8, asked=asked
    )


@pytest.mark.parametrize(("gbps", "wanted"), [(1, 1), (10, 1), (40, 1), (80, 2), (160, 4), (400, 4), (float("inf"), 4)])
def test_a_cell_keeps_the_link_busy_on_cuda(gbps, wanted):
    assert layers(gbps) == wanted
    cell_s = wanted * 1024 * LLAMA.kv_bytes_per_token_layer / (gbps * 1e9 / 8)
    assert cell_s >= LEAST_CELL_S or wanted == LLAMA.num_layers // 8


def test_the_cpu_and_whoever_asks_get_what_they_had():
    assert [layers(gbps, device_type="cpu") for gbps in (1, 80, float("inf"))] == [1, 1, 1]
    assert layers(80, asked=3) == 3
    assert layers(80, asked=5, device_type="cpu") == 5
    assert [chunk_tokens_of(kind) for kind in ("cpu", "cuda")] == [512, 1024]
    assert chunk_tokens_of("cuda", 96) == 96
    hybrid = find_model("Qwen3.6-27B")
    assert layers(80, device_type="cpu", shape=hybrid) == hybrid.row_layers
    with pytest.raises(ConfigError, match="must be a multiple of 4"):
        layers(80, device_type="cpu", shape=hybrid, asked=3)


def test_a_link_that_is_measured_anew_changes_no_keys():
    assert {layers(gbps) for gbps in (60, 70, 80)} == {2}


@pytest.mark.parametrize(("chunk_tokens", "wanted"), [(256, 4), (512, 4), (1024, 2), (2048, 1), (4096, 1)])
def test_objects_that_engines_share_have_8_mib_on_cuda(chunk_tokens, wanted):
    assert layers_of_object(LLAMA, device_type="cuda", chunk_tokens=chunk_tokens) == wanted
    object_bytes = wanted * chunk_tokens * LLAMA.kv_bytes_per_token_layer
    assert object_bytes >= LEAST_OBJECT_BYTES or wanted == LLAMA.num_layers // 8
    assert layers_of_object(LLAMA, device_type="cpu", chunk_tokens=chunk_tokens) == 1
    assert layers_of_object(LLAMA, device_type="cuda", chunk_tokens=chunk_tokens, asked=3) == 3


def test_of_layers_that_differ_the_mean_counts():
    mixed = replace(LLAMA, kv_token_bytes=(2048, 6144) * 16)
    assert layers_of_object(mixed, device_type="cuda", chunk_tokens=1024) == 2


@pytest.mark.parametrize("name", ["Qwen3.6-27B", "Qwen3.6-35B-A3B", "Qwen3-Next-80B-A3B", "Nemotron-3-Nano-30B-A3B"])
@pytest.mark.parametrize("gbps", [1, 40, 80, 400, float("inf")])
def test_cells_of_a_hybrid_are_whole_rows_on_cuda(name, gbps):
    hybrid = find_model(name)
    found = layers(gbps, shape=hybrid)
    assert hybrid.layers_of_block(found) == found, "a block that can be restored by itself"
    most = max(1, hybrid.num_layers // hybrid.row_layers // 8)
    kept = max(hybrid.kv_bytes_per_token_L)
    rows = found // hybrid.row_layers
    assert rows == most or rows * 1024 * kept / (gbps * 1e9 / 8) >= LEAST_CELL_S
