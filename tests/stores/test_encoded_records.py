"""Records that went through a codec, in every store: what is read back, what counts, and who does not read them."""

import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores import codecs
from cacheflow.stores.base import GetRequest, PrefetchOutcome, PrefetchRequest, PutOutcome, PutRequest
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.identity_record import read_identities, write_identity
from cacheflow.stores.keys import ObjectKey, ObjectKind, RankKeys
from cacheflow.stores.link import LinkSchedule
from cacheflow.stores.loan import Loan
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.prefix_index import MAX_NOTED
from cacheflow.stores.probe import measure_link, stored_share
from cacheflow.stores.record import HEADER_BYTES, Encoding, decode_header, encode_header
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.upkeep import check_record
from cacheflow.types import LoadOutcome
from support.damage import DAMAGES, put_back, record_of
from support.examples import examples
from support.kv_like import SHAPE, TOKEN_AXES, codec_of, get_kv, kv_payload, put_kv, values_of
from support.lending import lending
from support.store_kinds import ALL, SHARED, url_of
from support.store_objects import NAMESPACE, TIMEOUT_S, get, key, payload, put
from support.waiting import eventually

CAPACITY = 16 << 20
OK, MISS, CORRUPT = LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.CORRUPT
RAW_BYTES = kv_payload(0).nbytes
LOSSY = ("fp8", "int8")


def with_codec(url, name):
    codec_of(name)
    return f"{url}{'&' if '?' in url else '?'}codec={name}"


def memory(name=None):
    return open_store("memory" if name is None else with_codec("memory", name), capacity_bytes=CAPACITY)


@pytest.fixture(params=ALL)
def urls(request, tmp_path):
    """Opens the same store with this codec or that; of memory another one."""
    return url_of(request.param, request, tmp_path / "store")


@pytest.fixture(params=SHARED)
def shared_url(request, tmp_path):
    """Opened by several, each with its own codec or none."""
    return url_of(request.param, request, tmp_path / "store")


@pytest.mark.parametrize("name", ["zstd", *LOSSY])
def test_what_was_put_is_read_back_and_takes_less_room(urls, name):
    with open_store(with_codec(urls, name), capacity_bytes=CAPACITY) as store:
        assert [put_kv(store, number) for number in (1, 2)] == [PutOutcome.STORED] * 2
        assert put_kv(store, 1) is PutOutcome.EXISTS
        for number in (2, 1):
            outcome, buffer = get_kv(store, number)
            assert outcome is OK
            if name == "zstd":
                assert np.array_equal(buffer, kv_payload(number))
            else:
                values, own = values_of(buffer, "bfloat16"), values_of(kv_payload(number), "bfloat16")
                assert 0 < np.abs(values - own).max() < 0.2 * np.abs(own).max()
        stats = store.stats()
        assert stats.read_bytes == stats.written_bytes == 2 * RAW_BYTES
        most = {"zstd": 0.95}.get(name, 0.6)
        assert stats.used_bytes < 2 * (HEADER_BYTES + most * RAW_BYTES)
        assert sum(store.stored_bytes([(key(1), RAW_BYTES), (key(2), RAW_BYTES)])) == (
            stats.used_bytes - 2 * HEADER_BYTES
        )


def test_of_records_of_any_codec_and_none_the_lossless_ones_are_read_by_all(shared_url, caplog):
    """Both directions: with and without a codec."""
    openings = {name: with_codec(shared_url, name) if name else shared_url for name in ("", "zstd", "int8", "fp8")}
    keep = [open_store(shared_url, capacity_bytes=CAPACITY)]  # the last user of shared memory takes it along
    for number, url in enumerate(openings.values()):
        with open_store(url, capacity_bytes=CAPACITY) as store:
            assert put_kv(store, number) is PutOutcome.STORED
    for name, url in openings.items():
        with open_store(url, capacity_bytes=CAPACITY) as store, caplog.at_level(logging.WARNING):
            caplog.clear()
            seen = {other: get_kv(store, number)[0] for number, other in enumerate(openings)}
            seen |= {f"{other} again": get_kv(store, number)[0] for number, other in enumerate(openings)}
        lossy = {other for other in LOSSY if other != name}
        expected = {each: MISS if each.split()[0] in lossy else OK for each in seen if each.split()}
        assert {each: outcome for each, outcome in seen.items() if each.split()} == expected
        assert seen[""] is OK
        said = [record.getMessage() for record in caplog.records if "lossy codec" in record.getMessage()]
        assert len(said) == len(lossy)  # once each
    for store in keep:
        store.close()


def test_what_is_not_read_counts_as_absent_and_is_written_anew(shared_url):
    with (
        open_store(with_codec(shared_url, "int8"), capacity_bytes=CAPACITY) as lossy,
        open_store(shared_url, capacity_bytes=CAPACITY) as exact,
    ):
        put_kv(lossy, 1)
        assert exact.contains([key(1)]) == (True,)
        assert get_kv(exact, 1)[0] is MISS
        assert exact.contains([key(1)]) == (False,)
        assert put_kv(exact, 1) is PutOutcome.STORED
        outcome, buffer = get_kv(exact, 1)
        assert outcome is OK
        assert np.array_equal(buffer, kv_payload(1))
        assert exact.stats().get_outcomes[MISS] == 1


def test_a_process_without_the_package_misses(monkeypatch, caplog, tmp_path):
    url = f"file://{tmp_path}/kv"
    with open_store(with_codec(url, "zstd"), capacity_bytes=CAPACITY) as store:
        put_kv(store, 1)
        put_kv(store, 2)
    monkeypatch.setattr(codecs, "find_spec", lambda name: None)
    with open_store(url, capacity_bytes=CAPACITY) as store:
        assert [get_kv(store, number)[0] for number in (1, 2)] == [MISS, MISS]
    assert caplog.text.count("the package zstandard is not installed") == 1
    with pytest.raises(
        ConfigError, match=r"codec zstd needs the package zstandard.*pip install 'cacheflow-kv\[codecs\]'"
    ):
        check_store_url(f"{url}?codec=zstd")


def test_a_codec_of_a_later_version_is_missed(caplog):
    with memory() as store:
        data, header = b"new", bytearray(HEADER_BYTES)
        encode_header(memoryview(header), key(1), [memoryview(data)], shape=SHAPE, dtype="bfloat16",
                      encoding=Encoding(codec=77, raw_bytes=RAW_BYTES))  # fmt: skip
        put_back(store, key(1), bytes(header) + data)
        assert get_kv(store, 1)[0] is MISS
    assert "a codec that this version does not know (number 77)" in caplog.text


@pytest.mark.parametrize("name", ["zstd", *LOSSY])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_mended(urls, damage, name):
    with open_store(with_codec(urls, name), capacity_bytes=CAPACITY) as store:
        other = key(1, layer=1)
        put_kv(store, 1)
        put_kv(store, 2, of=other)
        DAMAGES[damage](store, key(1), other)
        assert get_kv(store, 1)[0] is CORRUPT
        assert store.contains([key(1)]) == (False,)
        assert put_kv(store, 1) is PutOutcome.STORED
        assert get_kv(store, 1)[0] is OK


@pytest.mark.parametrize("name", ["zstd", *LOSSY])
def test_a_bit_that_flips_on_the_way_is_noticed_wherever_it_is(name):
    plan = FaultPlan(rules=(FaultRule(fault=Fault.CORRUPT),))
    with FaultyStore(memory(name), plan) as store:
        for number in range(40):
            put_kv(store, number)
            assert get_kv(store, number)[0] is CORRUPT


def test_a_buffer_of_another_length_is_an_error_also_of_the_encoded_length():
    with memory("int8") as store:
        put_kv(store, 1)
        (num_stored,) = store.stored_bytes([(key(1), RAW_BYTES)])
        for num_bytes in (1, num_stored, num_stored + 1, RAW_BYTES - 1, RAW_BYTES + 1):
            assert get(store, 1, num_bytes)[0] is LoadOutcome.ERROR
        assert get_kv(store, 1)[0] is OK


def test_an_encoded_record_is_never_lent_and_a_raw_one_is():
    with lending(memory("int8")) as store:
        put_kv(store, 1)
        put_kv(store, 2, token_axes=())  # not known to be keys and values
        (num_stored,) = store.stored_bytes([(key(1), RAW_BYTES)])
        for number, num_bytes, outcome in [(1, RAW_BYTES, OK), (1, num_stored, LoadOutcome.ERROR), (2, RAW_BYTES, OK)]:
            for _ in range(30):  # most are not verified
                loan = Loan()
                request = GetRequest(key(number), np.zeros(num_bytes, np.uint8), loan=loan)
                assert store.submit_get([request]).wait(TIMEOUT_S) == (outcome,)
                loan.end()
        assert store.stats().num_lent == 30


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("kind", ["state", "hidden", "next", "identity", "no axes", "not finite"])
def test_what_must_stay_exact_stays_exact(name, kind):
    states = RankKeys().states(NAMESPACE.digest, "0" * 64, (0, 1))
    hidden = RankKeys(first_layer=1).boundary(NAMESPACE.digest, "0" * 64)
    with memory(name) as store:
        if kind == "identity":
            parts = {"weights": "x" * 100}
            write_identity(store, NAMESPACE.digest, parts, timeout_s=TIMEOUT_S)
            assert read_identities(store, [NAMESPACE.digest], timeout_s=TIMEOUT_S) == {NAMESPACE.digest: parts}
            return
        if kind == "next":
            note = ObjectKey(namespace=NAMESPACE.digest, chain_hash="0" * 64, kind=ObjectKind.NEXT)
            lengths = np.arange(MAX_NOTED, dtype=np.int64)
            store.submit_put([PutRequest(note, [lengths], (MAX_NOTED,), "int64", replace=True)]).wait(TIMEOUT_S)
            assert decode_header(memoryview(record_of(store, note))).codec == 0
            return
        data, of = kv_payload(1), {"state": states, "hidden": hidden}.get(kind, key(1))
        if kind == "not finite":
            data.view(np.uint16)[77] = 0x7FC0
        axes = () if kind == "no axes" else TOKEN_AXES
        assert put_kv(store, 1, data, of=of, token_axes=axes) is PutOutcome.STORED
        outcome, buffer = get_kv(store, 1, of=of)
        assert outcome is OK
        assert np.array_equal(buffer, data)


def test_notes_are_readable_without_the_package_of_a_lossless_codec(monkeypatch):
    with memory("zstd") as store:
        write_identity(store, NAMESPACE.digest, {"a": "b" * 200}, timeout_s=TIMEOUT_S)
        monkeypatch.setattr(codecs, "find_spec", lambda name: None)
        assert read_identities(store, [NAMESPACE.digest], timeout_s=TIMEOUT_S)


def test_what_does_not_get_shorter_is_stored_as_it_is():
    with memory("zstd") as store:
        put(store, 1)  # random bytes
        assert get(store, 1)[0] is OK
        assert np.array_equal(get(store, 1)[1], payload(1))
        assert store.stats().used_bytes == HEADER_BYTES + 1000
        assert decode_header(memoryview(record_of(store, key(1)))).codec == 0


def test_a_store_says_which_lossy_codec_it_has_through_wrappers_and_tiers(tmp_path):
    for name, said in [("zstd", ()), ("int8", (("codec", "int8"),)), ("fp8", (("codec", "fp8"),))]:
        with ThrottledStore(FaultyStore(memory(name), FaultPlan()), 1e9) as store:
            assert store.codec_identity() == said
        tiers = [with_codec(url, name) for url in ("memory", f"file://{tmp_path}/{name}")]
        with open_store(tiers, capacity_bytes=CAPACITY) as store:
            assert store.codec_identity() == said
    with memory() as store:
        assert store.codec_identity() == ()


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ("memory?codec=gzip", "codec is 'gzip', must be one of zstd, fp8, int8"),
        ("memory?codec=", "codec is '', must be one of"),
        (["memory", "file:///kv?codec=int8"], "the same lossy codec or none, these have memory none, file:///kv int8"),
        (["memory?codec=fp8", "file:///kv?codec=int8"], "these have memory fp8, file:///kv int8"),
        (["memory?codec=int8", "file:///kv"], "these have memory int8, file:///kv none"),
    ],
)
def test_bad_codecs_are_refused_at_the_door(urls, said):
    with pytest.raises(ConfigError) as refused:
        check_store_url(urls)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_store_that_is_not_threaded_has_no_codecs(monkeypatch):
    def opener(url):
        return lambda capacity_bytes, retention: ThrottledStore(MemoryStore(capacity_bytes=capacity_bytes), 1e9)

    monkeypatch.setattr("cacheflow.stores.opening.opener_of", lambda scheme: opener)
    with pytest.raises(StoreError, match="has no codecs"):
        open_store("odd://x?codec=int8", capacity_bytes=CAPACITY)


@pytest.mark.parametrize(("name", "said"), [("int8", "near what was computed, not equal"), ("zstd", "bit for bit")])
def test_the_log_says_what_a_codec_means(name, said, caplog):
    with caplog.at_level(logging.INFO), memory(name):
        assert said in caplog.text


# Tiers.


@pytest.mark.parametrize("name", ["zstd", "int8"])
def test_what_is_promoted_is_encoded_as_it_was_and_does_not_drift(name, tmp_path):
    urls = [with_codec(url, name) for url in ("memory", f"file://{tmp_path}/kv")]
    with open_store(urls[1], capacity_bytes=CAPACITY) as slow:
        put_kv(slow, 1)
        slow_record = record_of(slow, key(1))
        _, expected = get_kv(slow, 1)
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        for _ in range(2):
            outcome, buffer = get_kv(store, 1)
            assert outcome is OK
            assert np.array_equal(buffer, expected)
            assert store.drain(TIMEOUT_S)
        assert [tier.store.get_outcomes[OK] for tier in store.stats().tiers] == [1, 1]
        assert record_of(store.tiers[0].store, key(1)) == slow_record


def test_what_is_prefetched_is_encoded_as_it_was(tmp_path):
    urls = [with_codec(url, "int8") for url in ("memory", f"file://{tmp_path}/kv")]
    with open_store(urls[1], capacity_bytes=CAPACITY) as slow:
        put_kv(slow, 1)
        slow_record = record_of(slow, key(1))
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        store.prefetch([PrefetchRequest(key(1), kv_payload(1).nbytes)], within_s=TIMEOUT_S)
        eventually(lambda: store.stats().prefetches[PrefetchOutcome.FETCHED] == 1)
        assert record_of(store.tiers[0].store, key(1)) == slow_record


# The link.


@pytest.mark.parametrize("name", [None, "zstd", "int8"])
def test_a_link_carries_what_is_stored(name, monkeypatch):
    carried = []

    class Seen(LinkSchedule):
        def submit(self, num_bytes, *, now_s, priority=0):
            carried.append(num_bytes)
            return super().submit(num_bytes, now_s=now_s, priority=priority)

    monkeypatch.setattr("cacheflow.stores.throttled.LinkSchedule", Seen)
    with ThrottledStore(memory(name), 1e12) as link:
        for number in range(6):
            put_kv(link, number)
            assert get_kv(link, number)[0] is OK
        stats = link.stats()
        assert carried == [sum(link.stored_bytes([(key(number), RAW_BYTES)])) for number in range(6)]
        assert sum(carried) == stats.used_bytes - 6 * HEADER_BYTES
        assert (sum(carried) < 6 * RAW_BYTES) == (name is not None)
        assert stats.read_bytes == 6 * RAW_BYTES  # what is delivered


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_a_probe_goes_through_the_codec(dtype):
    shares = {}
    for name in (None, "zstd", "int8", "fp8"):
        with memory(name) as store:
            link = measure_link(store, object_bytes=65536, num_objects=4, rounds=1, dtype=dtype)
            assert link.bytes_per_s > 0
            shares[name] = stored_share(store, object_bytes=65536, dtype=dtype)
            assert store.stats().num_objects == 0
    assert shares[None] == 1.0
    assert 0.5 < shares["zstd"] < 0.97  # not zeros
    assert shares["int8"] == pytest.approx(0.5 if dtype != "float32" else 0.25, rel=0.1)


# Any bytes at all.


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(st.binary(min_size=1, max_size=2000), st.just(None)),
    number=st.sampled_from([1, 2, 3, 77]),
    raw_bytes=st.sampled_from([RAW_BYTES, RAW_BYTES - 2, 1 << 60]),
    shape=st.one_of(st.just(SHAPE), st.lists(st.integers(0, 1 << 40), max_size=8).map(tuple)),
    dtype=st.sampled_from(["bfloat16", "float32", "uint8", "x"]),
    axes=st.integers(0, 255),
)
def test_any_bytes_with_a_right_checksum_are_no_danger(data, number, raw_bytes, shape, dtype, axes):
    """Random encoded bytes: an outcome and nothing raised, and nothing written beside the buffer (see ``get_kv``)."""
    codec_of("zstd")
    own = next((codec for codec in codecs.CODECS if codec.number == number and codec.lossy), None)
    with memory(own.name if own else None) as store:
        if data is None:
            put_kv(store, 1)
            data = bytes(record_of(store, key(1))[HEADER_BYTES:])[: RAW_BYTES // 2 + 1]
        header = bytearray(HEADER_BYTES)
        token_axes = tuple(axis for axis in range(len(shape)) if axes >> axis & 1)
        encode_header(memoryview(header), key(1), [memoryview(data)], shape=shape, dtype=dtype, token_axes=token_axes,
                      encoding=Encoding(codec=number, raw_bytes=raw_bytes))  # fmt: skip
        put_back(store, key(1), bytes(header) + data)
        outcome, _ = get_kv(store, 1)
        assert outcome in (OK, MISS, CORRUPT, LoadOutcome.ERROR)
        assert outcome is not OK or raw_bytes == RAW_BYTES
        assert (outcome is MISS) == (number == 77 and raw_bytes == RAW_BYTES)


def test_verify_knows_encoded_records(tmp_path):
    url = f"file://{tmp_path}/kv"
    with open_store(with_codec(url, "zstd"), capacity_bytes=CAPACITY) as store:
        put_kv(store, 1)
        put_kv(store, 2)
        DAMAGES["bit flip"](store, key(2), key(1))
    with open_store(url, capacity_bytes=CAPACITY) as store:
        said = {each.name: check_record(store, each, on_error=print) for each in store.scan({})}
    assert said == {key(1).name: OK, key(2).name: CORRUPT}
