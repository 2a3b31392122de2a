"""``cacheflow bench stores`` through the command line, on every store that there is."""

from collections import Counter
from contextlib import closing

import pytest

from cacheflow import cli
from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.bench.stores.objects import Objects, check
from cacheflow.bench.stores.rivals import PreadvWay, rivals_of
from cacheflow.bench.stores.study import CHECKSUM, OURS, UNVERIFIED
from cacheflow.bench.stores.unverified import UnverifiedStore
from cacheflow.bench.stores.ways import StoreWay
from cacheflow.errors import StoreError
from cacheflow.stores.base import GetRequest
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.shm import shm_folder
from cacheflow.stores.url import StoreUrl, file_url
from cacheflow.types import LoadOutcome
from support.damage import flip_a_bit
from support.servers import PASSWORD, running_redis
from support.store_kinds import ALL, url_of

CAPACITY = 1 << 26
QUICK = ("--mib", "0.125,0.25", "--total-mib", "1", "--seconds", "0.001", "--repeats", "2")
LINK = 10e9 / 8
OWN = {(OURS, None), (UNVERIFIED, None), (CHECKSUM, None), (OURS, LINK), (UNVERIFIED, LINK)}


@pytest.fixture
def bench(tmp_path, capsys):
    """Runs the command in one folder; the exit code, the records so far, and what was printed."""

    def run(*options, out=tmp_path / "out"):
        code = cli.main(["bench", "stores", "--out", str(out), *map(str, options)])
        results = out / "results.jsonl"
        return code, read_records(results, StoreReadRecord) if results.exists() else [], capsys.readouterr().out

    return run


@pytest.mark.parametrize("kind", ALL)
def test_every_store_is_read_by_turns_and_left_as_it_was(kind, request, tmp_path, bench):
    url = url_of(kind, request, tmp_path / "store")
    code, records, shown = bench("--store", url, *QUICK)
    assert code == 0
    assert all(each.correct and each.store == kind for each in records)
    turns = Counter((e.object_bytes, e.repeat, e.way, e.reads_in_flight, e.link_bytes_per_s) for e in records)
    assert max(turns.values()) == 1
    ways = {(way, link) for _, _, way, _, link in turns}
    assert len(turns) == 2 * 2 * (len(ways) + 2 * (kind == "redis"))
    rivals = {way for way, _ in ways - OWN}
    assert ways >= OWN
    if kind in ("file", "shm"):
        assert rivals == {"preadv"}
    elif kind == "redis":
        assert rivals in ({"RESP", "redis-py"}, {"RESP", "redis-py + hiredis"})
    else:
        assert rivals == set()
    for each in records:
        num_objects = 8 if each.object_bytes == 1 << 17 else 4
        assert each.num_objects == num_objects
        assert each.read_bytes % (num_objects * each.object_bytes) == 0
    assert f"{kind} store, objects of 0.125 MiB: 2 runs" in shown
    if kind == "shm":
        assert not shm_folder(StoreUrl.parse(url).host).exists()
    else:
        with open_store(url, capacity_bytes=CAPACITY) as store:
            assert store.stats().num_objects == 0


def test_several_stores_are_measured_one_after_the_other_and_nothing_twice(bench, tmp_path):
    stores = ("--store", "memory", "--store", file_url(tmp_path / "store"))
    _, first, _ = bench(*stores, *QUICK)
    assert list(dict.fromkeys(each.store for each in first)) == ["memory", "file"]
    code, second, shown = bench(*stores, *QUICK)
    assert code == 0
    assert second == first
    assert "are not run again" in shown
    _, third, _ = bench(*stores, *QUICK, "--repeats", 3)
    assert third[: len(first)] == first
    assert {each.repeat for each in third[len(first) :]} == {2}


def test_ways_take_turns_in_another_order_each_time(bench):
    _, records, _ = bench("--store", "memory", *QUICK, "--mib", 0.25)
    orders = [[(e.way, e.link_bytes_per_s) for e in records if e.repeat == repeat] for repeat in (0, 1)]
    assert orders[1] == [*orders[0][1:], orders[0][0]]


def test_a_way_that_reads_something_else_is_wrong_and_shows_no_speed(bench, tmp_path, monkeypatch):
    read_one = PreadvWay.read_one

    def flipped(self, index, thread):
        found = read_one(self, index, thread)
        if index == 3:
            found[7] ^= 1
        return found

    monkeypatch.setattr(PreadvWay, "read_one", flipped)
    code, records, shown = bench("--store", file_url(tmp_path / "store"), *QUICK, "--mib", 0.25)
    assert code == 1
    assert {each.way for each in records if not each.correct} == {"preadv"}
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("preadv")]
    assert row.split() == ["preadv", "3", "wrong", "–", "–", "no,", "2", "of", "2"]


def test_without_verification_damage_is_not_seen_and_that_is_all_the_difference(tmp_path):
    objects = Objects(num_objects=4, num_bytes=10_000)
    with open_store(file_url(tmp_path), capacity_bytes=CAPACITY) as store, UnverifiedStore(store) as unverified:
        objects.write(store)
        assert check(StoreWay(unverified, objects, num_reads=2).read_all, objects)
        flip_a_bit(store, objects.keys[1], objects.keys[2])
        buffer = bytearray(10_000)
        for each, outcome in ((store, LoadOutcome.CORRUPT), (unverified, LoadOutcome.OK)):
            (found,) = each.submit_get([GetRequest(objects.keys[1], buffer)]).wait(30.0)
            assert found is outcome
        assert not check(StoreWay(unverified, objects, num_reads=2).read_all, objects)
        with pytest.raises(StoreError, match="object 1 of 10000 bytes: its read ended as corrupt"):
            check(StoreWay(store, objects, num_reads=2).read_all, objects)


@pytest.mark.parametrize("fault", [Fault.MISS, Fault.ERROR, Fault.CORRUPT])
def test_a_read_that_fails_ends_the_study(fault, tmp_path):
    objects = Objects(num_objects=5, num_bytes=1000)
    plan = FaultPlan(rules=(FaultRule(fault=fault, every=4),))
    with FaultyStore(open_store("memory", capacity_bytes=CAPACITY), plan) as store:
        objects.write(store)
        with pytest.raises(StoreError, match=f"object 3 of 1000 bytes: its read ended as {fault.value}"):
            check(StoreWay(store, objects, num_reads=3).read_all, objects)


def test_objects_that_cannot_be_written_end_it(tmp_path):
    objects = Objects(num_objects=5, num_bytes=1000)
    plan = FaultPlan(rules=(FaultRule(fault=Fault.PUT_ERROR, every=4),))
    with (
        FaultyStore(open_store("memory", capacity_bytes=CAPACITY), plan) as store,
        pytest.raises(StoreError, match="1 of 5 objects of 1000 bytes could not be written"),
    ):
        objects.write(store)


def test_other_clients_give_the_password_and_read_what_we_wrote(tmp_path, redis_password):
    objects = Objects(num_objects=5, num_bytes=70_000)
    with running_redis(tmp_path) as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD)
        url = server.url.replace("/0", "/3")
        with open_store(url, capacity_bytes=CAPACITY) as store:
            objects.write(store)
            for _, way in rivals_of(StoreUrl.parse(url), objects, num_reads=2):
                with closing(way):
                    assert check(way.read_all, objects)
            store.delete(objects.keys[3:4])
            for _, way in rivals_of(StoreUrl.parse(url), objects, num_reads=2):
                with closing(way), pytest.raises(StoreError, match="70000 bytes"):
                    check(way.read_all, objects)


def test_a_server_that_refuses_the_other_client_is_one_line(tmp_path, redis_password, refused, monkeypatch):
    from cacheflow.bench.stores import rivals

    monkeypatch.setattr(rivals.RespWay, "introduce", staticmethod(_refused_at_the_door))
    with running_redis(tmp_path) as server:
        monkeypatch.delenv("CACHEFLOW_REDIS_PASSWORD")
        said = refused("bench", "stores", "--out", tmp_path / "out", "--store", server.url, *QUICK)
        assert "another client cannot read from it: go away" in said
        with server.client() as client:
            assert client.dbsize() == 0


def _refused_at_the_door(connection, url):
    raise OSError("go away")


BAD = {
    "unknown store": (("--store", "tape"), "store is 'tape', must be a URL"),
    "two of a kind": (("--store", "file:///a", "--store", "file:///b"), "two are of file"),
    "no size": (("--store", "memory", "--mib", "0"), "--mib 0.0 must be above 0"),
    "no reads": (("--store", "memory", "--reads", "0"), "--reads is 0, must be at least 1"),
    "no link": (("--store", "memory", "--gbps", "inf"), "--gbps is inf, must be above 0 and finite"),
    "no length": (("--store", "memory", "--seconds", "0"), "--seconds is 0.0, must be above 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=list(BAD))
def test_bad_options_are_one_line(options, message, refused, tmp_path):
    assert message in refused("bench", "stores", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out" / "results.jsonl").exists()
