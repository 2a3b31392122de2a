"""Stores by URL: each scheme opens its store, a bad URL is refused with a sentence, other packages add schemes."""

import logging
import sys

import pytest

from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.base import Capabilities, PutOutcome
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import check_store_url, open_store, opener_of
from cacheflow.stores.url import FORMS, StoreUrl, file_url
from cacheflow.types import LoadOutcome
from support.documented_store import documented_source
from support.store_kinds import ALL
from support.store_objects import get, put

CAPACITY = 1 << 20


def test_memory():
    with open_store("memory", capacity_bytes=CAPACITY) as store:
        assert isinstance(store, MemoryStore)
        assert store.capabilities().capacity_bytes == CAPACITY


@pytest.mark.parametrize("verify", ["always", "never", "0", "0.5", "1"])
def test_memory_that_says_what_is_verified(verify):
    with open_store(f"memory?verify={verify}", capacity_bytes=CAPACITY) as store:
        assert isinstance(store, MemoryStore)
    assert [url.scheme for url in check_store_url(f"memory?verify={verify}")] == ["memory"]


def test_a_file_store_is_where_the_url_says_and_quoted_names_are_unquoted(tmp_path):
    folder = tmp_path / "kv of #1, 100 %"
    for url in (file_url(folder), file_url(folder) + "?fsync=yes"):
        with open_store(url, capacity_bytes=CAPACITY) as store:
            assert isinstance(store, FileStore)
            assert put(store, 1)[0] in (PutOutcome.STORED, PutOutcome.EXISTS)
            assert get(store, 1)[0] is LoadOutcome.OK
    assert list(folder.glob("objects/*/*/*"))


def test_a_relative_folder_is_one_of_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (url,) = check_store_url(file_url(tmp_path.relative_to(tmp_path) / "kv"))
    assert url.path == str(tmp_path / "kv")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be a URL: memory, file:///folder"),
        ("disk", "store is 'disk', must be a URL"),
        ("/var/cache/kv", "store is '/var/cache/kv', must be a URL"),
        ("memory://", "the memory store has no address"),
        ("memory://x?y=1", "the memory store has no address"),
        ("memory?fsync=yes", "unknown option fsync of a memory store; known: verify"),
        ("memory?verify=2", "verify is '2', must be always, never, or a share from 0 to 1"),
        ("memory?verify=", "verify is '', must be"),
        ("file:/kv", "must be a URL"),
        ("file://kv", "must be file:///absolute/folder"),
        ("file://", "must be file:///absolute/folder"),
        ("file:///", "must be file:///absolute/folder"),
        ("file:///kv?sync=yes", "unknown option sync of a file store; known: fsync"),
        ("file:///kv?fsync=1", "fsync is '1', must be yes or no"),
        ("file:///kv?fsync=yes&fsync=no", "an option repeats"),
        ("file:///kv#1", "a part after #"),
        ("memory?fsync=yes", "unknown option fsync of a memory store; known: verify, capacity"),
        ("memory?capacity=much", "capacity is 'much', must be a size such as 4GiB"),
        ("file:///kv?capacity=0", "capacity is '0', must be a size"),
        ([], "no URL was given"),
        (["memory", "file:///kv", "file:///kv?fsync=yes"], "'file:///kv' and 'file:///kv?fsync=yes' are one store"),
        (["memory", "disk"], "store is 'disk', must be a URL"),
        ("tape://drive/1", "no store is called 'tape'; known are memory, file:///folder"),
        ("http://[::1/kv", "not a URL"),
        ("redis://a..b:1", "host is no name of a server"),
        ("redis://b%ffx", "host is no name of a server"),
        (f"mooncake://{'a' * 70}", "host is no name of a server"),
        (["file:///a@x", "file:///b@x"], "two tiers are shown as file:...@x"),
        ("http://host:port/kv", "not a URL (Port could not be cast"),
    ],
)
def test_a_bad_url_is_refused_with_what_is_allowed(url, said):
    for check in (check_store_url, lambda each: open_store(each, capacity_bytes=CAPACITY)):
        with pytest.raises(ConfigError) as raised:
            check(url)
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("memory", "memory?capacity=1GiB"),
        ("file:///kv", "file:///kv/"),
        ("file:///kv", "FILE:////./kv//?fsync=yes"),
        ("file:///k%76", "file:///kv"),
        ("shm://kv", "shm://kv/"),
        ("redis://host", "redis://me@HOST:6379/0?timeout_s=1"),
        ("redis://[::1]/", "redis://[::1]:6379/00"),
        ("mooncake://host", "mooncake://host:50051"),
        ("s3://bucket/kv", "s3://bucket/kv/"),
    ],
)
def test_one_store_written_in_two_ways_is_refused_as_two_tiers(one, other):
    for pair in ((one, other), (other, one)):
        with pytest.raises(ConfigError) as raised:
            check_store_url(["shm://else", *pair])
        first, second = map(StoreUrl.parse, pair)
        assert f"'{first}' and '{second}' are one store; each tier must be a store of its own" in str(raised.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("file:///kv", "file:///KV"),
        ("file:///kv", "file:///kv/kv"),
        ("shm://kv", "file:///kv"),
        ("redis://host", "redis://host/1"),
        ("redis://host", "rediss://host:6380"),
        ("s3://bucket/kv", "s3://bucket/KV"),
        ("s3://bucket/kv", "s3://Bucket/kv"),
        ("file:///link/../kv", "file:///kv"),  # what the link leads to may have another parent
        ("file:///a%40x", "file:///b%40x"),
    ],
)
def test_what_looks_alike_and_is_not_one_store_is_two_tiers(one, other):
    assert [str(url) for url in check_store_url([one, other])] == [one, other]


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("5000", 5000), ("2MB", 2_000_000), ("1.5GiB", 3 << 29), ("64kib", 64 << 10)]
)
def test_a_store_may_have_a_capacity_of_its_own(text, num_bytes, tmp_path):
    for url in (f"memory?capacity={text}", f"{file_url(tmp_path)}?fsync=no&capacity={text}"):
        with open_store(url, capacity_bytes=CAPACITY) as store:
            assert store.capabilities().capacity_bytes == num_bytes


def test_several_urls_are_tiers_and_each_says_its_capacity(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    urls = ["memory?capacity=1MiB", file_url(tmp_path / "kv")]
    with open_store(urls, capacity_bytes=CAPACITY) as store:
        assert [tier.name for tier in store.tiers] == ["memory", file_url(tmp_path / "kv")]
    assert f"memory of 1048576 bytes, over file://{tmp_path}/kv of {CAPACITY} bytes" in caplog.text


def test_a_tier_that_cannot_be_opened_leaves_none_open(tmp_path):
    (tmp_path / "kv").write_text("no folder")
    with pytest.raises(StoreError):
        open_store(["memory", file_url(tmp_path / "kv")], capacity_bytes=CAPACITY)


def test_checking_touches_nothing(tmp_path):
    check_store_url(file_url(tmp_path / "kv"))
    assert not list(tmp_path.iterdir())


def test_a_password_in_a_url_is_refused_and_not_repeated(caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match="set the environment variable") as raised:
        check_store_url("file://user:hunter2@host/kv")
    assert "hunter2" not in str(raised.value) + caplog.text


def test_every_url_that_messages_show_opens_a_store():
    schemes = {form.partition(":")[0] for form in FORMS.split(", ")}
    assert schemes == {*ALL, "lmcache"}
    assert all(opener_of(scheme) for scheme in schemes)


# Of other packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a module with an entry point, as pip would."""

    def install(source, scheme):
        name = f"{scheme}_store"
        (tmp_path / f"{name}.py").write_text(source)
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[cacheflow.stores]\n{scheme} = {name}:opener\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_the_documented_store_of_another_package(package, tmp_path):
    assert sum(bool(line.strip()) for line in documented_source().splitlines()) <= 40
    package(documented_source(), "sqlite")
    url = f"sqlite://{tmp_path}/kv.db"
    with open_store(url, capacity_bytes=CAPACITY) as store:
        assert put(store, 1) == (PutOutcome.STORED,)
        assert str(store) == f"sqlite store {tmp_path}/kv.db"
        assert store.capabilities() == Capabilities(
            name="sqlite", persistent=True, shared=True, capacity_bytes=CAPACITY, max_parallel_reads=1
        )
    with open_store(url, capacity_bytes=3 * 5096) as store:
        assert get(store, 1)[0] is LoadOutcome.OK
        assert put(store, 2, 3, 4) == (PutOutcome.STORED,) * 3
        assert store.stats().num_objects == 3
    (tmp_path / "kv.txt").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreError, match=r"sqlite store .*kv.txt cannot be used: .*; is it a database of SQLite that"):
        open_store(f"sqlite://{tmp_path}/kv.txt", capacity_bytes=CAPACITY)
    with pytest.raises(StoreError, match=r"kv.db cannot be used: unable to open database file; is it a database"):
        open_store(f"sqlite://{tmp_path}/no-such-folder/kv.db", capacity_bytes=CAPACITY)
    with pytest.raises(ConfigError, match="unknown option wheel of a sqlite store; known: capacity"):
        check_store_url(url + "?wheel=7")
    with pytest.raises(ConfigError, match="and sqlite of other packages"):
        check_store_url("drum://1")


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("raise RuntimeError('no drive')", ConfigError, "tape_store:opener, .* cannot be loaded: no drive"),
        ("", ConfigError, "cannot be loaded"),
        ("def opener(url):\n    return lambda capacity_bytes, retention: 7", StoreError, "which is no Store"),
    ],
)
def test_a_broken_package_is_named(package, source, error, said):
    package(source, "tape")
    with pytest.raises(error, match=said):
        open_store("tape://drive/1", capacity_bytes=CAPACITY)


def test_the_parts_of_a_url():
    url = StoreUrl.parse("Tape://some%20one@Host:99/a%2Fb/c?x=1&y=%20")
    assert (url.scheme, url.username, url.host, url.port) == ("tape", "some one", "Host", 99)
    assert (url.path, dict(url.options)) == ("/a/b/c", {"x": "1", "y": " "})
    with pytest.raises(ConfigError, match="x is '-1', must be seconds"):
        StoreUrl.parse("tape://host?x=-1").seconds("x", 1.0)
    assert url.seconds("x", 9.0) == 1.0
    assert url.seconds("z", 9.0) == 9.0


def test_a_capacity_beyond_every_number_is_refused():
    with pytest.raises(ConfigError, match="capacity is '999"):
        check_store_url(f"memory?capacity={'9' * 400}")
