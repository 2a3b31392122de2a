"""Lossy: keys and values in 8 bits each, every channel on a scale of its own over the tokens of the chunk.

A channel is what is left of a number's place without the tokens: layer, key or value, head, dimension. Keys have
channels that are ten times as large as the others, and stay so from token to token.

What is decoded and encoded again comes out the same in the half-precision dtypes: what was restored and is saved once
more does not drift.

Shapes: a payload is viewed as ``[A, B, C, T, D]``, tokens along ``B`` and ``T``, channels along the others; axes that
it does not have are 1. Scales are ``[A, C, D]`` of float32. They stand before the codes, which are in the payload's
order.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import groupby
from typing import ClassVar

import numpy as np

from cacheflow.stores.codec import Codec, TensorForm
from cacheflow.stores.floats import ITEM_BYTES, Floats, numbers_of, round_into, to_float32
from cacheflow.types import Bytes

_SLAB_ITEMS = 1 << 16
"""Numbers at a time, so that what is made of them stays in the cache of a core."""
_LEAST_SCALE = 2.0**-100
"""Below it a scale in float32 loses bits of its own."""
_FP8_MAX = 448.0
_HALF_OF_FP8 = 2.0**-8
"""A float16 of the same bits as an e4m3 (but for seven zeros more) is this part of it."""


class ChannelCodec(Codec):
    """A code of 8 bits for each number, and ``num_scales`` numbers for each channel."""

    lossy = True
    num_scales: ClassVar[int]

    @abstractmethod
    def scales(self, low_ACD: Floats, high_ACD: Floats) -> list[Floats]:
        """The scales of channels, given their least and largest numbers; anything not finite gives it up."""

    @abstractmethod
    def to_codes(self, values: Floats, scales: list[Floats], codes: Bytes) -> None:
        """Encode finite numbers ``[B, C, T, D]``, in place of which anything may be left, on scales ``[C, 1, D]``."""

    @abstractmethod
    def to_values(self, codes: Bytes, scales: list[Floats], values: Floats) -> None:
        """Decode, as ``to_codes`` encodes."""

    def encode(self, payload: Bytes, form: TensorForm) -> list[Bytes] | None:
        """See ``Codec.encode``; None too for a payload with a number that is not finite."""
        dims = _dims(form)
        if dims is None or payload.nbytes != form.num_bytes:
            return None
        numbers = numbers_of(payload, form.dtype).reshape(dims)
        a, _, c, _, d = dims
        low, high = np.full((a, c, d), np.inf, np.float32), np.full((a, c, d), -np.inf, np.float32)
        with np.errstate(all="ignore"):
            for at in _slabs(dims):
                values = to_float32(numbers[at], form.dtype)
                np.minimum(low[at[0]], values.min(axis=(0, 2)), out=low[at[0]])  # NaN stays
                np.maximum(high[at[0]], values.max(axis=(0, 2)), out=high[at[0]])
            scales = self.scales(low, high)
            if not all(np.isfinite(each).all() for each in (low, high, *scales)) or _loses_bits(scales[-1], low, high):
                return None
            codes = np.empty(dims, np.uint8)
            for at in _slabs(dims):
                self.to_codes(to_float32(numbers[at], form.dtype), _of_row(scales, at[0]), codes[at])
        return [*(each.reshape(-1).view(np.uint8) for each in scales), codes.reshape(-1)]

    def decode(self, encoded: Bytes, form: TensorForm, out: Bytes) -> None:
        """See ``Codec.decode``."""
        dims = _dims(form)
        if dims is None or form.num_bytes != out.nbytes:
            raise ValueError(f"{self.name} of {form}, in a payload of {out.nbytes} bytes")
        a, b, c, t, d = dims
        num_codes, scale_bytes = a * b * c * t * d, a * c * d * 4
        if encoded.nbytes != num_codes + self.num_scales * scale_bytes:
            raise ValueError(f"{encoded.nbytes} bytes, {num_codes} codes and {self.num_scales} x {a * c * d} scales")
        scales = [
            encoded[number * scale_bytes : (number + 1) * scale_bytes].copy().view(np.float32).reshape(a, c, d)
            for number in range(self.num_scales)
        ]
        if not all(np.isfinite(each).all() for each in scales):
            raise ValueError("a scale is not finite")
        codes, numbers = encoded[-num_codes:].reshape(dims), numbers_of(out, form.dtype).reshape(dims)
        with np.errstate(all="ignore"):
            for at in _slabs(dims):
                values = np.empty(codes[at].shape, np.float32)
                self.to_values(codes[at], _of_row(scales, at[0]), values)
                round_into(numbers[at], values, form.dtype)


class Int8Codec(ChannelCodec):
    """255 even steps from a channel's least number to its largest.

    Off by at most half a step, and by what rounding to the dtype adds.
    """

    name, number, num_scales = "int8", 2, 2

    def scales(self, low_ACD: Floats, high_ACD: Floats) -> list[Floats]:
        """See ``ChannelCodec.scales``: the least number, and the step."""
        return [low_ACD, (high_ACD - low_ACD) / np.float32(255.0)]

    def to_codes(self, values: Floats, scales: list[Floats], codes: Bytes) -> None:
        """See ``ChannelCodec.to_codes``."""
        low, step = scales
        np.subtract(values, low, out=values)
        np.multiply(values, 1 / np.where(step == 0, np.float32(1.0), step), out=values)
        np.add(values, np.float32(0.5), out=values)
        np.copyto(codes, values, casting="unsafe")  # the whole part

    def to_values(self, codes: Bytes, scales: list[Floats], values: Floats) -> None:
        """See ``ChannelCodec.to_values``."""
        low, step = scales
        np.multiply(codes, step, out=values)
        np.add(values, low, out=values)


class Fp8Codec(ChannelCodec):
    """Floats of 8 bits (e4m3, 3 of them for the fraction), scaled so that a channel's largest number is theirs: 448.

    Off by at most a sixteenth of the number, and by 2^-10 of a 448th of the channel's largest.
    """

    name, number, num_scales = "fp8", 3, 1

    def scales(self, low_ACD: Floats, high_ACD: Floats) -> list[Floats]:
        """See ``ChannelCodec.scales``: the largest absolute number over 448."""
        return [np.divide(np.maximum(-low_ACD, high_ACD), _FP8_MAX, dtype=np.float32)]

    def to_codes(self, values: Floats, scales: list[Floats], codes: Bytes) -> None:
        """See ``ChannelCodec.to_codes``: a float16 with its fraction rounded to three bits, halves up."""
        (scale,) = scales
        np.multiply(values, np.float32(_HALF_OF_FP8) / np.where(scale == 0, np.float32(1.0), scale), out=values)
        bits = values.astype(np.float16).view(np.uint16)
        signs = (bits >> 8) & np.uint16(0x80)
        bits &= np.uint16(0x7FFF)
        bits += np.uint16(0x40)
        bits >>= np.uint16(7)
        bits |= signs
        np.copyto(codes, bits, casting="unsafe")

    def to_values(self, codes: Bytes, scales: list[Floats], values: Floats) -> None:
        """See ``ChannelCodec.to_values``."""
        (scale,) = scales
        bits = codes.astype(np.uint16)
        signs = (bits & np.uint16(0x80)) << np.uint16(8)
        bits &= np.uint16(0x7F)
        bits <<= np.uint16(7)
        bits |= signs
        np.multiply(bits.view(np.float16), scale / np.float32(_HALF_OF_FP8), out=values)


def _dims(form: TensorForm) -> tuple[int, int, int, int, int] | None:
    """The five dimensions of keys and values; None for what is none, or lies in more than two runs of tokens."""
    if form.dtype not in ITEM_BYTES or not form.token_axes or 0 in form.shape:
        return None
    dims: list[int] = []
    for is_token, axes in groupby(range(len(form.shape)), key=lambda axis: axis in form.token_axes):
        if is_token != bool(len(dims) % 2):
            dims.append(1)
        dims.append(math.prod(form.shape[axis] for axis in axes))
    if len(dims) > 5:
        return None
    if len(dims) in (2, 3):  # one run of tokens is the inner one
        dims[:1] = [dims[0], 1, 1]
    a, b, c, t, d = (*dims, *(1,) * (5 - len(dims)))
    return a, b, c, t, d


def _slabs(dims: tuple[int, int, int, int, int]) -> Iterator[tuple[int, slice, slice, slice]]:
    """Parts of a few numbers that together are all: of a row of ``A`` some of ``B``, or of one of those some ``T``."""
    a, b, c, t, d = dims
    blocks, tokens = max(1, _SLAB_ITEMS // (c * t * d)), max(1, _SLAB_ITEMS // (c * d))
    every = slice(None)
    for row in range(a):
        for block in range(0, b, blocks):
            of_blocks = slice(block, block + blocks)
            if blocks > 1 or tokens >= t:
                yield row, of_blocks, every, every
            else:
                for token in range(0, t, tokens):
                    yield row, of_blocks, every, slice(token, token + tokens)


def _of_row(scales: list[Floats], row: int) -> list[Floats]:
    """Scales ``[C, 1, D]`` of one row."""
    return [each[row][:, None, :] for each in scales]


def _loses_bits(scale: Floats, low: Floats, high: Floats) -> bool:
    """Whether the scale of a channel is too small for a float32."""
    return bool((np.where(scale == 0, low != high, scale < _LEAST_SCALE)).any())
