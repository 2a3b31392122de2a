"""``cacheflow store``: what an operator sees of a store, and what is left of it."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cacheflow import cli
from cacheflow.errors import ConfigError
from cacheflow.stores import probe
from cacheflow.stores.file import FileStore
from cacheflow.stores.identity_record import write_identity
from cacheflow.stores.keys import ObjectKey, ObjectKind, Shard, key_of
from cacheflow.stores.opening import open_store
from cacheflow.stores.retention import Retention
from cacheflow.stores.shared import FoundRecord
from cacheflow.stores.shm import shm_folder
from cacheflow.stores.upkeep import garbage, open_existing, records_of
from cacheflow.types import LoadOutcome
from support.store_kinds import SHARED, left_behind, shm_url, url_of
from support.store_objects import NAMESPACE, TIMEOUT_S, get, key, put

CAPACITY = 1 << 24


@pytest.fixture(params=SHARED)
def url(request, tmp_path):
    """A store of ten objects."""
    url = url_of(request.param, request, tmp_path / "store")
    with open_store(left_behind(url), capacity_bytes=CAPACITY) as store:
        put(store, *range(10))
    return url


@pytest.fixture
def file_url_of_ten(tmp_path, request):
    url = url_of("file", request, tmp_path / "store")
    with open_store(url, capacity_bytes=CAPACITY) as store:
        put(store, *range(10))
    return url


@pytest.fixture
def said(capsys):
    def run(*words, code=0):
        capsys.readouterr()
        assert cli.main(["store", *map(str, words)]) == code
        return capsys.readouterr().out

    return run


def held(url):
    with open_store(url, capacity_bytes=CAPACITY, only_look=True) as store:
        return [number for number in range(20) if store.contains([key(number)])[0]]


def flip(url, number):
    """Damage one record."""
    from cacheflow.stores.upkeep import open_existing

    with open_existing(url, only_look=True) as store:
        record = bytearray(4096 + 1000)
        view = memoryview(record)
        store.read_record(key(number), view[:4096], view[4096:])
        record[5000] ^= 1
        store.write_whole(key(number).name, (view[:4096], view[4096:]), replace=True)


def test_stat_shows_objects_by_namespace_and_what_it_stands_for(url, said):
    with open_store(url, capacity_bytes=CAPACITY, only_look=True) as store:
        write_identity(store, NAMESPACE.digest, NAMESPACE.parts(), timeout_s=20.0)
    shown = said("stat", url)
    assert re.search(rf"{NAMESPACE.digest} +11 ", shown)
    assert "dtype=bfloat16 chunk_tokens=4" in shown
    assert re.search(r"all +11 ", shown)
    assert held(url) == list(range(10))
    assert re.search(r"all +0 ", said("stat", url, "--namespace", "beef"))


def test_stat_says_what_a_killed_measurement_left(file_url_of_ten, said, monkeypatch):
    monkeypatch.setattr(probe, "_delete", lambda store, keys: None)
    said("bench", file_url_of_ten, "--mib", "0.1", "--objects", 2, "--rounds", 1)
    assert re.search(rf"{probe.PROBES} +4 .* probes of a measurement", said("stat", file_url_of_ten))
    said("gc", file_url_of_ten, "--namespace", probe.PROBES)
    assert held(file_url_of_ten) == list(range(10))
    assert probe.PROBES not in said("stat", file_url_of_ten)


@pytest.mark.parametrize("kind", SHARED)
def test_stat_says_what_is_kept_and_when_the_first_goes_by_itself(kind, request, tmp_path, said):
    url, retention = url_of(kind, request, tmp_path / "store"), Retention(ttl_s=3 * 3600.0)
    with open_store(left_behind(url), capacity_bytes=CAPACITY, retention=retention) as store:
        put(store, 1, 2, 3)
        store.pin([key(1), key(2)], ttl_s=7 * 86400.0)
    kept = "2" if kind in ("file", "shm") else ""
    goes = "3 h" if kind in ("redis", "rediss") else ""
    (line,) = [each for each in said("stat", url).splitlines() if each.lstrip().startswith(NAMESPACE.digest)]
    columns = [each.strip() for each in re.split(r"  +", line.strip())]
    assert [each for each in columns if each in ("2", "3 h", "7 d")] == [each for each in (kept, goes) if each]


def test_stat_shows_each_tier(file_url_of_ten, said, tmp_path):
    other = f"file://{tmp_path}/other"
    with open_store(other, capacity_bytes=CAPACITY) as store:
        put(store, 1, 2)
    shown = said("stat", file_url_of_ten, other)
    assert re.search(r"all +10 .*all +2 ", shown, re.S)
    said("stat", other, other, code=2)


def test_verify_finds_every_damaged_record_and_removes_it_when_asked(url, said):
    assert "10 records are whole, 0 damaged" in said("verify", url)
    flip(url, 3)
    flip(url, 7)
    shown = said("verify", url, code=1)
    assert "8 records are whole, 2 damaged" in shown
    assert {each.strip() for each in re.findall(r"damaged: (.*)", shown)} == {key(3).name, key(7).name}
    assert len(held(url)) == 10
    assert "removed the damaged ones" in said("verify", url, "--delete", code=1)
    assert held(url) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert "8 records are whole, 0 damaged" in said("verify", url)


@pytest.mark.parametrize("kind", ["file", "shm"])
def test_looking_at_files_leaves_their_age(kind, request, tmp_path, said):
    url = url_of(kind, request, tmp_path / "store")
    folder = shm_folder(url.removeprefix("shm://")) if kind == "shm" else tmp_path / "store"
    with open_store(left_behind(url), capacity_bytes=CAPACITY) as store:
        put(store, *range(10))
        write_identity(store, NAMESPACE.digest, NAMESPACE.parts(), timeout_s=20.0)
    old_s = time.time() - 10 * 86400
    for path in folder.glob("objects/*/*/*"):
        os.utime(path, (old_s, old_s))
    assert "11 records are whole" in said("verify", url)
    said("bench", url, "--mib", "0.1", "--objects", 2, "--rounds", 1)
    for _ in range(2):
        assert re.search(rf"{NAMESPACE.digest} +11 .* 10 d +10 d ", said("stat", url))
    assert "removed 11 of 11 objects" in said("gc", url, "--older-than", "7d")


def test_stat_does_not_take_the_start_of_an_engine_for_a_use(file_url_of_ten, tmp_path, said):
    old_s = time.time() - 10 * 86400
    for path in (tmp_path / "store").glob("objects/*/*/*"):
        os.utime(path, (old_s, old_s))
    with open_store(file_url_of_ten, capacity_bytes=CAPACITY) as store:
        write_identity(store, NAMESPACE.digest, NAMESPACE.parts(), timeout_s=20.0)
    assert re.search(rf"{NAMESPACE.digest} +11 .* 10 d +10 d ", said("stat", file_url_of_ten))


def test_gc_by_size_keeps_what_fits(url, said):
    assert "would remove" in said("gc", url, "--max-bytes", "30KB", "--dry-run")
    assert len(held(url)) == 10
    shown = said("gc", url, "--max-bytes", "30KB")
    left = held(url)
    assert 4 <= len(left) <= 5
    assert f"removed {10 - len(left)} of 10 objects" in shown


def test_gc_by_namespace(url, said):
    assert "removed 0 of 0 objects" in said("gc", url, "--namespace", "beef")
    assert "removed 10 of 10 objects" in said("gc", url, "--namespace", NAMESPACE.digest[:8])
    assert held(url) == []


def test_gc_by_age(file_url_of_ten, tmp_path, said):
    old_s = time.time() - 10 * 86400
    for number in (2, 5):
        (path,) = tmp_path.glob(f"store/objects/*/*/*{number:064x}*")
        os.utime(path, (old_s, old_s))
    assert "removed 2 of 10 objects" in said("gc", file_url_of_ten, "--older-than", "7d")
    assert held(file_url_of_ten) == [0, 1, 3, 4, 6, 7, 8, 9]
    assert "removed 0 of 8 objects" in said("gc", file_url_of_ten, "--older-than", "7d")


def test_clear_asks_first(url, said, refused):
    assert "holds 10 objects" in refused("store", "clear", url)
    assert len(held(url)) == 10
    assert "removed 10 objects" in said("clear", url, "--yes")
    if url.startswith("shm"):
        assert not shm_folder(url.removeprefix("shm://")).exists()
    else:
        assert held(url) == []


def test_bench_measures_and_leaves_nothing(url, said):
    shown = said("bench", url, "--mib", "0.25,0.5", "--objects", 4, "--rounds", 1)
    assert re.search(r"0\.25 MiB .*B/s", shown)
    assert re.search(r"0\.5 MiB .*B/s", shown)
    with open_store(url, capacity_bytes=CAPACITY, only_look=True) as store:
        assert store.stats().num_objects == 10


def test_bench_leaves_no_store_where_there_was_none(said, request):
    url = shm_url(request)
    assert "MiB" in said("bench", url, "--mib", "0.1", "--objects", 2)
    assert not shm_folder(url.removeprefix("shm://")).exists()


def test_bench_throws_nothing_out(file_url_of_ten, said, refused, monkeypatch):
    words = ("--mib", "0.1", "--objects", 4, "--rounds", 1)
    said("bench", f"{file_url_of_ten}?capacity=20KB", *words)
    assert held(file_url_of_ten) == list(range(10))
    monkeypatch.setattr(FileStore, "free_bytes", lambda store: 300_000)
    message = refused("store", "bench", file_url_of_ten, *map(str, words))
    assert "the probes need 0.6 MB, 0.3 MB are free" in message
    assert held(file_url_of_ten) == list(range(10))


def test_verify_says_why_records_cannot_be_read(file_url_of_ten, said, monkeypatch):
    monkeypatch.setattr(FileStore, "read_record", _fails)
    shown = said("verify", file_url_of_ten, code=1)
    assert "0 damaged, 10 could not be read" in shown
    assert "10 could not be read: Stale file handle" in shown


def _fails(*_):
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("num_signals", [1, 200])
def test_a_bench_that_is_terminated_leaves_nothing(file_url_of_ten, num_signals):
    words = ["store", "bench", file_url_of_ten, "--mib", "0.1", "--rounds", "2000"]
    with subprocess.Popen([sys.executable, "-m", "cacheflow.cli", *words]) as process:
        try:
            until_s = time.monotonic() + TIMEOUT_S
            while _num_records(file_url_of_ten) < 40:
                assert process.poll() is None
                assert time.monotonic() < until_s, "it writes nothing"
            for _ in range(num_signals):  # some send it to the process, and to its group as well
                process.terminate()
                time.sleep(0 if num_signals == 1 else 1e-4)
            assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert held(file_url_of_ten) == list(range(10))
    assert _num_records(file_url_of_ten) == 10


def _num_records(url):
    with open_existing(url, only_look=True) as store:
        return len(records_of(store))


def test_bench_of_memory(said):
    assert "MiB" in said("bench", "memory", "--mib", "0.1", "--objects", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stat", "memory"), "a memory store is its process's own"),
        (("stat", "file:///no/such/folder"), "there is no store file:///no/such/folder"),
        (("stat", "shm://no-such-store"), "there is no store shm://no-such-store"),
        (("clear", "--yes", "file:///proc/self"), "/proc/self is no folder of records"),
        (("stat", "tape://1"), "no store is called 'tape'"),
        (("stat", "file:///x", "--namespace", "XYZ"), "--namespace 'XYZ' must be the beginning of a namespace"),
        (("gc", "file:///x"), "what is to go?"),
        (("gc", "file:///x", "--older-than", "a week"), "must be a duration such as 90s, 30m, 12h or 7d"),
        (("gc", "file:///x", "--max-bytes", "much"), "must be a size such as 4GiB, 500MB or 1000000, above 0"),
        (("gc", "file:///x", "--max-bytes", "0"), "`cacheflow store clear` removes all"),
        (("bench", "memory", "--mib", "0"), "--mib 0.0 must be above 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(refused, words, message):
    assert message in refused("store", *words)


def test_a_folder_that_another_user_closed(tmp_path, refused, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", closed)  # as root, whom nothing is closed to, the tests may run
    said = refused("store", "stat", (tmp_path / "kv").as_uri())
    assert f"store file://{tmp_path}/kv cannot be looked at: [Errno 13] Permission denied" in said
    assert "run this as the user whose processes write it" in said


def test_garbage_is_the_least_recently_used_beyond_the_bound():
    records = [FoundRecord(f"{number}", 10, float(number)) for number in (3, 1, 2)]

    def chosen(**options):
        asked = {"now_s": 10.0, "older_than_s": None, "max_bytes": None} | options
        return [each.name for each in garbage(records, **asked)]

    assert chosen(max_bytes=30) == []
    assert chosen(max_bytes=29) == ["1"]
    assert chosen(max_bytes=0) == ["1", "2", "3"]
    assert chosen(older_than_s=7.5) == ["1", "2"]
    assert chosen(older_than_s=8.5, max_bytes=15) == ["1", "2"]
    assert sorted(chosen()) == ["1", "2", "3"]


def test_a_key_comes_back_from_its_name():
    shard = Shard(tp_rank=1, tp_size=2, pp_rank=3, pp_size=4)
    for one in (
        key(5),
        ObjectKey(namespace=NAMESPACE.digest, chain_hash="ab" * 32, kind=ObjectKind.STATE, layer_lo=3, layer_hi=7,
                  shard=shard),
    ):  # fmt: skip
        assert key_of(one.name) == one
    for bad in ("", "x", key(5).name + "0x", key(5).name.replace("_kv_", "_vk_")):
        with pytest.raises(ConfigError, match=r"is not the name of an object|is of an unknown kind"):
            key_of(bad)


def test_a_repaired_store_serves(url, said):
    flip(url, 3)
    said("verify", url, "--delete", code=1)
    with open_store(url, capacity_bytes=CAPACITY, only_look=True) as store:
        assert get(store, 3)[0] is LoadOutcome.MISS
        put(store, 3)
        assert get(store, 3)[0] is LoadOutcome.OK
