"""Lossless: zstd over the bytes of numbers, sorted by their place in the number.

Signs and exponents of keys and values repeat, fractions hardly do: side by side, as one finds them, the second spoil
the first.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheflow.stores.codec import Codec, TensorForm
from cacheflow.types import Bytes

_LEVEL = 1
_WORDS: dict[int, npt.DTypeLike] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
"""Of so many bytes."""
_SLAB_ITEMS = 1 << 15
"""Numbers at a time, so that what is made of them stays in the cache of a core."""


class ZstdCodec(Codec):
    """See the module's docstring. An encoding is one byte, the width of a number in bytes, and one frame of zstd."""

    name, number, lossy, package = "zstd", 1, False, "zstandard"

    def __init__(self) -> None:
        """Make nothing yet: the package may be missing."""
        self._of_thread = threading.local()  # zstd's contexts are one thread's

    def encode(self, payload: Bytes, form: TensorForm) -> list[Bytes]:
        """See ``Codec.encode``."""
        width = 1 if payload.nbytes % form.item_bytes else form.item_bytes
        planes = payload if width == 1 else np.empty((width, payload.nbytes // width), np.uint8)
        if width > 1:
            _sort(payload.view(_WORDS[width]), planes)
        frame: bytes = self._compressor().compress(planes.data)
        return [np.array([width], np.uint8), np.frombuffer(frame, np.uint8)]

    def decode(self, encoded: Bytes, form: TensorForm, out: Bytes) -> None:
        """See ``Codec.decode``."""
        import zstandard

        del form
        width = int(encoded[0]) if encoded.nbytes else 0
        if width not in _WORDS or out.nbytes % width:
            raise ValueError(f"numbers of {width} bytes in a payload of {out.nbytes}")
        frame = encoded[1:].data
        try:
            # The frame says how much is allocated for it.
            num_bytes = zstandard.frame_content_size(frame)
            if num_bytes != out.nbytes:
                raise ValueError(f"a frame of {num_bytes} bytes in a payload of {out.nbytes}")
            planes = np.frombuffer(self._decompressor().decompress(frame, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if planes.nbytes != out.nbytes:
            raise ValueError(f"a frame of {num_bytes} bytes held {planes.nbytes}")
        if width == 1:
            np.copyto(out, planes)
        else:
            _sort_back(planes.reshape(width, -1), out.view(_WORDS[width]))

    def _compressor(self) -> Any:  # noqa: ANN401 - an optional package
        found = getattr(self._of_thread, "compressor", None)
        if found is None:
            import zstandard

            found = self._of_thread.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        return found

    def _decompressor(self) -> Any:  # noqa: ANN401 - an optional package
        found = getattr(self._of_thread, "decompressor", None)
        if found is None:
            import zstandard

            found = self._of_thread.decompressor = zstandard.ZstdDecompressor()
        return found


def _sort(words: npt.NDArray[Any], planes: npt.NDArray[np.uint8]) -> None:
    """Bytes of numbers, by their place: the last row has the highest ones. Shifts are faster than a transposition."""
    for start in range(0, len(words), _SLAB_ITEMS):
        slab = words[start : start + _SLAB_ITEMS].copy()
        for plane in planes[:, start : start + _SLAB_ITEMS]:
            np.copyto(plane, slab, casting="unsafe")  # the lowest byte
            slab >>= 8


def _sort_back(planes: npt.NDArray[np.uint8], words: npt.NDArray[Any]) -> None:
    """The reverse."""
    for start in range(0, len(words), _SLAB_ITEMS):
        rows = planes[::-1, start : start + _SLAB_ITEMS]
        slab = rows[0].astype(words.dtype)
        for row in rows[1:]:
            slab <<= 8
            slab |= row
        words[start : start + _SLAB_ITEMS] = slab
