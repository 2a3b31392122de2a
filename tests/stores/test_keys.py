"""Keys: equal only for interchangeable bytes, and safe as file names."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, PromptError
from cacheflow.stores.keys import (
    Namespace,
    ObjectKey,
    ObjectKind,
    RankKeys,
    Shard,
    as_token_array,
    chain_hash,
    chain_hashes,
    chain_root,
    identity_key,
    namespace_of,
    next_key,
)

BASE = Namespace(weights_fingerprint="abc", dtype="bfloat16", chunk_tokens=512)
HASH = "0f" * 32


@pytest.mark.parametrize(
    "change",
    [
        {"weights_fingerprint": "abd"},
        {"dtype": "float16"},
        {"chunk_tokens": 256},
        {"layout_version": 2},
        {"rope": "theta=1e6"},
        {"quantization": "fp8"},
        {"lora": "adapter"},
        {"extra": (("kernel", "flash"),)},
    ],
)
def test_every_field_of_a_namespace_changes_its_digest(change):
    assert replace(BASE, **change).digest != BASE.digest


def test_namespace_digest_is_stable_across_versions_of_this_package():
    # a changed digest silently empties every cache in the world: bump layout_version instead
    assert BASE.digest == "2d28439e0c48f7dec555f27008fe4ed7"


def test_order_of_extra_does_not_matter():
    one = replace(BASE, extra=(("a", "1"), ("b", "2")))
    other = replace(BASE, extra=(("b", "2"), ("a", "1")))
    assert one == other
    assert one.digest == other.digest


@pytest.mark.parametrize(
    "change",
    [{"weights_fingerprint": ""}, {"dtype": ""}, {"chunk_tokens": 0}, {"extra": (("a", "1"), ("a", "2"))}],
)
def test_bad_namespaces_are_refused(change):
    with pytest.raises(ConfigError):
        replace(BASE, **change)


def test_chain_hash_depends_on_every_part():
    root = chain_root()
    hashes = {
        chain_hash(root, [1, 2]),
        chain_hash(root, [2, 1]),
        chain_hash(root, [1]),
        chain_hash(chain_root("tenant"), [1, 2]),
        chain_hash(root, [1, 2], "tenant"),
        chain_hash(root, [1, 2], "", ["image"]),
        chain_hash(root, [1, 2], "", ["ima", "ge"]),
        chain_hash(root, [1, 2], "", ["image", ""]),
        chain_hash(root, [1, 2], "image"),
        chain_hash(root, [258, 0]),  # the same bytes if ids were packed without a fixed width
        chain_hash(root, [0, 258]),
        chain_hash(chain_hash(root, [1]), [2]),
    }
    assert len(hashes) == 12
    assert all(len(each) == 32 for each in hashes)


def test_token_ids_hash_alike_whatever_holds_them():
    ids = [0, 1, 70_000, 5_000_000_000]
    expected = chain_hash(chain_root(), ids)
    assert chain_hash(chain_root(), tuple(ids)) == expected
    for dtype in ("<i8", ">i8", "<u8"):
        assert chain_hash(chain_root(), np.array(ids, dtype)) == expected
    assert chain_hash(chain_root(), np.array([ids, ids]).T[:, 0]) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40), st.data())
def test_chains_share_exactly_the_common_whole_chunks(tokens, data):
    ends = sorted(data.draw(st.sets(st.integers(1, len(tokens)), min_size=1)))
    changed_at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens]
    changed[changed_at] += 1
    one, other = chain_hashes(tokens, ends), chain_hashes(changed, ends)
    assert [a == b for a, b in zip(one, other, strict=True)] == [end <= changed_at for end in ends]


def test_chain_hashes_is_chain_hash_repeated_and_continues_from_a_parent():
    tokens = list(range(10))
    first = chain_hash(chain_root("s"), tokens[:4], "s", ["img"])
    second = chain_hash(first, tokens[4:10], "s")
    assert chain_hashes(tokens, [4, 10], "s", [["img"], []]) == (first, second)
    assert chain_hashes(tokens[4:], [6], "s", parent=first) == (second,)
    assert chain_hashes(tokens, []) == ()


def test_another_tenant_shares_nothing():
    tokens = list(range(12))
    mine, others = chain_hashes(tokens, [4, 8, 12], "mine"), chain_hashes(tokens, [4, 8, 12], "others")
    assert not set(mine) & set(others)
    assert chain_root("mine") != chain_root("others")


@pytest.mark.parametrize("tokens", [[-1], [1.5], [[1, 2]], [2**63], ["a"], np.array([True])])
def test_bad_token_ids_are_refused(tokens):
    with pytest.raises((PromptError, OverflowError)):
        as_token_array(tokens)


@pytest.mark.parametrize("ends", [[0], [2, 2], [3, 1], [6]])
def test_bad_boundaries_are_refused(ends):
    with pytest.raises(ConfigError):
        chain_hashes([1, 2, 3, 4, 5], ends)


def test_bad_parents_and_multimodal_lists_are_refused():
    with pytest.raises(ConfigError, match="32"):
        chain_hash(b"", [1])
    with pytest.raises(ConfigError, match="2 chunks"):
        chain_hashes([1, 2], [1, 2], "", [["image"]])


def object_key(**change):
    values = {"namespace": BASE.digest, "chain_hash": HASH, "kind": ObjectKind.KV, "layer_lo": 0, "layer_hi": 4}
    return ObjectKey(**(values | change))


def test_key_names_are_unique_stable_and_safe_as_file_names():
    keys = [
        object_key(),
        object_key(layer_lo=1),
        object_key(layer_hi=5),
        object_key(kind=ObjectKind.STATE),
        object_key(kind=ObjectKind.HIDDEN, layer_hi=0),
        object_key(kind=ObjectKind.NEXT, layer_hi=0),
        object_key(kind=ObjectKind.IDENTITY, layer_hi=0),
        object_key(chain_hash="1f" * 32),
        object_key(namespace="ab" * 16),
        object_key(shard=Shard(tp_rank=1, tp_size=2)),
        object_key(shard=Shard(tp_rank=0, tp_size=2)),
        object_key(shard=Shard(pp_rank=1, pp_size=2)),
    ]
    assert len({key.name for key in keys}) == len({key.digest for key in keys}) == len(set(keys)) == len(keys)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", key.name)
        assert len(key.name) < 200
        assert namespace_of(key.name) == key.namespace
    assert keys[0].name == f"{BASE.digest}_{HASH}_kv_0-4_tp0of1.pp0of1"


def test_ranks_that_keep_the_same_share_one_object_that_the_first_of_them_writes():
    space, ranks = BASE.digest, [Shard(tp_rank=rank, tp_size=2) for rank in range(2)]
    own = {RankKeys(rank).kv(space, HASH, (0, 1)) for rank in ranks}
    shared = {RankKeys(rank, replicated=True).kv(space, HASH, (0, 1)) for rank in ranks}
    assert (len(own), len(shared)) == (2, 1)
    assert RankKeys(Shard(tp_size=4), replicated=True).kv(space, HASH, (0, 1)) not in shared
    assert [RankKeys(rank, replicated=True).writes for rank in ranks] == [True, False]
    assert all(RankKeys(rank).writes for rank in ranks)


def test_names_and_digests_are_those_that_stores_on_disk_hold():
    """Literals from version 0.1: another name or digest would silently empty every store in the world."""
    extra = (("compiled", "False"), ("attention", "CPU_ATTN"))
    space = Namespace(weights_fingerprint="w", dtype="bfloat16", chunk_tokens=4, rope="{}", extra=extra).digest
    first, second = chain_hashes(list(range(8)), [4, 8], "tenant", [[], ["cat@1"]])
    rank = RankKeys(Shard(tp_rank=1, tp_size=2, pp_rank=1, pp_size=3), first_layer=8)
    one = "3132278a7da3629be5598795dbea58edc8b72ba0519c5f43aff08cb4887a0102"
    two = "ddc465b23e61058a999a8dee667bcb7cac52bef8dc9a26588e4c2a7e44083b3e"
    assert (space, first.hex(), second.hex()) == ("9232846d00ce0cb31ec75075e80a946d", one, two)
    expected = {
        rank.kv(space, one, (2, 3)): (
            f"{space}_{one}_kv_10-11_tp1of2.pp0of1",
            "8d783bee2aab2ea9efc75a7bf895e0d345c9315409b534cbce1f775f50e3909b",
        ),
        rank.boundary(space, two): (
            f"{space}_{two}_hidden_8-8_tp0of2.pp0of1",
            "3cd0d603c7298caaaba18e00bc4b528a918dd411366e03e2fe7f9ae4b213cfad",
        ),
        RankKeys().kv(space, two, (0, 4)): (
            f"{space}_{two}_kv_0-4_tp0of1.pp0of1",
            "98ddb34fbd252ed53114494ebd5a3dfa325b736b972cb3a67474bf024857aa39",
        ),
        next_key(space, first): (
            f"{space}_{one}_next_0-0_tp0of1.pp0of1",
            "35a4322e1866cb676968aa3f6b2c446c8391db852448224bddec5e91773f8bc9",
        ),
        identity_key(space): (
            f"{space}_{'0' * 64}_identity_0-0_tp0of1.pp0of1",
            "60daee1b4d8205cf659b49fb20af5189a886673cda83b7bc3e0476ded37b1615",
        ),
    }
    for key, (name, digest) in expected.items():
        assert (key.name, key.digest.hex()) == (name, digest)


@pytest.mark.parametrize(
    "change",
    [
        {"chain_hash": "0F" * 32},
        {"chain_hash": "0f" * 16},
        {"chain_hash": "../" + "0" * 61},
        {"namespace": "abc"},
        {"namespace": "../" * 20},
        {"layer_lo": 4},
        {"layer_lo": -1},
        {"kind": ObjectKind.NEXT},
        {"kind": ObjectKind.NEXT, "layer_lo": 4},
        {"kind": ObjectKind.IDENTITY},
        {"kind": ObjectKind.IDENTITY, "layer_lo": 4},
    ],
)
def test_bad_keys_are_refused(change):
    with pytest.raises(ConfigError):
        object_key(**change)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "core",
        f"{BASE.digest}_{HASH}",
        f"{BASE.digest[:31]}_{HASH}_kv_0-4_tp0of1.pp0of1",
        f"{BASE.digest}_{HASH}_kv_0-4_tp0of1.pp0of1.tmp",
        f"{BASE.digest}_{HASH[:-1]}_kv_0-4_tp0of1.pp0of1",
        f"../{BASE.digest}_{HASH}_kv_0-4_tp0of1.pp0of1",
    ],
)
def test_what_is_not_named_like_a_key_is_of_no_namespace(name):
    assert namespace_of(name) is None


@pytest.mark.parametrize("change", [{"tp_rank": 1}, {"pp_rank": -1}, {"tp_size": 0}])
def test_bad_shards_are_refused(change):
    with pytest.raises(ConfigError):
        Shard(**change)


def test_states_are_objects_of_a_kind_of_their_own_named_by_layers_and_position():
    space, rank = BASE.digest, RankKeys(Shard(tp_rank=1, tp_size=2), first_layer=8)
    states = rank.states(space, HASH, (0, 4))
    assert states.name == f"{space}_{HASH}_state_8-12_tp1of2.pp0of1"
    assert namespace_of(states.name) == space
    assert states != rank.kv(space, HASH, (0, 4))
    with pytest.raises(ConfigError, match=r"layers \[4, 4\) do not fit a state object"):
        object_key(kind=ObjectKind.STATE, layer_lo=4, layer_hi=4)
