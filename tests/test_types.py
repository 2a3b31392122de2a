"""Values that cross module lines."""

from dataclasses import replace

import pytest

from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape

SHAPE = ModelShape(
    name="m", num_layers=5, hidden_size=64, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=64,
    vocab_size=100,
)  # fmt: skip


def test_layers_may_keep_different_bytes_of_a_token():
    shape = replace(SHAPE, kv_token_bytes=(512, 512, 1024, 512, 64))
    assert shape.kv_bytes_per_token_L == (512, 512, 1024, 512, 64)
    assert shape.kv_bytes_per_token == 2624
    assert shape.kv_bytes_per_token_B(2) == (1024, 1536, 64)
    with pytest.raises(ConfigError, match="keep 64 to 1024 bytes of a token"):
        _ = shape.kv_bytes_per_token_layer


@pytest.mark.parametrize(("token_bytes", "expected"), [(None, 128), (576, 576)])
def test_or_all_the_same(token_bytes, expected):
    shape = replace(SHAPE, kv_token_bytes=token_bytes)
    assert shape.kv_bytes_per_token_L == (expected,) * 5
    assert shape.kv_bytes_per_token == 5 * expected
    assert shape.kv_bytes_per_token_B(3) == (3 * expected, 2 * expected)


@pytest.mark.parametrize(
    ("token_bytes", "reason"),
    [((512,) * 4, "has 4 values for 5 layers"), ((512,) * 4 + (0,), "is 0"), (0, "is 0"), ((512,) * 4 + (0.5,), "0.5")],
)
def test_bytes_that_no_layers_have(token_bytes, reason):
    with pytest.raises(ConfigError, match=reason):
        replace(SHAPE, kv_token_bytes=token_bytes)
