"""The dtypes of keys and values, for numpy, which has no bfloat16.

Plain integer arithmetic instead of a package's dtype: it lets the GIL go, and the compute thread needs that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of each dtype that is known here."""

_RAW_DTYPE: dict[str, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def numbers_of(buffer: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    """Bytes as an array of the dtype, or of the bits of a bfloat16; a view."""
    return buffer.view(_RAW_DTYPE[dtype])


def to_float32(numbers: npt.NDArray[Any], dtype: str) -> Floats:
    """A copy of what ``numbers_of`` views, in float32."""
    if dtype != "bfloat16":
        return numbers.astype(np.float32)
    values: Floats = np.left_shift(numbers, np.uint32(16), dtype=np.uint32).view(np.float32)
    return values


def round_into(numbers: npt.NDArray[Any], values: Floats, dtype: str) -> None:
    """Write finite values in a dtype, bfloat16 with halves away from zero; ``values`` may change."""
    if dtype != "bfloat16":
        np.copyto(numbers, values, casting="unsafe")
        return
    bits = values.view(np.uint32)
    np.add(bits, np.uint32(0x8000), out=bits)
    np.right_shift(bits, np.uint32(16), out=bits)
    np.copyto(numbers, bits, casting="unsafe")
