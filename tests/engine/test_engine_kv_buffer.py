"""The KV buffer: poison, views, payloads."""

import pytest
import torch

from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.kv_buffer import ChunkCache, KeysAndValuesWritten, KVBuffer
from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape
from cacheflow.plan.grid import Cell, Grid

pytestmark = pytest.mark.torch


def shape(dtype="bfloat16", num_layers=3):
    return ModelShape(
        name="t", num_layers=num_layers, hidden_size=8, num_q_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=8,
        vocab_size=10, dtype=dtype,
    )  # fmt: skip


def filled(dtype):
    kv = KVBuffer(shape(), capacity=12, dtype=dtype, device="cpu")
    assert kv.kv_L2THD.isnan().all()
    kv.kv_L2THD.copy_(torch.randn(3, 2, 12, 2, 4))
    return kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_payload_is_the_cell_in_c_order(dtype):
    kv = filled(dtype)
    cell = (1, 3, 4, 9)
    payload = kv.cell(*cell).contiguous().view(torch.uint8).numpy().reshape(-1).copy()
    expected = kv.kv_L2THD.clone()
    kv.cell(*cell).zero_()
    kv.write_payload(torch.from_numpy(payload), cell)
    assert torch.equal(kv.kv_L2THD, expected)


def test_poison_reaches_every_slot():
    kv = filled(torch.bfloat16)
    kv.poison()
    assert kv.kv_L2THD.isnan().all()


def test_update_writes_its_tokens_and_shows_all_before():
    kv = filled(torch.float32)
    before = kv.kv_L2THD.clone()
    key, value = torch.randn(2, 1, 2, 3, 4)
    keys, values = ChunkCache(kv, 5, 8).update(key, value, 1)
    assert keys.shape == values.shape == (1, 2, 8, 4)
    assert torch.equal(keys[:, :, 5:], key)
    assert torch.equal(values[:, :, 5:], value)
    before[1, :, 5:8] = kv.kv_L2THD[1, :, 5:8]
    assert torch.equal(kv.kv_L2THD, before)


def test_the_stop_layer_is_left_after_the_write():
    kv = filled(torch.float32)
    cache = ChunkCache(kv, 0, 3)
    cache.stop_layer = 2
    key, value = torch.randn(2, 1, 2, 3, 4)
    cache.update(key, value, 1)
    with pytest.raises(KeysAndValuesWritten):
        cache.update(key, value, 2)
    assert torch.equal(kv.kv_L2THD[2, 1, :3], value[0].transpose(0, 1))


def test_sizes_are_checked():
    for arguments in ({"capacity": 0, "dtype": torch.float32}, {"capacity": 4, "dtype": torch.int8}):
        with pytest.raises(ConfigError, match="KV buffer"):
            KVBuffer(shape(), device="cpu", **arguments)


def test_geometry_covers_layers_and_tokens():
    grid = Grid(chunk_ends=(4, 7), num_blocks=2)
    geometry = CellGeometry(grid=grid, shape=shape(), layers_per_block=2)
    assert geometry.extent(Cell(1, 1)) == (2, 3, 4, 7)
    assert geometry.extent(Cell(0, 0)) == (0, 2, 0, 4)
    assert geometry.num_bytes(Cell(1, 1)) == 1 * 2 * 3 * 2 * 4 * 2
    assert geometry.max_cell_bytes == 2 * 2 * 4 * 2 * 4 * 2
    with pytest.raises(ConfigError, match="make 3"):
        CellGeometry(grid=grid, shape=shape(), layers_per_block=1)
    with pytest.raises(ConfigError, match="layers_per_block is 0"):
        CellGeometry(grid=grid, shape=shape(), layers_per_block=0)
