"""Tensors that look like keys and values, for the tests of codecs; and what needs zstd."""

from importlib.util import find_spec

import numpy as np

from cacheflow.stores.base import GetRequest, PutRequest
from cacheflow.stores.codec import TensorForm
from cacheflow.stores.codecs import CODECS
from cacheflow.stores.floats import numbers_of, round_into, to_float32
from support.lacking import lacking
from support.store_objects import TIMEOUT_S, key

SHAPE = (2, 2, 48, 2, 16)
"""Layers, keys and values, tokens, heads, dimensions."""
TOKEN_AXES = (2,)
CODEC = {codec.name: codec for codec in CODECS}


def codec_of(name):
    """A codec by its name; a test that needs zstd ends where that is not installed."""
    codec = CODEC[name]
    if codec.package and find_spec(codec.package) is None:
        lacking(f"needs {codec.package}: make setup")
    return codec


def values_like_kv(shape=SHAPE, token_axes=TOKEN_AXES, *, seed=0):
    """Float32, each channel with a mean and a spread of its own."""
    generator = np.random.default_rng(seed)
    of_channel = [1 if axis in token_axes else size for axis, size in enumerate(shape)]
    spread, mean = generator.lognormal(0.0, 1.0, of_channel), generator.normal(0.0, 2.0, of_channel)
    return (mean + spread * generator.standard_normal(shape)).astype(np.float32)


def bytes_of(values, dtype):
    """Values rounded to a dtype, as bytes."""
    buffer = np.empty(values.size * {"float32": 4}.get(dtype, 2), np.uint8)
    round_into(numbers_of(buffer, dtype), values.copy().reshape(-1), dtype)
    return buffer


def values_of(buffer, dtype, shape=SHAPE):
    """The reverse."""
    return to_float32(numbers_of(buffer, dtype), dtype).reshape(shape)


def kv_payload(number, *, dtype="bfloat16"):
    return bytes_of(values_like_kv(seed=number), dtype)


def form_of(dtype="bfloat16", shape=SHAPE, token_axes=TOKEN_AXES):
    return TensorForm(shape, dtype, token_axes)


def put_kv(store, number, data=None, *, dtype="bfloat16", of=None, token_axes=TOKEN_AXES, **options):
    """Outcome of one write."""
    data = kv_payload(number, dtype=dtype) if data is None else data
    request = PutRequest(of or key(number), [data], SHAPE, dtype, token_axes=token_axes, **options)
    (outcome,) = store.submit_put([request]).wait(TIMEOUT_S)
    return outcome


def get_kv(store, number, *, dtype="bfloat16", of=None):
    """Outcome and buffer of one read; the buffer lies between bytes that must stay."""
    num_bytes = kv_payload(number, dtype=dtype).nbytes
    around = np.full(num_bytes + 128, 0xA5, np.uint8)
    (outcome,) = store.submit_get([GetRequest(of or key(number), around[64:-64])]).wait(TIMEOUT_S)
    assert (around[:64] == 0xA5).all()
    assert (around[-64:] == 0xA5).all()
    return outcome, around[64:-64]
