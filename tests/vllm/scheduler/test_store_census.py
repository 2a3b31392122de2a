"""The line at start: whose the store's objects are, and what differs where they are another's."""

import threading

import numpy as np
import pytest

pytest.importorskip("torch")

from cacheflow.stores.base import PutRequest
from cacheflow.stores.identity_record import read_identities, write_identity
from cacheflow.stores.keys import ObjectKey, ObjectKind
from cacheflow.stores.memory import MemoryStore
from cacheflow.vllm.facts import BOTTOM
from cacheflow.vllm.scheduler.kv_identity import WEIGHTS_BY_LAYER, describe, shared_namespace
from cacheflow.vllm.scheduler.store_census import StoreCensus, census_line
from support.scheduler_cases import facts
from support.waiting import eventually

pytestmark = pytest.mark.torch
OWN, OTHER, THIRD = "a" * 32, "b" * 32, "c" * 32
PARTS = {"num_threads": "2", "dtype": "bfloat16", "weights_fingerprint": "1" * 64}


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=1 << 24) as store:
        yield store


def fill(store, namespace, count):
    keys = [
        ObjectKey(namespace=namespace, chain_hash=f"{n:064x}", kind=ObjectKind.KV, layer_lo=0, layer_hi=1)
        for n in range(count)
    ]
    store.submit_put([PutRequest(key, [np.zeros(8, np.uint8)], (8,), "uint8") for key in keys]).wait(20)


def test_an_empty_store_and_one_of_our_own(store):
    assert census_line(store, OWN, PARTS) == "the store holds no objects"
    fill(store, OWN, 3)
    assert census_line(store, OWN, PARTS) == "the store holds 3 objects, all of them this engine's"


def test_what_differs_is_named_and_short_values_are_shown(store):
    fill(store, OWN, 2)
    fill(store, OTHER, 5)
    write_identity(store, OTHER, PARTS | {"num_threads": "4", "weights_fingerprint": "2" * 64}, timeout_s=20)
    line = census_line(store, OWN, PARTS)
    assert line.startswith("the store holds 8 objects: 2 are this engine's; 6 are another's: ")
    assert "num_threads (2 here, 4 there), weights_fingerprint differ" in line
    assert "1111" not in line
    assert "dtype" not in line


LAYERS_HERE = (BOTTOM, "a"), (0, "b"), (1, "c"), (2, "d")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((*LAYERS_HERE[:2], (1, "x"), LAYERS_HERE[3]), ", the weights in 1 of 4 layers: 1"),
        (((BOTTOM, "x"), *LAYERS_HERE[1:3], (2, "y")), ", the weights in 2 of 4 layers: below the first, 2"),
        (tuple((layer, "x") for layer, _ in LAYERS_HERE), ", the weights in every layer"),
        (LAYERS_HERE[:3], ""),
        (((BOTTOM, "whole"),), ""),
    ],
)
def test_layers_whose_weights_differ_are_named(store, layers, said):
    """With the digests of one layer of other weights it is those; of another model nothing is said of layers."""
    parts, others = (describe([facts(weights=weights)]) for weights in (LAYERS_HERE, layers))
    fill(store, OTHER, 5)
    write_identity(store, OTHER, others, timeout_s=20)
    own, other = parts["weights_fingerprint"], others["weights_fingerprint"]
    expected = f"another's: weights_fingerprint ({own} here, {other} there) differs{said}"
    assert census_line(store, OWN, parts).endswith(expected)


def test_an_identity_of_an_earlier_version_says_nothing_of_layers(store):
    parts = describe([facts(weights=LAYERS_HERE)])
    fill(store, OTHER, 5)
    others = {name: value for name, value in parts.items() if name != WEIGHTS_BY_LAYER} | {"num_threads": "4"}
    write_identity(store, OTHER, others, timeout_s=20)
    assert census_line(store, OWN, parts).endswith("another's: num_threads (none here, 4 there) differs")


def test_many_others_are_counted_and_the_largest_named(store):
    for n in range(8):
        fill(store, f"{n:032x}", 2 + n)
    line = census_line(store, OWN, PARTS)
    assert line.count("another's") == 5
    assert line.endswith("; 9 are of 3 more")
    assert "9 are another's: what it is was not written down" in line


def test_what_was_saved_after_a_reset_is_said_to_be_of_no_use(store):
    fill(store, OTHER, 5)
    write_identity(store, OTHER, PARTS | {"generation": "e" * 32}, timeout_s=20)
    assert "5 are another's: an engine saved them after a reset" in census_line(store, OWN, PARTS).replace(
        "6 are", "5 are"
    )


def test_an_engine_writes_what_its_namespaces_are_and_says_its_line_once(store, caplog):
    fill(store, OTHER, 1)
    caplog.set_level("INFO", "cacheflow")
    census = StoreCensus(store)
    for _ in range(2):
        census.describe(OWN, PARTS)
        census.describe(THIRD, PARTS | {"lora": "d"})
    eventually(lambda: len(read_identities(store, [OWN, THIRD], timeout_s=20)) == 2)
    census.close()
    assert read_identities(store, [OWN, THIRD], timeout_s=20) == {OWN: PARTS, THIRD: PARTS | {"lora": "d"}}
    assert [record.getMessage() for record in caplog.records if "objects" in record.getMessage()] == [
        "the store holds 1 objects: 0 are this engine's; 1 are another's: what it is was not written down (an earlier "
        "version, or evicted)"
    ]


class HangingStore(MemoryStore):
    """Does not say what it holds before it is told to."""

    def __init__(self):
        super().__init__(capacity_bytes=1 << 24)
        self.asked, self.told = threading.Event(), threading.Event()

    def census(self):
        self.asked.set()
        assert self.told.wait(20)
        return super().census()


def test_a_store_that_hangs_holds_up_nobody():
    with HangingStore() as store:
        census = StoreCensus(store)
        census.describe(OWN, PARTS)
        assert store.asked.wait(20)
        census.describe(THIRD, PARTS)
        census.close()
        assert not read_identities(store, [OWN, THIRD], timeout_s=20)
        store.told.set()
        eventually(lambda: len(read_identities(store, [OWN, THIRD], timeout_s=20)) == 2)


def test_the_parts_change_with_the_namespace():
    """Whatever makes another namespace of an engine shows in what it is described by."""
    base = facts(identity=(("dtype", "bfloat16"),), weights=((0, "w"),))
    others = [
        facts(identity=(("dtype", "float32"),), namespace="f" * 32, weights=((0, "w"),)),
        facts(identity=(("dtype", "bfloat16"),), weights=((0, "v"),)),
    ]
    for other in others:
        assert shared_namespace([other]) != shared_namespace([base])
        assert describe([other]) != describe([base])
    assert describe([base])["layers_per_block"] == "1"
