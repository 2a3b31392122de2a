"""Any bytes at all in the place of a record, or inside one: no crash, and OK only for what its checksums call whole."""

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.base import PutOutcome, PutRequest
from cacheflow.stores.file import FileStore
from cacheflow.stores.identity_record import IDENTITY_BYTES, read_identities
from cacheflow.stores.keys import ObjectKey, RankKeys, chain_root, identity_key, key_of, namespace_of, next_key
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.prefix_index import MAX_NOTED, find_prefix
from cacheflow.stores.record import HEADER_BYTES, decode_header, encode_header, verify
from cacheflow.stores.shared import FoundRecord
from cacheflow.stores.upkeep import check_record
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.store_objects import NAMESPACE, TIMEOUT_S, get, key, payload, put

SIZE = 200
PAYLOAD = payload(1, SIZE).tobytes()
OK, CORRUPT = LoadOutcome.OK, LoadOutcome.CORRUPT


def intact() -> bytearray:
    header = bytearray(HEADER_BYTES)
    encode_header(memoryview(header), key(1), [memoryview(PAYLOAD)], shape=(SIZE,), dtype="uint8")
    return header + PAYLOAD


def sealed(record: bytearray) -> bytearray:
    """With the header's own checksum right."""
    record[HEADER_BYTES - 16 : HEADER_BYTES] = hashlib.blake2b(record[: HEADER_BYTES - 16], digest_size=16).digest()
    return record


@st.composite
def tampered(draw: st.DrawFn) -> bytes:
    """An intact record with bytes changed in or after its fields, cut or grown, its seal perhaps made right again."""
    record = intact()
    places = st.one_of(st.integers(0, 168), st.integers(0, len(record)))
    for place, data in draw(st.lists(st.tuples(places, st.binary(min_size=1, max_size=20)), max_size=3)):
        record[place : place + len(data)] = data
    del record[draw(st.sampled_from([len(record)] * 3 + [0, 100, HEADER_BYTES, len(record) - 1])) :]
    record += draw(st.sampled_from([b""] * 3 + [b"\0", b"x" * SIZE]))
    return bytes(sealed(record) if len(record) >= HEADER_BYTES and draw(st.booleans()) else record)


RECORDS = st.one_of(tampered(), st.binary(max_size=HEADER_BYTES + 2 * SIZE))


def checksum(algorithm: int, data: bytes) -> bytes | None:
    if algorithm == 1:
        import xxhash

        return xxhash.xxh3_128(data).digest()
    return hashlib.blake2b(data, digest_size=16).digest() if algorithm == 2 else None


def is_whole(record: bytes, wanted: ObjectKey) -> bool:
    """What the format's description says, read by other code than the store's."""
    header, data = record[:HEADER_BYTES], record[HEADER_BYTES:]
    if len(header) < HEADER_BYTES or sealed(bytearray(header)) != header:
        return False
    magic, version, algorithm, num_dims = struct.unpack_from("<8sIHH", header)
    return (
        (magic, version) == (b"CFLWREC\0", 1)
        and num_dims <= 8
        and struct.unpack_from("<Q", header, 96) == (len(data),)
        and header[104:136] == hashlib.sha256(wanted.name.encode()).digest()
        and header[136:152] == checksum(algorithm, data)
        and is_length_possible(header, len(data))
    )


def is_length_possible(header: bytes, num_bytes: int) -> bool:
    """Without a codec there is no other length; with one the payload is longer."""
    codec, raw_bytes = struct.unpack_from("<H", header, 152)[0], struct.unpack_from("<Q", header, 160)[0]
    return num_bytes < raw_bytes if codec else not raw_bytes


@settings(max_examples=examples(300))
@given(record=RECORDS)
@example(record=bytes(intact()))
@example(record=bytes(HEADER_BYTES))
def test_only_a_whole_record_verifies(record):
    header, data = memoryview(record[:HEADER_BYTES]), memoryview(record[HEADER_BYTES:])
    decode_header(header)
    assert verify(header, data, key(1)) is (OK if is_whole(record, key(1)) else CORRUPT)
    assert verify(header, data, key(2)) is (OK if is_whole(record, key(2)) else CORRUPT)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    with FileStore(root, capacity_bytes=1 << 20, fsync=False, num_threads=1) as store:
        put(store, 1, num_bytes=SIZE)
        (path,) = root.glob("objects/*/*/*")
        yield store, path


@settings(max_examples=examples(100))
@given(record=RECORDS)
@example(record=bytes(intact()))
@example(record=b"")
def test_a_file_of_any_bytes_is_read_as_it_was_written_or_not_at_all(files, record):
    store, path = files
    path.write_bytes(record)
    outcome, buffer = get(store, 1, SIZE)
    whole = is_whole(record, key(1))
    is_raw = record[152:154] == b"\0\0"
    assert (outcome is OK) == (whole and len(record) == HEADER_BYTES + SIZE and is_raw)
    assert outcome is not OK or buffer.tobytes() == record[HEADER_BYTES:]
    said = check_record(store, FoundRecord(path.name, len(record), 0.0), on_error=print)
    assert said is (OK if whole and len(record) > HEADER_BYTES else CORRUPT)
    if outcome is CORRUPT:  # what it held is written again
        assert not store.contains([key(1)])[0]
        assert put(store, 1, num_bytes=SIZE) == (PutOutcome.STORED,)
        outcome, buffer = get(store, 1, SIZE)
        assert outcome is OK
        assert buffer.tobytes() == PAYLOAD


def written(store: MemoryStore, at: ObjectKey, data: np.ndarray) -> None:
    request = PutRequest(at, [data], data.shape, str(data.dtype), replace=True)
    assert store.submit_put([request]).wait(TIMEOUT_S) == (PutOutcome.STORED,)


@pytest.fixture(scope="module")
def memory():
    with MemoryStore(capacity_bytes=1 << 20, num_threads=1) as store:
        yield store


JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
IDENTITIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()).filter(lambda text: len(text) <= IDENTITY_BYTES),
)


@settings(max_examples=examples(100))
@given(text=IDENTITIES)
@example(text=b"[" * IDENTITY_BYTES)
@example(text=b'{"a":' * (IDENTITY_BYTES // 5))
@example(text=b"9" * IDENTITY_BYTES)
def test_an_identity_of_any_bytes_is_one_or_none(memory, text):
    written(memory, identity_key(NAMESPACE.digest), np.frombuffer(text.ljust(IDENTITY_BYTES), np.uint8))
    found = read_identities(memory, [NAMESPACE.digest], timeout_s=TIMEOUT_S)
    for parts in found.values():
        assert json.loads(text) == parts
        assert all(isinstance(word, str) for pair in parts.items() for word in pair)


@settings(max_examples=examples(100))
@given(lengths=st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-3, 40), max_size=MAX_NOTED))
def test_a_note_of_any_lengths_finds_no_chunk_that_is_not_there(memory, lengths):
    noted = np.zeros(MAX_NOTED, "<i8")
    noted[: len(lengths)] = lengths
    written(memory, next_key(NAMESPACE.digest, chain_root()), noted)
    found = find_prefix(
        memory,
        NAMESPACE,
        range(30),
        chunk_tokens=4,
        required_keys=lambda chain: (RankKeys().kv(NAMESPACE.digest, chain.hex(), (0, 1)),),
    )
    assert found.chunk_ends == ()


NAMES = st.one_of(
    st.text(),
    st.from_regex(r"[0-9a-f]{31,33}_[0-9a-f]{63,65}_[a-z]{1,9}_\d{1,3}-\d{1,3}_tp\d+of\d+\.pp\d+of\d+"),
    st.builds(lambda kind, lo, hi: f"{'a' * 32}_{'b' * 64}_{kind}_{lo}-{hi}_tp0of1.pp0of1",
              st.sampled_from(["kv", "state", "hidden", "next", "identity", "other"]),
              st.integers(-1, 3), st.sampled_from(["0", "1", "03", "\u0663", "9" * 5000])),
)  # fmt: skip


@settings(max_examples=examples(200))
@given(name=NAMES)
def test_a_name_is_a_keys_or_none(name):
    namespace = namespace_of(name)
    try:
        found = key_of(name)
    except ConfigError:
        return
    assert found.namespace == namespace
    assert found.name == name
