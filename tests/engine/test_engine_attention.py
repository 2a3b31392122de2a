"""The chunk attention against a plain masked softmax."""

import pytest
import torch

from cacheflow.engine.attention import _lower_right, chunk_attention
from cacheflow.errors import UnsupportedModelError

pytestmark = pytest.mark.torch


def draw(n, num_keys, *, heads=(4, 2), head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n * 1000 + num_keys)
    query = torch.randn(1, n, heads[0], head_dim, generator=generator).transpose(1, 2)
    key, value = torch.randn(2, 1, num_keys + 5, heads[1], head_dim, generator=generator)[:, :, :num_keys].transpose(
        2, 3
    )
    return 2 * query.to(dtype), key.to(dtype), value.to(dtype)


def reference(query, key, value, scale, window=None):
    n, num_keys, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = scale * query.double() @ key.transpose(2, 3)
    query_at = torch.arange(num_keys - n, num_keys)[:, None]
    key_at = torch.arange(num_keys)[None]
    seen = key_at <= query_at
    if window is not None:
        seen &= query_at - key_at < window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 1000])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("n", "num_keys"), [(1, 1), (1, 50), (9, 9), (9, 10), (33, 100), (130, 131), (64, 700)])
def test_agrees_with_a_masked_softmax(n, num_keys, heads, window):
    query, key, value = draw(n, num_keys, heads=heads)
    out, weights = chunk_attention(None, query, key, value, None, scaling=0.3, sliding_window=window, dropout=0.0)
    assert weights is None
    assert out.shape == (1, n, heads[0], 16)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(query, key, value, 0.3, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("n", "num_keys"), [(1, 50), (9, 9), (33, 100)])
def test_the_way_taken_on_cuda_computes_the_same(n, num_keys, heads):
    query, key, value = draw(n, num_keys, heads=heads)
    with torch.inference_mode():
        out = _lower_right(query, key, value, 0.3).transpose(1, 2)
    torch.testing.assert_close(out.double(), reference(query, key, value, 0.3), rtol=1e-5, atol=1e-5)


def test_scale_defaults_to_the_head_dim():
    query, key, value = draw(5, 20)
    out, _ = chunk_attention(None, query, key, value, None)
    torch.testing.assert_close(out.double(), reference(query, key, value, 16**-0.5), rtol=1e-5, atol=1e-5)


def test_bf16_is_as_close_as_bf16_goes():
    query, key, value = draw(64, 700, dtype=torch.bfloat16)
    out, _ = chunk_attention(None, query, key, value, None, scaling=0.25)
    torch.testing.assert_close(out.double(), reference(query, key, value, 0.25), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_buffer_behind_the_view(dtype):
    query, key, value = draw(33, 100, dtype=dtype)
    view, _ = chunk_attention(None, query, key, value, None)
    for _ in range(3):
        packed, _ = chunk_attention(None, query.contiguous(), key.contiguous(), value.contiguous(), None)
        assert torch.equal(view, packed)


@pytest.mark.parametrize(
    "arguments", [{"s_aux": torch.zeros(4)}, {"softcap": 50.0}, {"dropout": 0.1}, {"position_bias": torch.zeros(1)}]
)
def test_what_it_does_not_compute_is_refused(arguments):
    query, key, value = draw(5, 20)
    with pytest.raises(UnsupportedModelError):
        chunk_attention(None, query, key, value, None, **arguments)


def test_masks_and_batches_are_refused():
    query, key, value = draw(5, 20)
    with pytest.raises(UnsupportedModelError, match="mask given"):
        chunk_attention(None, query, key, value, torch.ones(5, 20))
    with pytest.raises(UnsupportedModelError, match="batch 2"):
        chunk_attention(None, *(x.expand(2, -1, -1, -1) for x in (query, key, value)), None)


def test_arguments_without_effect_are_ignored():
    query, key, value = draw(5, 20)
    chunk_attention(None, query, key, value, None, position_ids=torch.zeros(1), use_cache=True, softcap=None)
