"""LMCache's L2 adapters: what they break, and what holds all the same."""

import json
import logging
import os
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

import cacheflow.stores.timed_calls as timed_calls
from cacheflow import cli
from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores import lmcache_url as urls
from cacheflow.stores.base import GetRequest, PinOutcome, PutOutcome
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.timed_calls import GivenUpError
from cacheflow.stores.url import StoreUrl
from cacheflow.types import LoadOutcome
from support.manual_clock import ManualClock
from support.servers import PASSWORD, running_redis
from support.store_kinds import lmcache_url
from support.store_objects import TIMEOUT_S, get, key, payload, put
from support.waiting import eventually

CAPACITY = 64 << 20
RECORD = 4096 + 1000
OK, MISS, ERROR, CORRUPT = LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.ERROR, LoadOutcome.CORRUPT
STORED = PutOutcome.STORED
needs_lmcache = pytest.mark.lmcache
ODD = "a\\b'\n\"ü"  # a secret that Python and JSON write otherwise


@pytest.fixture
def files(tmp_path):
    return lmcache_url("fs_native", base_path=str(tmp_path / "kv"))


def file_of(tmp_path, number, part):
    (path,) = (tmp_path / "kv").glob(f"*{key(number).name}@*{part:08x}@*")
    return path


def adapter_alone(url):
    from cacheflow.stores.lmcache_adapter import AdapterSource, LmcacheAdapter

    source = AdapterSource.of(StoreUrl.parse(url).settings, timeout_s=TIMEOUT_S)
    return LmcacheAdapter(source, num_threads=1, clock=time.monotonic)


def until_not_error(store, number):
    """Read until the adapter answers again."""
    for _ in range(1000):
        if (found := get(store, number))[0] is not ERROR:
            return found
        time.sleep(0.01)
    pytest.fail("the adapter does not answer again")


# What adapters break


@needs_lmcache
def test_a_flipped_byte_that_fs_native_returns_as_success_is_found_and_mended(files, tmp_path):
    from cacheflow.stores.lmcache import PREFIX
    from cacheflow.stores.lmcache_adapter import key_of_part

    with open_store(files, capacity_bytes=CAPACITY) as store:
        put(store, 1, 2)
        for part, position in ((1, 500), (0, 100)):
            path = file_of(tmp_path, 1, part)
            data = bytearray(path.read_bytes())
            data[position] ^= 1
            path.write_bytes(data)
            adapter = adapter_alone(files)
            buffer = np.zeros(len(data), np.uint8)
            assert adapter.load(key_of_part(PREFIX + key(1).name, part), buffer, lambda: None), "its own word for it"
            assert buffer.tobytes() == data
            adapter.close()
            assert get(store, 1)[0] is CORRUPT
            assert store.contains([key(1), key(2)]) == (False, True)
            assert put(store, 1) == (STORED,)
            assert get(store, 1)[0] is OK


@needs_lmcache
@pytest.mark.parametrize("num_bytes", [0, 1, 999])
def test_a_payload_cut_short_is_corrupt(files, tmp_path, num_bytes):
    with open_store(files, capacity_bytes=CAPACITY) as store:
        put(store, 1)
        path = file_of(tmp_path, 1, 1)
        path.write_bytes(path.read_bytes()[:num_bytes])
        assert get(store, 1)[0] is CORRUPT
        assert put(store, 1) == (STORED,)
        assert get(store, 1)[0] is OK


@needs_lmcache
@pytest.mark.parametrize("part", [0, 1])
def test_a_record_of_which_a_part_is_gone_is_a_miss_and_written_again(files, tmp_path, part):
    with open_store(files, capacity_bytes=CAPACITY) as store:
        put(store, 1)
        file_of(tmp_path, 1, part).unlink()
        assert store.contains([key(1)]) == (False,)
        assert get(store, 1)[0] is MISS
        assert put(store, 1) == (STORED,)
        assert get(store, 1)[0] is OK


class DropsAfterLookup:
    """An adapter whose record goes between its lookup and its load, as where a server evicts by itself."""

    def __init__(self, adapter, client):
        self.adapter, self.client, self.number = adapter, client, None

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def query_lookup_and_lock_result(self, task):
        bits = self.adapter.query_lookup_and_lock_result(task)
        if bits is not None and self.number is not None:
            for name in self.client.keys(f"*{key(self.number).name}*"):
                self.client.delete(name)
        return bits


@needs_lmcache
def test_what_resp_never_ends_is_not_asked_for_and_given_up_where_it_is(tmp_path):
    """A load of what is not there."""
    from cacheflow.stores.lmcache import LmcacheStore
    from cacheflow.stores.lmcache_adapter import AdapterSource

    with running_redis(tmp_path) as server, server.client() as client:
        settings = {"type": "resp", "host": "127.0.0.1", "port": server.port, "num_workers": 4}
        adapter = DropsAfterLookup(AdapterSource.of(settings, timeout_s=1.0).create(), client)
        source = AdapterSource("resp", lambda: adapter, timeout_s=1.0)
        with LmcacheStore(source, capacity_bytes=CAPACITY) as store:
            put(store, 1, 2)
            assert get(store, 3)[0] is MISS
            adapter.number = 1
            buffer = np.zeros(1000, np.uint8)
            handle = store.submit_get([GetRequest(key(1), buffer)], deadline_s=0.2)
            assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,)
            handle.cancel()  # returns
            adapter.number = None
            assert not buffer.any()
            outcome, found = until_not_error(store, 2)
            assert outcome is OK, "its other connections go on"
            assert np.array_equal(found, payload(2))
            assert get(store, 1)[0] is MISS
            assert not buffer.any()


@needs_lmcache
def test_a_server_that_hangs_costs_time_and_no_buffer_is_touched_after_cancel(tmp_path):
    with running_redis(tmp_path) as server:
        url = lmcache_url("resp", host="127.0.0.1", port=server.port) + "?timeout_s=0.5"
        with open_store(url, capacity_bytes=CAPACITY) as store:
            put(store, *range(6))
            server.process.send_signal(signal.SIGSTOP)
            buffers = [np.zeros(1000, np.uint8) for _ in range(6)]
            requests = [GetRequest(key(number), buffer) for number, buffer in enumerate(buffers)]
            handle = store.submit_get(requests, deadline_s=0.1)
            assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,) * 6
            handle.cancel()
            assert store.contains([key(1)]) == (False,)
            assert put(store, 7) == (PutOutcome.ERROR,)
            server.process.send_signal(signal.SIGCONT)
            outcome, buffer = until_not_error(store, 1)
            assert outcome is OK
            assert np.array_equal(buffer, payload(1))
            assert not any(buffer.any() for buffer in buffers)


@needs_lmcache
def test_closing_while_the_server_hangs_returns(tmp_path):
    with running_redis(tmp_path) as server:
        store = open_store(
            lmcache_url("resp", host="127.0.0.1", port=server.port) + "?timeout_s=0.5", capacity_bytes=CAPACITY
        )
        put(store, 1)
        server.process.send_signal(signal.SIGSTOP)
        handle = store.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
        store.close()
        assert handle.wait(TIMEOUT_S)[0] in (ERROR, LoadOutcome.CANCELLED)
        server.process.send_signal(signal.SIGCONT)


class KeepsQuiet:
    """An adapter that does not say how lookups have ended until a test lets it."""

    def __init__(self, adapter):
        self.adapter, self.says = adapter, True

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def query_lookup_and_lock_result(self, task):
        return self.adapter.query_lookup_and_lock_result(task) if self.says else None

    def num_locks(self):
        return len(self.adapter._locked_keys)  # noqa: SLF001 -- it says so nowhere else


@needs_lmcache
def test_a_lookup_that_was_given_up_leaves_nothing_locked_once_it_has_ended(files):
    from cacheflow.stores.lmcache_adapter import AdapterSource, LmcacheAdapter, key_of_part

    clock = ManualClock()
    quiet = KeepsQuiet(AdapterSource.of(StoreUrl.parse(files).settings, timeout_s=TIMEOUT_S).create())
    adapter = LmcacheAdapter(AdapterSource("fs_native", lambda: quiet, timeout_s=1.0), num_threads=1, clock=clock)
    name = key_of_part("a record", 0)
    adapter.store(name, payload(1), lambda: None)
    quiet.says = False
    with pytest.raises(GivenUpError):
        adapter.lookup([name])
    assert quiet.num_locks() == 1
    quiet.says = True
    clock.sleep(2.0)  # it is asked again
    assert adapter.lookup([name]) == (True,)
    eventually(lambda: quiet.num_locks() == 0)
    adapter.close()


class TellsCollector:
    """An adapter that says what has ended to no thread but the collector's, and there does what a test wants first."""

    def __init__(self, adapter, before=lambda what: None):
        self.adapter, self.before, self.is_closed = adapter, before, threading.Event()

    def __getattr__(self, name):
        return getattr(self.adapter, name)

    def pop_completed_store_tasks(self):
        return self._told("store", self.adapter.pop_completed_store_tasks, {})

    def query_lookup_and_lock_result(self, task):
        return self._told("lookup", lambda: self.adapter.query_lookup_and_lock_result(task), None)

    def query_load_result(self, task):
        return self._told("load", lambda: self.adapter.query_load_result(task), None)

    def _told(self, what, tell, nothing):
        if threading.current_thread().name != "cacheflow-lmcache":
            return nothing
        self.before(what)
        return tell()

    def close(self):
        self.adapter.close()
        self.is_closed.set()


class FailsOnce:
    """Raises the first time that the collector asks for one kind of task."""

    def __init__(self, kind):
        self.kind, self.has_failed = kind, threading.Event()

    def __call__(self, what):
        if what == self.kind and not self.has_failed.is_set():
            self.has_failed.set()
            raise RuntimeError("a failure of the library")


@needs_lmcache
@pytest.mark.parametrize("kind", ["store", "lookup", "load"])
def test_one_failure_of_the_library_costs_what_was_asked_and_no_more(files, kind, caplog):
    from cacheflow.stores.lmcache import LmcacheStore
    from cacheflow.stores.lmcache_adapter import AdapterSource

    with open_store(files, capacity_bytes=CAPACITY) as store:
        put(store, 1)
    adapter = TellsCollector(AdapterSource.of(StoreUrl.parse(files).settings, timeout_s=1.0).create())
    with LmcacheStore(AdapterSource("fs_native", lambda: adapter, timeout_s=1.0), capacity_bytes=CAPACITY) as store:
        adapter.before = FailsOnce(kind)
        assert get(store, 1)[0] in (OK, ERROR)
        outcome, buffer = until_not_error(store, 1)
        assert outcome is OK
        assert adapter.before.has_failed.is_set()
        assert np.array_equal(buffer, payload(1))
    assert caplog.text.count("raised on the question what has ended") == 1


@needs_lmcache
def test_an_event_that_cannot_be_read_any_more_ends_no_others(files, caplog):
    from cacheflow.stores.lmcache_adapter import AdapterSource, LmcacheAdapter, key_of_part

    adapter = TellsCollector(AdapterSource.of(StoreUrl.parse(files).settings, timeout_s=TIMEOUT_S).create())
    read_fd, adapter.broken_fd = os.pipe()
    os.close(read_fd)
    adapter.get_store_event_fd = lambda: adapter.broken_fd
    alone = LmcacheAdapter(
        AdapterSource("fs_native", lambda: adapter, timeout_s=TIMEOUT_S), num_threads=1, clock=time.monotonic
    )
    assert alone.lookup([key_of_part("none", 0)]) == (False,)
    alone.close()
    os.close(adapter.broken_fd)
    assert caplog.text.count("one of its three events cannot be read any more (Bad file descriptor)") == 1


@needs_lmcache
def test_closing_an_adapter_that_hangs_over_what_has_ended_returns(files, monkeypatch, caplog):
    from cacheflow.stores.lmcache_adapter import AdapterSource, LmcacheAdapter, key_of_part

    hangs, lets_go = threading.Event(), threading.Event()

    def hang(what):
        hangs.set()
        lets_go.wait()

    monkeypatch.setattr(timed_calls, "CLOSE_TIMEOUT_S", 0.01)
    adapter = TellsCollector(AdapterSource.of(StoreUrl.parse(files).settings, timeout_s=TIMEOUT_S).create(), hang)
    alone = LmcacheAdapter(
        AdapterSource("fs_native", lambda: adapter, timeout_s=1.0), num_threads=1, clock=time.monotonic
    )

    def look_up():
        with suppress(GivenUpError):  # or the answer comes before it sees that the adapter is closed
            alone.lookup([key_of_part("none", 0)])

    threads = [threading.Thread(target=each, daemon=True) for each in (look_up, alone.close)]
    threads[0].start()
    assert hangs.wait(TIMEOUT_S)
    threads[1].start()
    threads[1].join(TIMEOUT_S)
    has_returned = not threads[1].is_alive()
    lets_go.set()
    assert has_returned
    assert "hangs and was left behind" in caplog.text
    assert adapter.is_closed.wait(TIMEOUT_S), "once it answers again"
    threads[0].join(TIMEOUT_S)
    alone.close()


# What lies where


@needs_lmcache
def test_records_survive_the_process(files, caplog):
    with open_store(files, capacity_bytes=CAPACITY) as store:
        put(store, 1, 2)
    with caplog.at_level(logging.INFO), open_store(files, capacity_bytes=CAPACITY) as store:
        assert f"capacity {CAPACITY} bytes" in caplog.text
        assert store.contains([key(1), key(2), key(3)]) == (True, True, False)
        assert store.pin([key(1), key(3)], ttl_s=60.0) == (PinOutcome.PINNED, PinOutcome.MISSING)
        outcome, buffer = get(store, 1)
        assert outcome is OK
        assert np.array_equal(buffer, payload(1))


@needs_lmcache
def test_what_cannot_be_listed_is_said_by_every_command(files, refused, caplog):
    with open_store(files, capacity_bytes=CAPACITY) as store:
        put(store, 1)
        if store.can_list:
            pytest.fail("this adapter lists by now: take another one for this test")
    for words in (["stat"], ["verify"], ["gc", "--max-bytes", "1MB"], ["clear", "--yes"]):
        assert "its records cannot be listed, lmcache store fs_native has no way to" in refused(
            "store", words[0], files, *words[1:]
        )
    with open_store(files, capacity_bytes=CAPACITY) as store:
        assert get(store, 1)[0] is OK


@needs_lmcache
def test_the_link_is_measured(files, capsys):
    assert cli.main(["store", "bench", files, "--mib", "1", "--objects", "4", "--rounds", "1"]) == 0
    assert "1 MiB" in capsys.readouterr().out


# Configuration


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("lmcache:", "must be lmcache:{"),
        ("lmcache://host", "must be lmcache:{"),
        ("lmcache:{", "must be lmcache:{"),
        ("lmcache:[]", "must be lmcache:{"),
        ("lmcache:" + "[" * 100_000, "must be lmcache:{"),
        ('lmcache:{"base_path": "/kv"}', "must be lmcache:{"),
        ('lmcache:{"type": 7}', "must be lmcache:{"),
        ('lmcache:{"type": "fs"}/more', "must be lmcache:{"),
        ('lmcache:{"type": "fs"}?fsync=yes', "unknown option fsync of a lmcache store; known: timeout_s, capacity"),
        ('lmcache:{"type": "fs"}?timeout_s=-1', "timeout_s is '-1', must be seconds"),
        ('lmcache:{"type": "fs"}?timeout_s=1&timeout_s=2', "an option repeats"),
        ('lmcache:{"type": "resp", "password": "hunter2"}', "a value for 'password'"),
        (
            'lmcache:{"type": "s3", "auth": [{"aws_secret_access_key": "hunter2"}]}',
            "a value for 'aws_secret_access_key'",
        ),
        ('lmcache:{"type": "fs", "serde": {"type": "fp8"}}', "'serde' is for LMCache's own server"),
        ('lmcache:{"type": "fs", "eviction": {}}', "'eviction' is for LMCache's own server"),
    ],
)
def test_a_bad_url_is_refused_and_no_secret_repeated(url, said):
    with pytest.raises(ConfigError) as raised:
        check_store_url(url)
    assert said in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("secrets", "text", "left"),
    [
        ({"password": "hunter2"}, "bad value 'hunter2' for password", "bad value '...' for password"),
        ({"auth": {"token": "hunter2"}}, "'hunter2' in {'token': 'hunter2'}", "'...' in {'token': '...'}"),
        ({"auth": [["a-key", {"of": "hunter2"}]]}, "a-key:hunter2", "...:..."),
        ({"user": "hunter", "password": "hunter2"}, "hunter and hunter2", "... and ..."),
        ({"password": 31337}, "password must be a string, is 31337", "password must be a string, is ..."),
        ({"password": ODD}, f"{ODD!r} is bad", "'...' is bad"),
        ({"password": ODD}, json.dumps({"password": ODD}), '{"password": "..."}'),
        ({"password": ODD}, f"{ODD} is bad", "... is bad"),
        ({"password": "two  words"}, "two  words is bad", "... is bad"),
        ({"password": "a.b*c"}, "a.b*c is bad, axbbc is not", "... is bad, axbbc is not"),
        ({"password": "pas"}, "password 'pas' is bad", "password '...' is bad"),
        (
            {"tls": True, "user": "", "ca": None, "db": 0},
            "True, None, 0: a line\n  and another",
            "True, None, 0: a line and another",
        ),
    ],
)
def test_what_lmcache_says_is_said_on_one_line_without_any_secret(secrets, text, left, monkeypatch):
    monkeypatch.setenv(urls.SECRETS, json.dumps(secrets))
    assert urls.cleared(text) == left


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("cacheflow.stores.opening.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package lmcache, .*pip install 'cacheflow-kv\[lmcache\]'"):
        check_store_url(lmcache_url("fs_native", base_path="/kv"))


def test_tiers_are_told_apart_by_their_configuration_in_any_order():
    one, same, other = (
        StoreUrl.parse(f"lmcache:{json.dumps(settings)}?timeout_s={wait_s}")
        for wait_s, settings in enumerate(
            [
                {"type": "fs", "base_path": "/a?b"},
                {"base_path": "/a?b", "type": "fs"},
                {"type": "fs", "base_path": "/c"},
            ],
            1,
        )
    )
    assert one.address == same.address != other.address
    assert dict(one.options) == {"timeout_s": "1"}


@needs_lmcache
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "tape"}, "LMCache refuses its configuration 'tape'"),
        ({"type": "fs_native"}, "LMCache refuses its configuration 'fs_native': .*base_path"),
        ({"type": "resp", "host": "h", "port": "x"}, "LMCache refuses its configuration 'resp': .*port"),
    ],
)
def test_what_lmcache_refuses_is_said_at_the_door(settings, said):
    with pytest.raises(ConfigError, match=said):
        check_store_url("lmcache:" + json.dumps(settings))


@needs_lmcache
def test_an_adapter_that_cannot_be_made_is_refused_at_open(tmp_path):
    (tmp_path / "kv").write_text("no folder")
    with pytest.raises(StoreError, match="lmcache store fs_native cannot be used"):
        open_store(lmcache_url("fs_native", base_path=str(tmp_path / "kv")), capacity_bytes=CAPACITY)


@needs_lmcache
def test_secrets_come_from_the_environment_and_are_never_said(tmp_path, monkeypatch, caplog):
    with running_redis(tmp_path) as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD)
        url = lmcache_url("resp", host="127.0.0.1", port=server.port) + "?timeout_s=2"
        monkeypatch.setenv("CACHEFLOW_LMCACHE_SECRETS", json.dumps({"password": PASSWORD}))
        with caplog.at_level(logging.DEBUG), open_store(url, capacity_bytes=CAPACITY) as store:
            assert put(store, 1) == (STORED,)
            assert get(store, 1)[0] is OK
            said = f"{store} {store!r} {store.stats()}"
        assert PASSWORD not in caplog.text + said
    monkeypatch.setenv("CACHEFLOW_LMCACHE_SECRETS", "not json")
    with pytest.raises(ConfigError, match="CACHEFLOW_LMCACHE_SECRETS must be a JSON object"):
        check_store_url(url)


@needs_lmcache
def test_a_secret_is_not_said_where_lmcache_refuses_it_or_fails_with_it(files, monkeypatch):
    def fail(config):
        raise RuntimeError("cannot connect as ['me', 'hunter2']")

    monkeypatch.setenv("CACHEFLOW_LMCACHE_SECRETS", json.dumps({"port": "hunter2", "auth": {"token": "hunter2"}}))
    with pytest.raises(ConfigError, match=r"LMCache refuses its configuration 'resp': .*port") as refused:
        check_store_url('lmcache:{"type": "resp", "host": "h", "port": "", "password": ""}')
    monkeypatch.setattr("cacheflow.stores.lmcache_adapter.create_l2_adapter", fail)
    with pytest.raises(StoreError, match=r"RuntimeError: cannot connect as \['me', '\.\.\.'\]") as failed:
        open_store(files, capacity_bytes=CAPACITY)
    assert "hunter2" not in f"{refused.value!r} {failed.value!r} {failed.value.__cause__!r}"
