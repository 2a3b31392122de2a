r"""The record every store keeps: a header of 4,096 bytes, then the payload.

The header names the key it was written for and carries a checksum of the payload and one of itself, so that a
truncated, flipped or swapped record is recognised by its reader. Integers are little-endian::

    offset  bytes
         0      8  magic ``CFLWREC\0``
         8      4  format version
        12      2  checksum algorithm of the payload (``ChecksumAlgorithm``)
        14      2  number of dimensions
        16     16  dtype name, zero padded
        32     64  shape, eight dimensions, unused ones 0
        96      8  payload bytes
       104     32  SHA-256 of the key's canonical name
       136     16  checksum of the payload, 128 bits
       152      2  codec of the payload (``Codec.number``); 0: none
       154      2  axes of the shape along which tokens lie, a bit each; 0: not known
       156      4  zeros
       160      8  bytes of the payload once it is decoded; 0 without a codec
       168   3912  zeros
      4080     16  BLAKE2b-128 of the 4,080 bytes before

With a codec, payload, its bytes and its checksum are those of what is stored, the encoded one; shape and dtype are
those of the tensor.

Nothing here is pickled. xxHash is 8 times faster than BLAKE2b and is used when the ``xxhash`` package is installed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from cacheflow.errors import StoreError
from cacheflow.stores.keys import ObjectKey
from cacheflow.types import LoadOutcome

HEADER_BYTES = 4096
RECORD_VERSION = 1
MAX_DIMS = 8

_MAGIC = b"CFLWREC\0"
_FIELDS = struct.Struct("<8sIHH16s8QQ32s16sHHIQ")
_CODEC = struct.Struct("<H")
_CODEC_AT = 152
_SEALED_BYTES = HEADER_BYTES - 16
_PADDING = bytes(_SEALED_BYTES - _FIELDS.size)


class ChecksumAlgorithm(Enum):
    """Which 128-bit checksum covers a payload; the value stands in the header."""

    XXH3_128 = 1
    BLAKE2B_128 = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """What an intact header says.

    Attributes:
        key_digest: ``ObjectKey.digest`` of the key the record was written for.
        shape: Shape of the tensor in the payload.
        dtype: Name of its dtype.
        payload_bytes: Length of the payload as it is stored.
        algorithm: Checksum algorithm of the payload.
        checksum: Checksum of the payload as it is stored, 16 bytes.
        codec: Number of the codec that the payload went through; 0 for none.
        raw_bytes: Length of the payload once it is decoded.
        token_axes: Axes of the shape along which tokens lie; empty where that is not known.
    """

    key_digest: bytes
    shape: tuple[int, ...]
    dtype: str
    payload_bytes: int
    algorithm: ChecksumAlgorithm
    checksum: bytes
    codec: int
    raw_bytes: int
    token_axes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What a codec made of a payload: its number, above 0, and the length of what it was given."""

    codec: int
    raw_bytes: int


@cache
def _xxhash() -> Any | None:  # noqa: ANN401 - an optional module
    try:
        import xxhash
    except ImportError:
        return None
    return xxhash


def best_algorithm() -> ChecksumAlgorithm:
    """The fastest algorithm this process has."""
    return ChecksumAlgorithm.XXH3_128 if _xxhash() is not None else ChecksumAlgorithm.BLAKE2B_128


def is_available(algorithm: ChecksumAlgorithm) -> bool:
    """Whether this process can compute the algorithm."""
    return algorithm is not ChecksumAlgorithm.XXH3_128 or _xxhash() is not None


def require(algorithm: ChecksumAlgorithm, *, where: str) -> None:
    """Refuse to open a store whose records this process cannot verify.

    Raises:
        StoreError: The algorithm's package is not installed; names it and ``where``.
    """
    if not is_available(algorithm):
        raise StoreError(
            f"{where} holds records with {algorithm.name} checksums, which need the 'xxhash' package: "
            f"pip install xxhash, or use another location"
        )


def checksum(algorithm: ChecksumAlgorithm, parts: Sequence[memoryview]) -> bytes:
    """Checksum of the concatenation of ``parts``, 16 bytes; releases the GIL on large parts.

    Raises:
        StoreError: The algorithm's package is not installed.
    """
    require(algorithm, where="the record")
    module = _xxhash()
    new: Callable[[], Any] = (
        module.xxh3_128
        if algorithm is ChecksumAlgorithm.XXH3_128 and module is not None
        else lambda: hashlib.blake2b(digest_size=16)
    )
    state = new()
    for part in parts:
        state.update(part)
    digest: bytes = state.digest()
    return digest


def check_description(shape: tuple[int, ...], dtype: str, token_axes: tuple[int, ...] = ()) -> None:
    """Refuse what a header cannot hold.

    Raises:
        ValueError: More than ``MAX_DIMS`` dimensions, one outside ``[0, 2**64)``, a dtype name that is empty, not
            ASCII, or longer than 16 characters, or an axis that the shape does not have.
    """
    if len(shape) > MAX_DIMS or not all(0 <= size < 1 << 64 for size in shape):
        raise ValueError(f"shape {shape} must have at most {MAX_DIMS} dimensions, each of 0 or more")
    if not (0 < len(dtype) <= 16 and dtype.isascii()):
        raise ValueError(f"dtype {dtype!r} must be 1 to 16 ASCII characters")
    if not all(0 <= axis < len(shape) for axis in token_axes):
        raise ValueError(f"token_axes {token_axes} must be axes of shape {shape}")


def encode_header(  # noqa: PLR0913 -- keyword-only but for the first three
    out: memoryview,
    key: ObjectKey,
    payload: Sequence[memoryview],
    *,
    shape: tuple[int, ...],
    dtype: str,
    algorithm: ChecksumAlgorithm | None = None,
    token_axes: tuple[int, ...] = (),
    encoding: Encoding | None = None,
) -> None:
    """Write the header of a record into ``out``.

    Args:
        out: At least ``HEADER_BYTES`` writable bytes; the rest is left alone.
        key: The key the record will be found under.
        payload: The payload as it is stored, in parts, as bytes (``B`` format).
        shape: Shape of the tensor, at most ``MAX_DIMS`` dimensions.
        dtype: Dtype name, at most 16 ASCII characters.
        algorithm: Checksum to use; None for the best this process has.
        token_axes: Axes of the shape along which tokens lie.
        encoding: What a codec made of the payload; None without one.

    Raises:
        ValueError: Shape, dtype or axes do not fit the header.
        StoreError: The algorithm's package is not installed.
    """
    check_description(shape, dtype, token_axes)
    algorithm = algorithm or best_algorithm()
    codec, raw_bytes = (0, 0) if encoding is None else (encoding.codec, encoding.raw_bytes)
    fields = _FIELDS.pack(
        _MAGIC, RECORD_VERSION, algorithm.value, len(shape), dtype.encode(), *shape, *(0,) * (MAX_DIMS - len(shape)),
        sum(part.nbytes for part in payload), key.digest, checksum(algorithm, payload),
        codec, sum(1 << axis for axis in set(token_axes)), 0, raw_bytes,
    )  # fmt: skip
    sealed = fields + _PADDING
    out[:HEADER_BYTES] = sealed + hashlib.blake2b(sealed, digest_size=16).digest()


def decode_header(header: memoryview) -> RecordHeader | None:
    """Read a header; None when it is damaged, too short, of another version, or says what none can say."""
    if header.nbytes < HEADER_BYTES:
        return None
    seal = hashlib.blake2b(header[:_SEALED_BYTES], digest_size=16).digest()
    if seal != header[_SEALED_BYTES:HEADER_BYTES]:
        return None
    magic, version, algorithm, num_dims, dtype, *rest = _FIELDS.unpack_from(header)
    if magic != _MAGIC or version != RECORD_VERSION or num_dims > MAX_DIMS:
        return None
    *shape, payload_bytes, key_digest, payload_checksum, codec, axes, _, raw_bytes = rest
    if (payload_bytes >= raw_bytes) if codec else raw_bytes:  # what does not get shorter is stored as it is
        return None
    try:
        known = ChecksumAlgorithm(algorithm)
    except ValueError:
        return None
    return RecordHeader(
        key_digest=key_digest,
        shape=tuple(shape[:num_dims]),
        dtype=dtype.rstrip(b"\0").decode("ascii", errors="replace"),
        payload_bytes=payload_bytes,
        algorithm=known,
        checksum=payload_checksum,
        codec=codec,
        raw_bytes=raw_bytes if codec else payload_bytes,
        token_axes=tuple(axis for axis in range(num_dims) if axes >> axis & 1),
    )


def is_encoded(header: memoryview) -> bool:
    """Whether a header names a codec; does not check the header."""
    (codec,) = _CODEC.unpack_from(header, _CODEC_AT)
    return bool(codec)


def matches(found: RecordHeader, payload: memoryview) -> bool:
    """Whether a payload, as it is stored, is what its header says; not without the checksum's package."""
    return (
        found.payload_bytes == payload.nbytes
        and is_available(found.algorithm)
        and checksum(found.algorithm, (payload,)) == found.checksum
    )


def verify(header: memoryview, payload: memoryview, key: ObjectKey) -> LoadOutcome:
    """Check a record that was read whole; what is encoded is not decoded.

    Returns:
        ``OK``, or ``CORRUPT``: the header is damaged or of another version, was written for another key, announces
        another length than ``payload`` has, names a checksum this process lacks, or the payload does not match it.
    """
    found = decode_header(header)
    sound = found is not None and found.key_digest == key.digest and matches(found, payload)
    return LoadOutcome.OK if sound else LoadOutcome.CORRUPT
