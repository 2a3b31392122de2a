"""Codecs alone: lossless is bit for bit, lossy is within its bound, and no bytes at all make one write elsewhere."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cacheflow.stores.codec import TensorForm
from cacheflow.stores.floats import ITEM_BYTES
from support.examples import examples
from support.kv_like import CODEC, bytes_of, codec_of, form_of, values_like_kv, values_of

DTYPES = tuple(ITEM_BYTES)
LOSSY = ("fp8", "int8")
MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}


def encoded(codec, payload, form):
    parts = codec.encode(payload, form)
    return None if parts is None else np.concatenate(parts)


def decoded(codec, data, form, num_bytes):
    out = np.full(num_bytes + 64, 0x5A, np.uint8)
    codec.decode(data, form, out[32:-32])
    assert (out[:32] == 0x5A).all()
    assert (out[-32:] == 0x5A).all()
    return out[32:-32]


def rounded(values, dtype):
    return values_of(bytes_of(values, dtype), dtype, values.shape)


def bound(codec, values, token_axes, dtype):
    """By how much a decoded number may be off: the codec's share, and half a place of the dtype."""
    if codec.name == "int8":
        span = values.max(axis=token_axes, keepdims=True) - values.min(axis=token_axes, keepdims=True)
        own = np.broadcast_to(span / 510, values.shape)
    else:
        largest = np.abs(values).max(axis=token_axes, keepdims=True)
        own = np.maximum(np.abs(values) / 16, largest / 448 * 2.0**-10)
    return own * 1.001 + (np.abs(values) + own) * 2.0 ** -(1 + MANTISSA_BITS[dtype]) * 1.001


@st.composite
def forms(draw):
    """A shape of up to five axes, some of them of tokens, in one run or two."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    axes = draw(st.sets(st.sampled_from(range(len(shape))), min_size=1, max_size=2))
    return tuple(shape), tuple(sorted(axes)), draw(st.sampled_from(DTYPES))


@settings(max_examples=examples(60))
@given(form=forms(), seed=st.integers(0, 1 << 16), scale=st.sampled_from([1e-3, 1.0, 100.0]))
@example(form=((2, 2, 700, 3, 64), (2,), "bfloat16"), seed=1, scale=1.0)
@example(form=((1, 40, 2, 16, 128), (1, 3), "float16"), seed=1, scale=1.0)
@example(form=((1, 3, 1, 90_000, 2), (1, 3), "float32"), seed=1, scale=1.0)
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_keep_their_bound(name, form, seed, scale):
    shape, axes, dtype = form
    codec, form = CODEC[name], TensorForm(shape, dtype, axes)
    values = rounded(scale * values_like_kv(shape, axes, seed=seed), dtype)
    payload = bytes_of(values, dtype)
    data = encoded(codec, payload, form)
    out = decoded(codec, data, form, payload.nbytes)
    assert (np.abs(values_of(out, dtype, shape) - values) <= bound(codec, values, axes, dtype)).all()
    again = decoded(codec, encoded(codec, out, form), form, payload.nbytes)
    if dtype != "float32":  # what was restored and is saved once more stays as it is
        assert np.array_equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSY)
def test_what_a_lossy_codec_stores_is_half_or_a_quarter(name, dtype):
    payload, form = bytes_of(values_like_kv((1, 2, 512, 4, 64)), dtype), form_of(dtype, (1, 2, 512, 4, 64))
    share = encoded(CODEC[name], payload, form).nbytes / payload.nbytes
    assert share < 1.02 / ITEM_BYTES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 0.0009765625, 30000.0])
@pytest.mark.parametrize("name", LOSSY)
def test_constant_channels_come_back_equal(name, value, dtype):
    shape = (1, 2, 20, 1, 8)
    values = rounded(np.full(shape, value, np.float32), dtype)
    payload, form = bytes_of(values, dtype), form_of(dtype, shape)
    out = decoded(CODEC[name], encoded(CODEC[name], payload, form), form, payload.nbytes)
    assert np.allclose(values_of(out, dtype, shape), values, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", LOSSY)
def test_numbers_that_are_none_are_not_encoded(name, bad, dtype):
    values = values_like_kv()
    payload = bytes_of(values, dtype)
    assert CODEC[name].encode(payload, form_of(dtype)) is not None
    at = values.size // 3
    bits = {"float32": np.float32, "float16": np.float16}.get(dtype)
    if bits is not None:
        payload.view(bits)[at] = bad
    else:
        payload.view(np.uint16)[at] = np.array([bad], np.float32).view(np.uint32)[0] >> 16
    assert CODEC[name].encode(payload, form_of(dtype)) is None


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("tiny", [1e-38, 1e-44])
def test_numbers_too_small_for_a_scale_are_not_encoded(name, tiny):
    values = values_like_kv()
    values[0, 0, :, 0, 3] = tiny * np.arange(values.shape[2])
    assert CODEC[name].encode(bytes_of(values, "float32"), form_of("float32")) is None


def test_a_span_too_large_for_a_float_is_not_encoded():
    values = values_like_kv()
    values[0, 0, 0, 0, 3], values[0, 0, 1, 0, 3] = 3e38, -3e38
    assert CODEC["int8"].encode(bytes_of(values, "float32"), form_of("float32")) is None


@pytest.mark.parametrize(
    "form",
    [
        form_of("uint8", (6144,)),
        form_of("float64"),
        form_of(token_axes=()),
        form_of(shape=(2, 2, 47, 2, 16)),
        form_of(shape=(2, 2, 2, 24, 2, 2, 8), token_axes=(1, 3, 5)),
        form_of(shape=(2, 0, 48, 2, 16)),
    ],
)
@pytest.mark.parametrize("name", LOSSY)
def test_what_is_no_keys_and_values_is_not_encoded(name, form):
    payload = bytes_of(values_like_kv(), "bfloat16")
    assert CODEC[name].encode(payload, form) is None
    with pytest.raises(ValueError, match="bytes"):
        CODEC[name].decode(payload[: payload.nbytes // 2], form, np.zeros(payload.nbytes, np.uint8))


def test_fp8_is_the_float8_of_torch():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(3)
    values = np.concatenate([generator.uniform(-448, 448, 4000), generator.normal(0, 1e-2, 4000), [448.0, -448.0]])
    values = np.concatenate([values, 448.0 * 2.0 ** -np.arange(24)]).astype(np.float32)
    shape = (1, values.size)
    payload, form = values.view(np.uint8), TensorForm(shape, "float32", (1,))
    scale, codes = CODEC["fp8"].encode(payload, form)
    assert scale.view(np.float32)[0] == 1.0
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn)
    out = decoded(CODEC["fp8"], np.concatenate([scale, codes]), form, payload.nbytes).view(np.float32)
    exact = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(out, exact)
    # Halves go up here and to even there, and a float16 stands between: the neighbour at most, and as near.
    theirs = expected.float().numpy()
    assert (np.abs(out - values) <= np.abs(theirs - values) * (1 + 2**-6) + 1e-9).all()
    assert np.mean(out == theirs) > 0.99


@settings(max_examples=examples(60))
@given(
    data=st.binary(min_size=1, max_size=5000),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([*DTYPES, "uint8"]),
)
def test_zstd_brings_back_every_bit(data, shape, dtype):
    codec, payload = codec_of("zstd"), np.frombuffer(data, np.uint8)
    form = TensorForm(tuple(shape), dtype)
    assert decoded(codec, encoded(codec, payload, form), form, len(data)).tobytes() == data


@pytest.mark.parametrize("dtype", DTYPES)
def test_zstd_makes_keys_and_values_shorter(dtype):
    payload = bytes_of(values_like_kv((1, 2, 512, 4, 64)), dtype)
    codec, form = codec_of("zstd"), form_of(dtype, (1, 2, 512, 4, 64))
    data = encoded(codec, payload, form)
    assert data.nbytes < 0.95 * payload.nbytes
    assert np.array_equal(decoded(codec, data, form, payload.nbytes), payload)


@settings(max_examples=examples(300))
@given(data=st.binary(max_size=4000), form=forms(), num_bytes=st.integers(1, 3000), name=st.sampled_from(sorted(CODEC)))
def test_any_bytes_at_all_are_refused_or_fill_the_buffer_alone(data, form, num_bytes, name):
    shape, axes, dtype = form
    codec, form = codec_of(name), TensorForm(shape, dtype, axes)
    for size in (num_bytes, form.num_bytes):
        try:
            decoded(codec, np.frombuffer(data, np.uint8), form, size)
        except ValueError:
            continue


@settings(max_examples=examples(200))
@given(
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4),
    name=st.sampled_from(sorted(CODEC)),
)
def test_a_changed_encoding_is_refused_or_fills_the_buffer_alone(flips, name):
    payload, form, codec = bytes_of(values_like_kv(), "bfloat16"), form_of(), codec_of(name)
    data = encoded(codec, payload, form)
    for at, change in flips:
        data[at % data.nbytes] ^= change
    try:
        decoded(codec, data, form, payload.nbytes)
    except ValueError:
        return


def test_a_frame_that_announces_more_than_the_payload_is_not_unpacked():
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    data = np.frombuffer(b"\1" + bomb, np.uint8)
    with pytest.raises(ValueError, match="a frame of 1073741824 bytes in a payload of 100"):
        codec_of("zstd").decode(data, form_of(), np.zeros(100, np.uint8))
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    with pytest.raises(ValueError, match="a frame of -1 bytes"):
        codec_of("zstd").decode(np.frombuffer(b"\1" + nameless, np.uint8), form_of(), np.zeros(100, np.uint8))
