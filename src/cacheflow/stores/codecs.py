"""Which codecs there are, and what a store does with the one that it was given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from cacheflow.errors import ConfigError
from cacheflow.stores.base import byte_view
from cacheflow.stores.channel_codec import Fp8Codec, Int8Codec
from cacheflow.stores.codec import Codec, TensorForm
from cacheflow.stores.keys import ObjectKind
from cacheflow.stores.record import Encoding, RecordHeader
from cacheflow.stores.zstd_codec import ZstdCodec
from cacheflow.types import Bytes, LoadOutcome

logger = logging.getLogger(__name__)

CODECS: tuple[Codec, ...] = (ZstdCodec(), Fp8Codec(), Int8Codec())
_LOSSLESS_KINDS = (ObjectKind.KV, ObjectKind.STATE, ObjectKind.HIDDEN)
_LOSSY_KINDS = (ObjectKind.KV,)
"""Running and boundary states are what everything after them is computed from, and notes are no numbers."""
_LEAST_SAVED = 32
"""What gets shorter by less than one part in so many is not worth decoding it."""


def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ConfigError: There is none, or its package is not installed.
    """
    found = next((each for each in CODECS if each.name == name), None)
    if found is None:
        raise ConfigError(f"store: codec is {name!r}, must be one of {', '.join(each.name for each in CODECS)}")
    if not _is_installed(found):
        raise ConfigError(
            f"store: codec {name} needs the package {found.package}, which is not installed: "
            "pip install 'cacheflow-kv[codecs]'"
        )
    return found


def _is_installed(codec: Codec) -> bool:
    return not codec.package or find_spec(codec.package) is not None


class Coding:
    """What one store encodes and decodes; without a codec of its own it encodes nothing. Thread-safe.

    It decodes what any lossless codec made. What a lossy one made it takes for absent, unless that is its own: nobody
    who has not asked for it takes KV for exact that is not.
    """

    def __init__(self, codec: Codec | None = None) -> None:
        """Take a codec whose package is installed, or none."""
        self.codec = codec
        self._warned: set[int] = set()

    def encode(
        self, kind: ObjectKind, parts: Sequence[memoryview], form: TensorForm
    ) -> tuple[Sequence[memoryview], Encoding | None]:
        """What is to be stored for a payload in parts; the payload itself where encoding it does not pay."""
        codec = self.codec
        if codec is None or kind not in (_LOSSY_KINDS if codec.lossy else _LOSSLESS_KINDS):
            return parts, None
        arrays = [np.frombuffer(part, np.uint8) for part in parts]
        payload = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        encoded = codec.encode(payload, form)
        if (
            encoded is None
            or sum(each.nbytes for each in encoded) > payload.nbytes - payload.nbytes // _LEAST_SAVED - 1
        ):
            return parts, None
        return [byte_view(each) for each in encoded], Encoding(codec=codec.number, raw_bytes=payload.nbytes)

    def decode(self, found: RecordHeader, payload: memoryview, *, name: str) -> LoadOutcome:
        """Decode a record in place.

        Args:
            found: Its header, which fits the record.
            payload: As long as the decoded payload; begins with the encoded one, which was verified.
            name: Of the store, for messages.

        Returns:
            ``OK``; ``MISS`` where this process cannot, or must not, decode it; ``CORRUPT`` where it is no encoding.
        """
        codec = self._for_reading(found.codec, name)
        if codec is None:
            return LoadOutcome.MISS
        out: Bytes = np.frombuffer(payload, np.uint8)
        form = TensorForm(found.shape, found.dtype, found.token_axes)
        try:
            codec.decode(out[: found.payload_bytes].copy(), form, out)
        except ValueError as error:
            logger.debug("%s: a record does not decode: %s", name, error)
            return LoadOutcome.CORRUPT
        return LoadOutcome.OK

    def _for_reading(self, number: int, name: str) -> Codec | None:
        codec = next((each for each in CODECS if each.number == number), None)
        if codec is None:
            why = f"a codec that this version does not know (number {number})"
        elif not _is_installed(codec):
            why = f"the codec {codec.name}, and the package {codec.package} is not installed: cacheflow-kv[codecs]"
        elif codec.lossy and codec is not self.codec:
            why = f"the lossy codec {codec.name}, which this store was not opened with"
        else:
            return codec
        if number not in self._warned:
            self._warned.add(number)
            logger.warning(
                "%s: it holds records of %s. They count as absent and are written anew; said once", name, why
            )
        return None
