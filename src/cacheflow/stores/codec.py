"""What a codec of stored payloads is.

A payload is encoded right before it is written and decoded right after it was read and verified, on the store's
threads: whoever puts and gets sees the payload as it is without a codec.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cacheflow.stores.floats import ITEM_BYTES
from cacheflow.types import Bytes


@dataclass(frozen=True, slots=True)
class TensorForm:
    """What a record says of the tensor in it.

    Attributes:
        shape: At most 8 dimensions.
        dtype: Name of its dtype, such as ``bfloat16``.
        token_axes: Axes along which tokens lie; empty where that is not known, or it is no keys and values.
    """

    shape: tuple[int, ...]
    dtype: str
    token_axes: tuple[int, ...] = ()

    @property
    def item_bytes(self) -> int:
        """Bytes of one number; 1 for a dtype that codecs do not know."""
        return ITEM_BYTES.get(self.dtype, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_bytes


class Codec(ABC):
    """Makes payloads shorter. Stateless, and called from several threads at once.

    Attributes:
        name: In URLs.
        number: In the header of records; never that of another codec, and never 0.
        lossy: What is decoded is not what was encoded, but near it.
        package: What it needs to be installed; empty for nothing.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    lossy: ClassVar[bool]
    package: ClassVar[str] = ""

    @abstractmethod
    def encode(self, payload: Bytes, form: TensorForm) -> Sequence[Bytes] | None:
        """What stands for a payload, in parts; None where the codec is not for such a one, which is stored as it is."""

    @abstractmethod
    def decode(self, encoded: Bytes, form: TensorForm, out: Bytes) -> None:
        """Fill ``out``, the whole of it and nothing else, from what ``encode`` made.

        Allocates about as much as ``out`` has bytes, whatever is in ``encoded``.

        Raises:
            ValueError: That was made by no ``encode`` of a payload of this form and length.
        """
