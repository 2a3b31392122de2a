"""Mooncake: a master or a node that dies or hangs, a pool that is full; what lies in it and who may see it."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cacheflow
from cacheflow import cli
from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.base import GetRequest, PinOutcome, PutOutcome
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.types import LoadOutcome
from support.servers import free_port, mooncake_master, new_mooncake_client, require_mooncake, running_mooncake
from support.store_objects import TIMEOUT_S, get, key, payload, put

CAPACITY = 64 << 20
RECORD = 4096 + 1000
OK, MISS, ERROR, CORRUPT = LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.ERROR, LoadOutcome.CORRUPT
STORED = PutOutcome.STORED
BEGUN = -703
"""Mooncake's code for an object that is still being written."""


@pytest.fixture
def url(mooncake_server, mooncake_client):
    """Of an empty pool, in which every store takes part by a client of its own."""
    mooncake_client.remove_all(True)
    return mooncake_server.url


def object_name(number):
    return f"cacheflow1:{key(number).name}"


def stop(process):
    """Stop a process, and go on when all its threads have."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def until_not_error(store, number, num_bytes=1000):
    """Read until the store has found its pool again."""
    for _ in range(3000):
        if (found := get(store, number, num_bytes))[0] is not ERROR:
            return found
        time.sleep(0.01)
    pytest.fail("the store does not find its pool again")


def test_records_survive_the_process_and_are_found_by_another_store(url):
    with open_store(url, capacity_bytes=CAPACITY) as mine:
        put(mine, 1, 2)
    with open_store(url, capacity_bytes=CAPACITY) as theirs:
        assert theirs.stats().num_objects == 2
        assert theirs.stats().used_bytes == 2 * RECORD
        assert np.array_equal(get(theirs, 1)[1], payload(1))


def test_an_object_is_header_and_payload_and_others_objects_are_left_alone(url, mooncake_client):
    mooncake_client.put("somebody else's", b"x" * 100_000)
    with open_store(url, capacity_bytes=CAPACITY) as store:
        put(store, 1)
        assert mooncake_client.get(object_name(1))[4096:] == payload(1).tobytes()
        assert store.stats().num_objects == 1
        assert cli.main(["store", "clear", url, "--yes"]) == 0
        assert mooncake_client.is_exist(object_name(1)) == 0
    assert mooncake_client.get("somebody else's") == b"x" * 100_000
    assert mooncake_client.remove("somebody else's", True) == 0


@pytest.mark.parametrize("num_bytes", [1, 100, 4095, 4096, 4097, RECORD - 1, RECORD + 1, 3_000_000])
def test_an_object_cut_short_or_grown_is_corrupt(url, mooncake_client, num_bytes):
    with open_store(url, capacity_bytes=CAPACITY) as store:
        put(store, 1, 2)
        record = mooncake_client.get(object_name(1))
        assert mooncake_client.remove(object_name(1), True) == 0
        assert mooncake_client.put(object_name(1), record.ljust(num_bytes, b"x")[:num_bytes]) == 0
        assert get(store, 1)[0] is CORRUPT
        assert get(store, 2)[0] is OK
        assert put(store, 1) == (STORED,)
        assert get(store, 1)[0] is OK


def test_large_objects(url):
    with open_store(url, capacity_bytes=256 << 20) as store:
        for number, num_bytes in ((901, 1 << 20), (902, 16 << 20)):
            assert put(store, number, num_bytes=num_bytes) == (STORED,)
            outcome, buffer = get(store, number, num_bytes)
            assert outcome is OK
            assert np.array_equal(buffer, payload(number, num_bytes))


def test_what_others_write_and_remove_is_found_out(url):
    with open_store(url, capacity_bytes=CAPACITY) as mine, open_store(url, capacity_bytes=CAPACITY) as theirs:
        put(theirs, 1, 2)
        assert mine.contains([key(1), key(2), key(3)]) == (True, True, False)
        assert mine.pin([key(1), key(3)], ttl_s=60.0) == (PinOutcome.PINNED, PinOutcome.MISSING)
        assert theirs.delete([key(1)]) == 1, "also what somebody has asked for a moment ago"
        assert get(mine, 1)[0] is MISS


def test_what_others_wrote_was_last_used_when_it_was_first_seen(url, capsys):
    """Mooncake does not say when: `gc` by age must not take it for old."""
    with open_store(url, capacity_bytes=CAPACITY) as store:
        put(store, 1, 2)
    assert cli.main(["store", "gc", url, "--older-than", "1h"]) == 0
    assert "removed 0 of 2 objects" in capsys.readouterr().out


def test_capacity_and_the_pools_size_are_logged_at_start_and_memory_may_be_this_process_s(mooncake_server, caplog):
    with caplog.at_level(logging.INFO):
        open_store(f"{mooncake_server.url}&segment=32MiB", capacity_bytes=54321).close()
    assert "capacity 54321 bytes" in caplog.text
    assert f"gives {32 << 20} bytes to the pool, whose size is {(32 << 20) + (256 << 20)}" in caplog.text


# A pool that goes


def test_a_master_that_is_killed_costs_reads_and_nothing_raises():
    with running_mooncake() as server, open_store(f"{server.url}&timeout_s=2", capacity_bytes=CAPACITY) as store:
        put(store, 1)
        server.master.send_signal(signal.SIGKILL)
        server.master.wait()
        assert get(store, 1)[0] is ERROR
        assert put(store, 2) == (PutOutcome.ERROR,)
        assert store.contains([key(1)]) == (False,)
        assert store.delete([key(1)]) == 0
        assert store.pin([key(9)], ttl_s=1.0) == (PinOutcome.MISSING,)
        store.census()


def test_a_master_that_starts_anew_is_found_again_and_what_it_knew_is_gone():
    with running_mooncake() as server, open_store(server.url, capacity_bytes=CAPACITY) as store:
        put(store, 1)
        server.master.send_signal(signal.SIGKILL)
        server.master.wait()
        assert get(store, 1)[0] is ERROR
        master = mooncake_master(server.port, server.metrics_port)
        try:
            assert until_not_error(store, 1)[0] is MISS
            ends_s = time.monotonic() + 60.0
            while put(store, 1) != (STORED,):  # until those that give memory have found it
                assert time.monotonic() < ends_s
                time.sleep(0.05)
            assert get(store, 1)[0] is OK
        finally:
            master.kill()
            master.wait()


def test_what_a_dead_writer_has_begun_is_not_taken_for_written():
    """Mooncake says that the next write of it succeeded, for half a minute."""
    program = (
        "import sys\n"
        "from mooncake.store import MooncakeDistributedStore\n"
        "client = MooncakeDistributedStore()\n"
        "assert client.setup('127.0.0.1', 'P2PHANDSHAKE', 0, 16 << 20, 'tcp', '', sys.argv[1]) == 0\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "client.put(sys.argv[2], bytes(1_000_000))\n"
    )
    with (
        running_mooncake() as server,
        new_mooncake_client(server) as client,
        open_store(server.url, capacity_bytes=CAPACITY) as store,
    ):
        words = [sys.executable, "-c", program, f"127.0.0.1:{server.port}", object_name(1)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "ready\n"
            stop(server.giver)  # so that the write does not end
            writer.stdin.write("go\n")
            writer.stdin.flush()
            ends_s = time.monotonic() + TIMEOUT_S
            while client.get_size(object_name(1)) != BEGUN:
                assert time.monotonic() < ends_s
                time.sleep(0.01)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        server.giver.send_signal(signal.SIGCONT)
        assert put(store, 1, 2) == (PutOutcome.ERROR, STORED)
        assert store.contains([key(1), key(2)]) == (False, True)
        assert get(store, 1)[0] is MISS


@pytest.mark.parametrize("part", ["master", "giver"])
def test_a_pool_that_hangs_costs_time_and_no_buffer_is_touched_after_cancel(part):
    num_bytes = 300_000
    with running_mooncake() as server, open_store(f"{server.url}&timeout_s=1", capacity_bytes=CAPACITY) as store:
        put(store, *range(6), num_bytes=num_bytes)
        process = getattr(server, part)
        stop(process)
        buffers = [np.zeros(num_bytes, np.uint8) for _ in range(6)]
        requests = [GetRequest(key(number), buffer) for number, buffer in enumerate(buffers)]
        handle = store.submit_get(requests, deadline_s=0.1)
        assert handle.wait(TIMEOUT_S) == (LoadOutcome.LATE,) * 6
        handle.cancel()  # returns: the calls are given up
        if part == "master":
            assert store.contains([key(1)]) == (False,)
        process.send_signal(signal.SIGCONT)
        outcome, buffer = until_not_error(store, 1, num_bytes)
        assert outcome is OK
        assert np.array_equal(buffer, payload(1, num_bytes))
        assert not any(buffer.any() for buffer in buffers)


def test_a_master_that_hangs_is_refused_at_open():
    with running_mooncake() as server:
        stop(server.master)
        with pytest.raises(StoreError, match=r"cannot be used: .*is mooncake_master running"):
            open_store(f"{server.url}&timeout_s=0.5", capacity_bytes=CAPACITY)
        server.master.send_signal(signal.SIGCONT)


def test_closing_while_the_master_hangs_returns(caplog):
    with running_mooncake() as server:
        store = open_store(f"{server.url}&timeout_s=1", capacity_bytes=CAPACITY)
        put(store, 1)
        stop(server.master)
        handle = store.submit_get([GetRequest(key(1), np.zeros(1000, np.uint8))])
        assert handle.wait(TIMEOUT_S)[0] is ERROR
        store.close()
        assert "was left behind" in caplog.text
        server.master.send_signal(signal.SIGCONT)


def test_a_pool_without_memory_is_said_and_is_no_full_one(caplog):
    with running_mooncake(pool_bytes=None) as server, open_store(server.url, capacity_bytes=CAPACITY) as store:
        assert put(store, 1, 2) == (PutOutcome.ERROR,) * 2
        assert "nobody gives memory to the pool" in caplog.text
        assert store.capabilities().capacity_bytes == CAPACITY
        with open_store(f"{server.url}&segment=32MiB", capacity_bytes=CAPACITY):
            assert put(store, 1) == (STORED,)
            assert get(store, 1)[0] is OK


def test_records_of_a_process_that_gave_memory_go_with_it():
    with running_mooncake() as server:
        server.giver.send_signal(signal.SIGKILL)
        server.giver.wait()
        time.sleep(0.1)
        with open_store(server.url, capacity_bytes=CAPACITY) as reader:
            with open_store(f"{server.url}&segment=64MiB", capacity_bytes=CAPACITY) as writer:
                outcomes = [put(writer, number)[0] for number in range(20)]
                assert STORED in outcomes
            for number in range(20):
                assert get(reader, number)[0] in (MISS, ERROR)


def test_a_master_that_is_not_there_is_refused_at_open():
    require_mooncake()
    port = free_port()
    with pytest.raises(StoreError, match=rf"mooncake://127.0.0.1:{port} cannot be used: .*is mooncake_master running"):
        open_store(f"mooncake://127.0.0.1:{port}", capacity_bytes=CAPACITY)


def test_a_wrong_metrics_port_is_refused_at_open(mooncake_server):
    with pytest.raises(StoreError, match=r"cannot be used: .*metrics_port \(\d+\) those of the URL"):
        open_store(f"mooncake://127.0.0.1:{mooncake_server.port}?metrics={free_port()}", capacity_bytes=CAPACITY)


def test_a_writer_killed_in_mid_write_leaves_nothing_visible():
    """In a pool of its own: what a dead writer has begun blocks its name for half a minute."""
    with running_mooncake() as server:
        kill_writers(server.url)
        assert cli.main(["store", "verify", server.url]) == 0


def kill_writers(url):
    program = (
        "import sys, time\n"
        f"sys.path[:0] = [{str(Path(cacheflow.__file__).parents[1])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import os\n"
        "from cacheflow.stores.opening import open_store\n"
        "from support.store_objects import put, put_request, payload\n"
        f"store = open_store({url!r}, capacity_bytes=1 << 30)\n"
        "put(store, 1)\n"
        "print('written', flush=True)\n"
        "while True:\n"
        "    put(store, 2, num_bytes=16 << 20)\n"
        "    print('again', flush=True)\n"
        "    store.delete([put_request(2).key])\n"
    )
    for kill in range(3):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "written\n"
            assert writer.stdout.readline() == "again\n"
            time.sleep(0.01 * kill)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        with open_store(url, capacity_bytes=1 << 30) as store:
            assert get(store, 1)[0] is OK
            assert get(store, 2, 16 << 20)[0] in (OK, MISS), "whole or not at all"


# A pool that is full


def test_a_pool_that_is_full_loses_old_records_and_takes_new_ones():
    """The master evicts, or this process, whose bound the pool's size lowers."""
    with running_mooncake(pool_bytes=32 << 20) as server, open_store(server.url, capacity_bytes=1 << 30) as store:
        outcomes = [put(store, number, num_bytes=200_000)[0] for number in range(400)]
        assert outcomes.count(STORED) > 300
        found = [get(store, number, 200_000)[0] for number in range(400)]
        assert set(found) == {OK, MISS}
        assert found.count(OK) > 50
        assert store.stats().num_objects <= (32 << 20) // 200_000


# URLs


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mooncake://", "must be mooncake://host:50051"),
        ("mooncake://host/pool", "must be mooncake://host:50051"),
        ("mooncake://me@host", "must be mooncake://host:50051"),
        ("mooncake://me:hunter2@host", "holds a password"),
        ("mooncake://host?segment=much", "segment is 'much', must be a size"),
        ("mooncake://host?protocol=carrier", "protocol is 'carrier', must be tcp or rdma"),
        ("mooncake://host?metrics=0", "metrics is '0', must be a port"),
        ("mooncake://host?metrics=65536", "metrics is '65536', must be a port"),
        ("mooncake://host?metrics=x", "metrics is 'x', must be a port"),
        ("mooncake://host?timeout_s=0", "timeout_s is '0', must be seconds"),
        ("mooncake://host?token=hunter2", "unknown option token of a mooncake store; known: segment, protocol"),
    ],
)
def test_a_bad_url_is_refused_and_no_secret_repeated(url, said):
    with pytest.raises(ConfigError) as raised:
        check_store_url(url)
    assert said in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("cacheflow.stores.opening.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package mooncake, .*pip install 'cacheflow-kv\[mooncake\]'"):
        check_store_url("mooncake://host")
