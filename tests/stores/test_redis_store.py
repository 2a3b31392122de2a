"""Redis: a server that dies, hangs, is full, refuses; TLS and users; what lies in it and who may see it."""

import logging
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

import cacheflow
from cacheflow import cli
from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.base import GetRequest, PinOutcome, PutOutcome
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.types import LoadOutcome
from support.proxy import Proxy
from support.servers import PASSWORD, free_port, running_redis
from support.store_objects import TIMEOUT_S, get, key, payload, put

CAPACITY = 64 << 20
RECORD = 4096 + 1000
OK, MISS, ERROR = LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.ERROR
STORED = PutOutcome.STORED


@contextmanager
def own_server(tmp_path, *options, **keywords):
    tmp_path.mkdir(exist_ok=True)
    with running_redis(tmp_path, *options, **keywords) as server:
        yield server


def until_ok(store, number):
    """Read until the store has found its server again."""
    for _ in range(1000):
        if (found := get(store, number))[0] is not ERROR:
            return found
        time.sleep(0.01)
    pytest.fail("the store does not find its server again")


def value_name(number):
    return f"cacheflow1:{key(number).name}"


def test_records_survive_the_process_and_are_found_by_another_store(redis_server):
    with redis_server.client() as client:
        client.flushall()
    with open_store(redis_server.url, capacity_bytes=CAPACITY) as mine:
        put(mine, 1, 2)
    with open_store(redis_server.url, capacity_bytes=CAPACITY) as theirs:
        assert theirs.stats().num_objects == 2
        assert sum(theirs.census().values()) == 2
        assert np.array_equal(get(theirs, 1)[1], payload(1))


def test_capacity_and_the_servers_bound_are_logged_at_start(redis_server, caplog):
    with caplog.at_level(logging.INFO):
        open_store(redis_server.url, capacity_bytes=54321).close()
    assert "capacity 54321 bytes" in caplog.text
    assert "maxmemory unlimited, policy noeviction" in caplog.text


def test_a_value_is_one_string_of_header_and_payload_and_others_keys_are_left_alone(redis_server):
    with redis_server.client() as client, open_store(redis_server.url, capacity_bytes=CAPACITY) as store:
        client.flushall()
        client.set("somebody else's", "x" * 100_000)
        put(store, 1)
        record = client.get(value_name(1))
        assert record[4096:] == payload(1).tobytes()
        store.delete([key(1)])
        assert client.keys() == [b"somebody else's"]


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 4095, 4096, 4097, RECORD - 1, RECORD + 1, 300_000])
def test_a_value_cut_short_or_grown_is_corrupt_and_the_connection_goes_on(redis_server, num_bytes):
    with (
        redis_server.client() as client,
        open_store(redis_server.url, capacity_bytes=CAPACITY) as store,
    ):
        client.flushall()
        put(store, 1, 2)
        client.set(value_name(1), client.get(value_name(1)).ljust(num_bytes, b"x")[:num_bytes])
        assert get(store, 1)[0] is LoadOutcome.CORRUPT
        assert get(store, 2)[0] is OK
        assert put(store, 1) == (STORED,)
        assert get(store, 1)[0] is OK


def test_large_objects(redis_server):
    with open_store(redis_server.url, capacity_bytes=256 << 20) as store:
        for number, num_bytes in ((901, 1 << 20), (902, 16 << 20)):
            put(store, number, num_bytes=num_bytes)
            outcome, buffer = get(store, number, num_bytes)
            assert outcome is OK
            assert np.array_equal(buffer, payload(number, num_bytes))
        store.delete([key(901), key(902)])


def test_the_order_of_use_is_the_servers(tmp_path):
    with own_server(tmp_path) as server:
        with open_store(server.url, capacity_bytes=CAPACITY) as store:
            put(store, 1, 2, 3)
        time.sleep(2.1)  # the server counts idle time in seconds
        with open_store(server.url, capacity_bytes=CAPACITY) as store:
            get(store, 1)
            put(store, 4)
        with open_store(server.url, capacity_bytes=3 * 6000) as store:  # the server's own overhead counts
            put(store, 5)
            assert [number for number in range(1, 6) if store.contains([key(number)])[0]] in ([1, 4, 5], [1, 5], [4, 5])


# A server that goes


def test_a_server_that_is_killed_costs_reads_and_is_found_again(tmp_path):
    port = free_port()
    with own_server(tmp_path / "first", port=port) as server:
        store = open_store(server.url, capacity_bytes=CAPACITY)
        put(store, 1)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert get(store, 1)[0] is ERROR
        assert put(store, 2) == (PutOutcome.ERROR,)
        assert store.contains([key(1)]) == (False,)
        assert store.delete([key(1)]) == 0
        assert store.pin([key(9)], ttl_s=1.0) == (PinOutcome.MISSING,)
        store.census()
    with own_server(tmp_path / "second", port=port):
        assert until_ok(store, 1)[0] is MISS
        assert put(store, 1) == (STORED,)
        assert get(store, 1)[0] is OK
    store.close()


def test_a_server_that_hangs_costs_time_and_no_buffer_is_touched_after_cancel(tmp_path):
    with own_server(tmp_path) as server:
        url = f"{server.url}?timeout_s=0.5"
        with open_store(url, capacity_bytes=CAPACITY) as store:
            put(store, *range(6))
            server.process.send_signal(signal.SIGSTOP)
            buffers = [np.zeros(1000, np.uint8) for _ in range(6)]
            requests = [GetRequest(key(number), buffer) for number, buffer in enumerate(buffers)]
            handle = store.submit_get(requests, deadline_s=0.1)
            assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,) * 6
            handle.cancel()  # returns: the server's timeout ends the transfers
            assert store.contains([key(1)]) == (False,)
            server.process.send_signal(signal.SIGCONT)
            for buffer in buffers:
                assert not buffer.any()
            outcome, buffer = until_ok(store, 1)
            assert outcome is OK, "no answer to an earlier question is taken for this one's"
            assert np.array_equal(buffer, payload(1))
            assert not any(buffer.any() for buffer in buffers)


def test_a_record_may_take_longer_than_one_wait_for_the_server(redis_server):
    """Over a slow link: ``timeout_s`` is for each wait, ten of them for the whole; 4 s at least for this one."""
    num_bytes = 48 << 20
    with closing(Proxy(redis_server.port, up_bytes_per_s=12e6)) as link:
        url = f"redis://127.0.0.1:{link.address[1]}/0?timeout_s=2"
        with open_store(url, capacity_bytes=256 << 20) as store:
            assert put(store, 903, num_bytes=num_bytes) == (STORED,)
            outcome, buffer = get(store, 903, num_bytes)
            assert outcome is OK
            assert np.array_equal(buffer, payload(903, num_bytes))
            store.delete([key(903)])


def test_closing_while_the_server_hangs_returns(tmp_path):
    with own_server(tmp_path) as server:
        store = open_store(f"{server.url}?timeout_s=0.5", capacity_bytes=CAPACITY)
        put(store, 1)
        server.process.send_signal(signal.SIGSTOP)
        handle = store.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
        store.close()
        assert handle.wait(TIMEOUT_S)[0] in (ERROR, LoadOutcome.CANCELLED)
        server.process.send_signal(signal.SIGCONT)


def test_a_server_that_is_not_there_is_refused_at_open():
    port = free_port()
    with pytest.raises(StoreError, match="cannot be used: Connection refused; is it running") as raised:
        open_store(f"redis://127.0.0.1:{port}", capacity_bytes=CAPACITY)
    assert str(raised.value).count(str(port)) == 1, "it says twice where"
    with pytest.raises(StoreError, match=rf"redis://\[::1\]:{port}/0 cannot be used"):
        open_store(f"redis://[::1]:{port}", capacity_bytes=CAPACITY)


def test_a_writer_killed_in_mid_write_leaves_nothing_visible(redis_server):
    with redis_server.client() as client:
        client.flushall()
    program = (
        "import sys, time\n"
        f"sys.path[:0] = [{str(Path(cacheflow.__file__).parents[1])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from cacheflow.stores.opening import open_store\n"
        "from cacheflow.stores.redis_connection import PlainConnection\n"
        "from support.store_objects import put\n"
        f"store = open_store({redis_server.url!r}, capacity_bytes={CAPACITY})\n"
        "put(store, 1)\n"
        "def stall(self, name, parts, **how):\n"
        "    start = b'*3\\r\\n$3\\r\\nSET\\r\\n$%d\\r\\n%s\\r\\n$1004096\\r\\n' % (len(name), name)\n"
        "    self._sock.sendall(start + bytes(parts[0]) + bytes(parts[1])[:500_000])\n"
        "    print('written', flush=True)\n"
        "    time.sleep(600)\n"
        "PlainConnection.set_record = stall\n"
        "put(store, 2, num_bytes=1_000_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with open_store(redis_server.url, capacity_bytes=CAPACITY) as store:
        assert store.contains([key(1), key(2)]) == (True, False)
        assert get(store, 1)[0] is OK
        assert put(store, 2) == (STORED,)
        assert get(store, 2)[0] is OK
    assert cli.main(["store", "verify", redis_server.url]) == 0


def test_one_server_of_a_cluster_is_refused(tmp_path):
    with (
        own_server(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server,
        pytest.raises(StoreError, match="is one server of a cluster"),
    ):
        open_store(server.url, capacity_bytes=CAPACITY)


def test_a_replica_refuses_writes_which_is_said_once(tmp_path, caplog):
    with (
        own_server(tmp_path, "--replicaof", "127.0.0.1", "1") as server,
        open_store(server.url, capacity_bytes=CAPACITY) as store,
    ):
        assert put(store, 1, 2) == (PutOutcome.ERROR,) * 2
        assert get(store, 1)[0] is MISS
        assert caplog.text.count("a write failed") == 1
        assert "READONLY" in caplog.text


# A server that is full


def test_a_full_server_lowers_the_bound_and_old_objects_make_room(tmp_path, caplog):
    room = 24 << 20
    with (
        own_server(tmp_path, "--maxmemory", str(room), "--maxmemory-policy", "noeviction") as server,
        open_store(server.url, capacity_bytes=1 << 30) as store,
    ):
        outcomes = [put(store, number, num_bytes=200_000)[0] for number in range(200)]
        assert outcomes.count(STORED) > 190
        assert store.stats().num_evicted > 50
        assert store.capabilities().capacity_bytes < room
        assert get(store, 199, 200_000)[0] is OK
        assert get(store, 0, 200_000)[0] is MISS
        assert "it is full" in caplog.text


def test_what_the_server_evicts_by_itself_is_a_miss(tmp_path):
    with (
        own_server(tmp_path, "--maxmemory", str(24 << 20), "--maxmemory-policy", "allkeys-lru") as server,
        open_store(server.url, capacity_bytes=1 << 30) as store,
    ):
        assert {put(store, number, num_bytes=200_000)[0] for number in range(200)} == {STORED}
        outcomes = [get(store, number, 200_000)[0] for number in range(200)]
        assert set(outcomes) == {OK, MISS}
        assert store.stats().num_objects == outcomes.count(OK)


# TLS and users


def test_no_secret_is_logged(tls_redis_server, redis_password, caplog):
    with caplog.at_level(logging.DEBUG), open_store(tls_redis_server.url, capacity_bytes=54321) as store:
        put(store, 1)
        assert "capacity 54321 bytes" in caplog.text
        assert "maxmemory unknown" in caplog.text, "this user may not ask"
    assert PASSWORD not in caplog.text
    assert PASSWORD not in repr(store)


def test_a_wrong_password_is_refused_and_not_repeated(tls_redis_server, monkeypatch):
    monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD", "not the password")
    with pytest.raises(StoreError, match="cannot be used") as raised:
        open_store(tls_redis_server.url, capacity_bytes=CAPACITY)
    assert "not the password" not in str(raised.value)


def test_a_certificate_of_an_unknown_authority_is_refused(tls_redis_server, redis_password):
    with pytest.raises(StoreError, match="certificate"):
        open_store(f"rediss://keeper@127.0.0.1:{tls_redis_server.port}/0", capacity_bytes=CAPACITY)


def test_a_certificate_of_another_name_is_refused(tls_redis_server, redis_password):
    url = tls_redis_server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(StoreError, match="certificate"):
        open_store(url, capacity_bytes=CAPACITY)


def test_no_tls_where_the_server_wants_it(tls_redis_server):
    with pytest.raises(StoreError, match="cannot be used"):
        open_store(f"redis://127.0.0.1:{tls_redis_server.port}/0", capacity_bytes=CAPACITY)


def test_a_user_who_may_only_read_reads(tmp_path, monkeypatch):
    with own_server(tmp_path, tls=True) as server, server.client() as client:
        monkeypatch.setenv("CACHEFLOW_REDIS_PASSWORD", PASSWORD)
        with open_store(server.url, capacity_bytes=CAPACITY) as store:
            put(store, 1)
        client.execute_command("ACL", "SETUSER", "keeper", "-set", "-unlink")
        with open_store(server.url, capacity_bytes=CAPACITY) as store:
            assert put(store, 2) == (PutOutcome.ERROR,)
            assert get(store, 1)[0] is OK, "a refusal is no reason to fall silent"
            assert store.delete([key(1)]) == 0


# URLs


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://", "must be redis://host:6379/0"),
        ("redis://host/first", "the last a database's number"),
        ("redis://host?timeout_s=0", "timeout_s is '0', must be seconds"),
        ("redis://host?ca_certs=/x", "unknown option ca_certs of a redis store; known: timeout_s"),
        ("rediss://host?ca_certs=/nowhere", "ca_certs is '/nowhere', which is no file"),
        ("redis://me:hunter2@host", "holds a password"),
        ("redis://:hunter2@host", "holds a password"),
        ("redis://host?password=hunter2", "unknown option password"),
        ("redis://:hunter2/hunter2@host", "not a URL"),
        ("redis://:hunter2#1@host", "not a URL"),
        ("redis://:hunter2?@host", "not a URL"),
        ("redis://me:1/hunter2@host:6379/0", "must be redis://host:6379/0"),
        ("redis:me:hunter2@host", "must be a URL"),
        ("rediss://host?keyfile=/dev/null", "which is no file"),
        (f"rediss://host?keyfile={__file__}", "give its certfile too"),
    ],
)
def test_a_bad_url_is_refused_and_no_secret_repeated(url, said):
    with pytest.raises(ConfigError) as raised:
        check_store_url(url)
    assert said in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("cacheflow.stores.opening.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package redis, .*pip install 'cacheflow-kv\[redis\]'"):
        check_store_url("redis://host")
    with pytest.raises(ConfigError, match=r"needs the package obstore, .*pip install 'cacheflow-kv\[s3\]'"):
        check_store_url("s3://bucket")
