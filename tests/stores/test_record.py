"""Records: any damage to a header or payload is noticed, with either checksum."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cacheflow
from cacheflow.errors import StoreError
from cacheflow.stores import record
from cacheflow.stores.record import (
    HEADER_BYTES,
    RECORD_VERSION,
    ChecksumAlgorithm,
    decode_header,
    encode_header,
    verify,
)
from cacheflow.types import LoadOutcome
from support.store_objects import key

PAYLOAD = bytes(range(256)) * 3


def header_of(payload=PAYLOAD, number=1, **options):
    header = bytearray(HEADER_BYTES)
    options = {"shape": (3, 256), "dtype": "uint8"} | options
    encode_header(memoryview(header), key(number), [memoryview(payload)], **options)
    return header


def check(header, payload=PAYLOAD, number=1):
    return verify(memoryview(header), memoryview(payload), key(number))


@pytest.mark.parametrize("algorithm", ChecksumAlgorithm)
def test_an_intact_record_verifies_and_tells_what_it_holds(algorithm):
    header = header_of(algorithm=algorithm)
    assert check(header) is LoadOutcome.OK
    found = decode_header(memoryview(header))
    assert (found.shape, found.dtype, found.payload_bytes) == ((3, 256), "uint8", len(PAYLOAD))
    assert (found.key_digest, found.algorithm) == (key(1).digest, algorithm)


@settings(deadline=None)
@given(position=st.integers(0, HEADER_BYTES + len(PAYLOAD) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_corrupt(position, bit):
    whole = header_of() + bytearray(PAYLOAD)
    whole[position] ^= 1 << bit
    assert check(whole[:HEADER_BYTES], whole[HEADER_BYTES:]) is LoadOutcome.CORRUPT


def test_another_keys_record_and_another_length_are_corrupt():
    assert check(header_of(number=2)) is LoadOutcome.CORRUPT
    assert check(header_of(), PAYLOAD[:-1]) is LoadOutcome.CORRUPT
    assert check(header_of(), PAYLOAD + b"\0") is LoadOutcome.CORRUPT
    assert check(header_of()[: HEADER_BYTES - 1]) is LoadOutcome.CORRUPT
    assert check(bytes(HEADER_BYTES)) is LoadOutcome.CORRUPT


def resealed(header, offset, packed):
    """The header with a field changed and its own checksum right again."""
    header[offset : offset + len(packed)] = packed
    header[-16:] = hashlib.blake2b(header[:-16], digest_size=16).digest()
    return header


def test_another_version_magic_or_unknown_checksum_is_corrupt():
    assert check(resealed(header_of(), 8, struct.pack("<I", RECORD_VERSION))) is LoadOutcome.OK
    assert check(resealed(header_of(), 8, struct.pack("<I", RECORD_VERSION + 1))) is LoadOutcome.CORRUPT
    assert check(resealed(header_of(), 0, b"SOMEELSE")) is LoadOutcome.CORRUPT
    assert check(resealed(header_of(), 12, struct.pack("<H", 99))) is LoadOutcome.CORRUPT
    assert check(resealed(header_of(), 14, struct.pack("<H", 9))) is LoadOutcome.CORRUPT


def test_a_payload_in_parts_is_their_concatenation():
    parts = [memoryview(PAYLOAD)[:100], memoryview(PAYLOAD)[100:101], memoryview(PAYLOAD)[101:]]
    header = bytearray(HEADER_BYTES)
    encode_header(memoryview(header), key(1), parts, shape=(len(PAYLOAD),), dtype="uint8")
    assert check(header) is LoadOutcome.OK


@pytest.mark.parametrize(
    "options", [{"shape": (1,) * 9}, {"shape": (-1,)}, {"dtype": ""}, {"dtype": "x" * 17}, {"dtype": "flöat"}]
)
def test_descriptions_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        header_of(**options)


def test_without_xxhash_records_are_written_with_blake2b_and_others_are_corrupt(monkeypatch):
    written_with_xxhash = header_of(algorithm=ChecksumAlgorithm.XXH3_128)
    monkeypatch.setattr(record, "_xxhash", lambda: None)
    header = header_of()
    assert decode_header(memoryview(header)).algorithm is ChecksumAlgorithm.BLAKE2B_128
    assert check(header) is LoadOutcome.OK
    assert check(written_with_xxhash) is LoadOutcome.CORRUPT
    with pytest.raises(StoreError, match="xxhash"):
        record.checksum(ChecksumAlgorithm.XXH3_128, [memoryview(PAYLOAD)])


def test_stores_import_and_work_without_xxhash_installed():
    source = Path(cacheflow.__file__).parents[1]
    tests = Path(__file__).parents[1]
    program = (
        "import sys; sys.modules['xxhash'] = None\n"
        f"sys.path[:0] = [{str(source)!r}, {str(tests)!r}]\n"
        "from cacheflow.stores.memory import MemoryStore\n"
        "from support.store_objects import put, get\n"
        "store = MemoryStore(capacity_bytes=1 << 20)\n"
        "assert [each.value for each in put(store, 1)] == ['stored']\n"
        "assert get(store, 1)[0].value == 'ok'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
