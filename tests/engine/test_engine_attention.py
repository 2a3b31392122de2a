"""The chunk attention against a plain masked softmax."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cacheflow.engine.attention import chunk_attention
from cacheflow.engine.cuda_attention import AttentionKernel, default_kernel, flash3, masked
from cacheflow.engine.random_models import tiny_model
from cacheflow.errors import ConfigError, UnsupportedModelError

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


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("n", "num_keys"), [(1, 1), (1, 50), (9, 9), (33, 100)])
def test_the_written_out_mask_of_cuda_computes_the_same(n, num_keys, heads, window):
    query, key, value = draw(n, num_keys, heads=heads)
    with torch.inference_mode():
        out = masked(query, key, value, 0.3, window).transpose(1, 2)
    torch.testing.assert_close(out.double(), reference(query, key, value, 0.3, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "kernel"),
    [
        ("cpu", torch.bfloat16, 64, AttentionKernel.MERGED),
        ("cuda", torch.bfloat16, 64, AttentionKernel.FLASH2),
        ("cuda", torch.float16, 256, AttentionKernel.FLASH2),
        ("cuda", torch.float32, 64, AttentionKernel.MASKED),
        ("cuda", torch.bfloat16, 60, AttentionKernel.MASKED),
        ("cuda", torch.bfloat16, 264, AttentionKernel.MASKED),
    ],
)
def test_one_kernel_serves_every_shape_of_a_model(device, dtype, head_dim, kernel):
    assert default_kernel(device, dtype, head_dim) is kernel


class Ops(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize(
    ("n", "num_keys", "window", "operator"),
    [
        (1, 700, None, "_scaled_dot_product_flash_attention"),
        (64, 64, None, "_scaled_dot_product_flash_attention"),
        (64, 700, None, "_scaled_dot_product_flash_attention"),
        (64, 700, 1000, "_scaled_dot_product_flash_attention"),
        (1, 700, 24, "_flash_attention_forward"),
        (64, 700, 24, "_flash_attention_forward"),
    ],
)
def test_half_precision_off_the_cpu_asks_for_flash_whatever_the_shape(n, num_keys, window, operator, heads):
    """Without values (device "meta"): which operator is asked, on tensors in place, and the shape that comes back."""
    query = torch.empty(1, heads[0], n, 64, device="meta", dtype=torch.bfloat16)
    key, value = torch.empty(2, 1, heads[1], num_keys, 64, device="meta", dtype=torch.bfloat16)
    with Ops() as ops:
        out, _ = chunk_attention(None, query, key, value, None, sliding_window=window)
    assert out.shape == (1, n, heads[0], 64)
    assert out.is_contiguous()
    assert operator in ops.names
    assert not {"repeat_interleave", "expand", "bitwise_and", "where"} & set(
        ops.names
    )  # no head is copied, no mask made


def documented_flash3(q, k, v, *, softmax_scale, causal, window_size):
    """What the package documents: ``[1, tokens, heads, D]``, causality and windows counted from the last key."""
    left, right = window_size
    query, key, value = (each.transpose(1, 2) for each in (q, k, v))
    query_at = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
    key_at = torch.arange(key.shape[2])[None]
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    seen &= (key_at <= query_at + right) if right >= 0 else seen
    seen &= (key_at >= query_at - left) if left >= 0 else seen
    seen &= (key_at <= query_at) if causal else seen
    group = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(group, 1) for each in (key, value))
    scores = softmax_scale * query.double() @ key.transpose(2, 3)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("n", "num_keys"), [(1, 50), (9, 9), (33, 100)])
def test_flash3_is_asked_for_the_same(monkeypatch, n, num_keys, window):
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(flash_attn_func=documented_flash3))
    query, key, value = draw(n, num_keys)
    out = flash3(query, key, value, 0.3, window).transpose(1, 2)
    torch.testing.assert_close(out.double(), reference(query, key, value, 0.3, window), rtol=1e-5, atol=1e-5)


def test_flash3_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match="attention flash3 is of CUDA devices in half precision"):
        tiny_model("llama", flash3=True)


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
