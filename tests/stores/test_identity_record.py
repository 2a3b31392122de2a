"""What a namespace stands for: written, read back, compared; and a store that fails costs only the answer."""

import hashlib
import json
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.base import GetRequest, PutOutcome, PutRequest, ReadTap
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.identity_record import (
    IDENTITY_BYTES,
    differing_parts,
    read_identities,
    write_identity,
)
from cacheflow.stores.keys import Namespace, ObjectKind, identity_key
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.store_objects import NAMESPACE, TIMEOUT_S, put

OURS = NAMESPACE.digest
THEIRS = Namespace(weights_fingerprint="other weights", dtype="float16", chunk_tokens=4).digest
PARTS = {"weights": "abc", "dtype": "bfloat16", "threads": "2"}


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=1 << 20) as opened:
        yield opened


def write(store, namespace=OURS, parts=PARTS):
    return write_identity(store, namespace, parts, timeout_s=TIMEOUT_S)


def read(store, *namespaces):
    return read_identities(store, namespaces or (OURS,), timeout_s=TIMEOUT_S)


def put_payload(store, payload, namespace=OURS):
    request = PutRequest(identity_key(namespace), [payload], (len(payload),), "uint8", replace=True)
    assert store.submit_put([request]).wait(TIMEOUT_S) == (PutOutcome.STORED,)


def test_what_was_written_is_read_back_and_what_is_missing_left_out(store):
    other = {"weights": "é \ud800 \n", "": ""}
    assert write(store) is write(store, THEIRS, other) is PutOutcome.STORED
    assert read(store, OURS, "ab" * 16, THEIRS) == {OURS: PARTS, THEIRS: other}
    assert read(store, "ab" * 16) == {}
    assert read_identities(store, (), timeout_s=TIMEOUT_S) == {}


def test_identities_survive_the_process_and_are_objects_like_others(tmp_path):
    with FileStore(tmp_path, capacity_bytes=1 << 20) as store:
        put(store, 1)
        assert write(store) is PutOutcome.STORED
        assert store.census() == {OURS: 2}
    with FileStore(tmp_path, capacity_bytes=1 << 20) as store:
        assert read(store, *store.census()) == {OURS: PARTS}
        (path,) = tmp_path.glob("objects/00/00/*_identity_*")
        text = path.read_bytes()[4096:]
        assert len(text) == IDENTITY_BYTES == 16384
        assert json.loads(text) == PARTS
        assert text.rstrip(b" ") == json.dumps(PARTS, sort_keys=True).encode()


def test_the_key_is_of_no_layer_and_no_chain():
    key = identity_key(OURS)
    assert (key.namespace, key.kind, key.chain_hash) == (OURS, ObjectKind.IDENTITY, "0" * 64)
    assert (key.layer_lo, key.layer_hi) == (0, 0)
    with pytest.raises(ConfigError, match="namespace"):
        identity_key("not a digest")


def test_writing_again_replaces(store):
    write(store)
    assert write(store, parts={"weights": "new"}) is PutOutcome.STORED
    assert read(store) == {OURS: {"weights": "new"}}
    assert store.stats().num_objects == 1


def test_long_values_are_replaced_by_their_digests_longest_first(store):
    parts = {"long": "x" * 20_000, "longer": "y" * 30_000, "short": "z" * 10_000}
    assert write(store, parts=parts) is PutOutcome.STORED
    digests = {name: hashlib.sha256(parts[name].encode()).hexdigest() for name in ("long", "longer")}
    found = read(store)[OURS]
    assert found == parts | digests
    assert differing_parts(parts, found) == differing_parts(found, parts) == ()
    assert differing_parts(parts | {"long": "x" * 19_999}, found) == ("long",)


@settings(max_examples=examples(50))
@given(
    st.dictionaries(st.text(max_size=20), st.one_of(st.text(), st.just("x" * 9000), st.just("\0" * 5000)), max_size=80)
)
def test_whatever_the_parts_are_they_fit(parts):
    with MemoryStore(capacity_bytes=1 << 20) as store:
        assert write(store, parts=parts) is PutOutcome.STORED
        assert differing_parts(parts, read(store)[OURS]) == ()


def test_names_that_alone_are_too_long_are_refused(store):
    with pytest.raises(ConfigError, match="give fewer parts"):
        write(store, parts={f"name {number}": "x" * 100 for number in range(400)})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'"text"', b'{"weights": 1}', b'{"weights": {}}', b"\xff\xfe", b"[" * 16384, b"null"]
)
def test_a_payload_that_is_no_identity_is_left_out(store, text):
    put_payload(store, text.ljust(IDENTITY_BYTES))
    write(store, THEIRS)
    assert read(store, OURS, THEIRS) == {THEIRS: PARTS}


@pytest.mark.parametrize("num_bytes", [1, 100, IDENTITY_BYTES - 1, IDENTITY_BYTES + 1])
def test_a_payload_of_another_length_is_left_out(store, num_bytes):
    put_payload(store, b"{}".ljust(num_bytes)[:num_bytes])
    assert read(store) == {}


def test_a_damaged_identity_is_left_out_and_written_again(store):
    write(store)
    tapped = GetRequest(identity_key(OURS), np.zeros(IDENTITY_BYTES, np.uint8), tap=ReadTap(4096 + 3))
    with FaultyStore(store, FaultPlan(rules=(FaultRule(fault=Fault.CORRUPT, limit=1),))) as faulty:
        assert read(faulty) == {}
        assert faulty.submit_get([tapped]).wait(TIMEOUT_S) == (LoadOutcome.CORRUPT,)
        assert write(faulty) is PutOutcome.STORED
        assert read(faulty) == {OURS: PARTS}


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.CORRUPT, Fault.LATE, Fault.ERROR, Fault.HANG])
def test_a_store_that_fails_costs_only_its_answer(store, fault):
    write(store)
    write(store, THEIRS)
    rule = FaultRule(fault=fault, matches=lambda key: key.namespace == OURS)
    with FaultyStore(store, FaultPlan(rules=(rule,))) as faulty:
        assert read_identities(faulty, [OURS, THEIRS], timeout_s=0.2) == {THEIRS: PARTS}


def test_a_write_that_fails_is_an_outcome(store):
    with FaultyStore(store, FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR),))) as faulty:
        assert write(faulty) is PutOutcome.ERROR
    assert write(store) is PutOutcome.ERROR, "closed with its wrapper"
    assert read(store) == {}


def test_a_store_hung_in_its_backend_holds_nobody_up(store):
    class Hanging(MemoryStore):
        may_go_on = Event()

        def read_record(self, key, header, payload):
            self.may_go_on.wait(TIMEOUT_S)
            return super().read_record(key, header, payload)

        def write_record(self, key, parts, *, replace):
            self.may_go_on.wait(TIMEOUT_S)
            return super().write_record(key, parts, replace=replace)

    with Hanging(capacity_bytes=1 << 20) as hanging:
        try:
            assert write_identity(hanging, OURS, PARTS, timeout_s=0.02) is PutOutcome.LATE
            assert read_identities(hanging, [OURS], timeout_s=0.02) == {}
        finally:
            hanging.may_go_on.set()
        assert write(hanging) is PutOutcome.STORED
        assert read(hanging) == {OURS: PARTS}


def test_parts_that_differ():
    assert differing_parts({}, {}) == ()
    assert differing_parts(PARTS, dict(reversed(PARTS.items()))) == ()
    assert differing_parts(PARTS, PARTS | {"threads": "4", "dtype": "float32"}) == ("dtype", "threads")
    assert differing_parts(PARTS, {"weights": "abc", "rope": ""}) == ("dtype", "rope", "threads")
