"""Files: damage, crashes, other processes, directories that cannot be used."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import cacheflow
from cacheflow import cli
from cacheflow.errors import StoreError
from cacheflow.stores import record, threaded
from cacheflow.stores.base import PinOutcome, PutOutcome
from cacheflow.stores.directory import STALE_STAGING_S, drop_front
from cacheflow.stores.file import FileStore
from cacheflow.stores.record import ChecksumAlgorithm
from cacheflow.types import LoadOutcome
from support.store_objects import get, key, payload, put, put_request
from support.waiting import eventually

CAPACITY = 1 << 20
RECORD = 4096 + 1000
OK, MISS, CORRUPT = LoadOutcome.OK, LoadOutcome.MISS, LoadOutcome.CORRUPT


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


def opened(root, **options):
    return FileStore(root, **({"capacity_bytes": CAPACITY} | options))


def file_of(root, number):
    (path,) = root.glob(f"objects/*/*/*{number:064x}*")
    return path


def staged(root):
    return list((root / "staging").iterdir())


def test_room_set_aside_for_a_write_that_a_bug_ends_is_given_back(root, monkeypatch):
    with opened(root, capacity_bytes=RECORD) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_whole", lambda *words, **how: 1 // 0)
            assert put(store, 1) == (PutOutcome.ERROR,)
        assert put(store, 1) == (PutOutcome.STORED,)


def test_objects_survive_the_process_and_staging_is_empty(root):
    with opened(root) as store:
        put(store, 1, 2)
    assert not staged(root)
    with opened(root) as store:
        assert store.stats().num_objects == 2
        outcome, buffer = get(store, 1)
        assert outcome is OK
        assert np.array_equal(buffer, payload(1))


@pytest.mark.parametrize("num_bytes", [0, 100, 4095, 4096, 4097, RECORD - 1, RECORD + 1])
def test_a_record_cut_short_or_grown_is_corrupt(root, num_bytes):
    with opened(root) as store:
        put(store, 1)
        assert get(store, 1)[0] is OK  # so that the thread's header scratch holds the right header
        os.truncate(file_of(root, 1), num_bytes)
        assert get(store, 1)[0] is CORRUPT


@pytest.mark.parametrize("position", [0, 8, 13, 2000, 4090, 4096, 5000, RECORD - 1])
def test_a_flipped_bit_is_corrupt_and_repaired_by_the_next_put(root, position):
    with opened(root) as store:
        put(store, 1)
        data = bytearray(file_of(root, 1).read_bytes())
        data[position] ^= 16
        file_of(root, 1).write_bytes(data)
        assert get(store, 1)[0] is CORRUPT
        assert put(store, 1) == (PutOutcome.STORED,)
        assert get(store, 1)[0] is OK
        assert store.stats().num_objects == 1


def test_another_keys_record_under_this_name_is_corrupt(root):
    with opened(root) as store:
        put(store, 1, 2)
        shutil.copy(file_of(root, 2), file_of(root, 1))
        assert get(store, 1)[0] is CORRUPT
        assert get(store, 2)[0] is OK


def test_a_file_that_cannot_be_read_is_an_error(root):
    with opened(root) as store:
        put(store, 1)
        path = file_of(root, 1)
        path.unlink()
        path.mkdir()
        assert get(store, 1)[0] is LoadOutcome.ERROR


def test_a_put_that_cannot_be_written_is_an_error_and_costs_no_space(root, caplog):
    with opened(root) as store:
        (root / "staging").rmdir()
        (root / "staging").write_text("in the way")
        for number in (1, 2):
            assert put(store, number) == (PutOutcome.ERROR,)
        assert caplog.text.count("a write failed") == 1
        (root / "staging").unlink()
        (root / "staging").mkdir()
        assert get(store, 1)[0] is MISS
        assert put(store, *range(100, 100 + CAPACITY // RECORD)).count(PutOutcome.STORED) == CAPACITY // RECORD
        assert store.stats().num_evicted == 0


def test_a_directory_deleted_while_it_is_used_is_made_anew_by_the_next_put(root):
    with opened(root) as store:
        put(store, 1)
        shutil.rmtree(root)
        assert get(store, 1)[0] is MISS
        assert put(store, 2) == (PutOutcome.STORED,)
        assert get(store, 2)[0] is OK
    with opened(root) as store:  # the marker is there again
        assert store.stats().num_objects == 1


@pytest.mark.parametrize("marker", [{"record_version": 99}, {"checksum": "BLAKE2B_128"}], ids=str)
def test_a_directory_that_others_made_anew_for_themselves_is_left_alone(root, marker):
    with opened(root, algorithm=ChecksumAlgorithm.XXH3_128) as store:
        written = json.loads((root / "cacheflow-store.json").read_text())
        shutil.rmtree(root)
        root.mkdir()
        (root / "cacheflow-store.json").write_text(json.dumps(written | marker))
        assert put(store, 1) == (PutOutcome.ERROR,)
        assert get(store, 1)[0] is MISS


def test_the_order_of_use_survives_the_process(root):
    with opened(root) as store:
        put(store, 1, 2, 3)
    long_ago_s = time.time() - 7200
    for age, number in enumerate((1, 2, 3)):
        os.utime(file_of(root, number), (long_ago_s + age, long_ago_s + age))
    with opened(root) as store:
        get(store, 1)
    with opened(root, capacity_bytes=3 * RECORD) as store:
        put(store, 4)
        assert store.contains([key(number) for number in (1, 2, 3, 4)]) == (True, False, True, True)


def test_a_directory_over_capacity_is_brought_below_it_by_the_next_put(root):
    with opened(root) as store:
        put(store, *range(10))
    with opened(root, capacity_bytes=4 * RECORD) as store:
        put(store, 50)
        assert store.stats().num_objects == 4
    assert len(list(root.glob("objects/*/*/*"))) == 4


def test_capacity_is_logged_at_start(root, caplog):
    with caplog.at_level(logging.INFO):
        opened(root, capacity_bytes=54321).close()
    assert "54321" in caplog.text


def test_a_folder_that_is_made_is_closed_to_other_users_and_records_are_as_open_as_the_folder(root):
    umask = os.umask(0o022)
    try:
        with opened(root) as store:
            put(store, 1)
        assert root.stat().st_mode & 0o777 == 0o700
        assert file_of(root, 1).stat().st_mode & 0o777 == 0o600
        root.chmod(0o750)
        with opened(root) as store:
            put(store, 2)
        assert root.stat().st_mode & 0o777 == 0o750
        assert file_of(root, 2).stat().st_mode & 0o777 == 0o640
        shutil.rmtree(root)
        with opened(root) as store:
            shutil.rmtree(root)
            put(store, 3)
        assert root.stat().st_mode & 0o777 == 0o700
        assert file_of(root, 3).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)


# Directories that cannot be used.


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose a directory"):
        opened(tmp_path / "file" / "store")


def test_a_path_nobody_can_write_is_refused():
    with pytest.raises(StoreError, match="choose a directory"):
        opened(Path("/proc/cacheflow-store"))


def test_a_directory_of_another_record_version_is_refused(root):
    opened(root).close()
    marker = root / "cacheflow-store.json"
    values = json.loads(marker.read_text())
    marker.write_text(json.dumps(values | {"record_version": 99}))
    with pytest.raises(StoreError, match=r"version 99.*use another directory"):
        opened(root)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"record_version": 1}', '{"record_version": 1, "checksum": "md5"}'])
def test_a_damaged_marker_is_refused(root, text):
    root.mkdir()
    (root / "cacheflow-store.json").write_text(text)
    with pytest.raises(StoreError, match="not a store marker"):
        opened(root)


def test_a_directory_whose_checksums_cannot_be_computed_is_refused(root, monkeypatch):
    opened(root, algorithm=record.ChecksumAlgorithm.XXH3_128).close()
    monkeypatch.setattr(record, "_xxhash", lambda: None)
    with pytest.raises(StoreError, match="pip install xxhash"):
        opened(root)


def test_a_directory_keeps_the_checksum_it_was_created_with(root):
    opened(root, algorithm=record.ChecksumAlgorithm.BLAKE2B_128).close()
    with opened(root) as store:
        put(store, 1)
        header = record.decode_header(memoryview(file_of(root, 1).read_bytes()))
        assert header.algorithm is record.ChecksumAlgorithm.BLAKE2B_128
        assert get(store, 1)[0] is OK


# Other processes.


def start(program, root):
    prelude = (
        "import os, sys, time\n"
        f"sys.path[:0] = [{str(Path(cacheflow.__file__).parents[1])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from cacheflow.stores.file import FileStore\n"
        "from support.store_objects import put\n"
        f"store = FileStore({str(root)!r}, capacity_bytes={CAPACITY})\n"
    )
    return subprocess.Popen([sys.executable, "-c", prelude + program], stdout=subprocess.PIPE, text=True)


def test_a_writer_killed_in_mid_put_leaves_nothing_visible(root):
    program = (
        "def stall(descriptor):\n    print('written', flush=True)\n    time.sleep(600)\n"
        "put(store, 1)\nos.fsync = stall\nput(store, 2)\n"
    )
    with start(program, root) as writer:
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with opened(root) as store:
        assert store.contains([key(1), key(2)]) == (True, False)
        assert get(store, 2)[0] is MISS
        (remains,) = staged(root)  # young: its writer might live
        assert put(store, 2) == (PutOutcome.STORED,)
        assert get(store, 2)[0] is OK
    os.utime(remains, (time.time() - STALE_STAGING_S - 60,) * 2)
    opened(root).close()
    assert not staged(root)
    assert cli.main(["store", "verify", f"file://{root}"]) == 0


def test_two_processes_share_a_directory(root):
    with opened(root) as store:
        put(store, 1)
        with start("print(*(each.value for each in put(store, *range(40))))", root) as other:
            put(store, *range(39, -1, -1))
            printed = other.stdout.read()
            assert other.wait() == 0
        assert set(printed.split()) <= {"stored", "exists"}
        for number in range(40):
            assert get(store, number)[0] is OK
        assert len(list(root.glob("objects/*/*/*"))) == store.stats().num_objects == 40


def test_what_another_store_wrote_and_removed_is_learned(root):
    with opened(root) as mine, opened(root) as theirs:
        put(theirs, 1, 2)
        assert mine.contains([key(1)]) == (True,)
        assert get(mine, 1)[0] is OK
        assert mine.stats().num_objects == 1  # known by reading it
        theirs.delete([key(1)])
        assert get(mine, 1)[0] is MISS
        assert mine.stats().num_objects == 0
        put(mine, 3, num_bytes=CAPACITY // 8)  # enough written to look at the directory again
        assert mine.stats().num_objects == 2


def test_what_another_store_wrote_can_be_pinned(root):
    with opened(root, capacity_bytes=2 * RECORD) as mine, opened(root) as theirs:
        put(theirs, 1)
        assert mine.pin([key(1), key(2)], ttl_s=60.0) == (PinOutcome.PINNED, PinOutcome.MISSING)
        for number in (2, 3, 4):
            put(mine, number)
        assert mine.contains([key(1), key(3), key(4)]) == (True, False, True)


def test_two_stores_stay_near_the_capacity_together(root):
    capacity = 40 * RECORD
    with opened(root, capacity_bytes=capacity, fsync=False) as mine:
        with opened(root, capacity_bytes=capacity, fsync=False) as theirs:
            for number in range(60):
                put(mine, number)
                put(theirs, 1000 + number)
        total = sum(path.stat().st_size for path in root.glob("objects/*/*/*"))
        assert total <= capacity * (1 + 1 / 8)


def test_who_only_reads_hears_that_what_it_read_has_gone(root):
    """Or its next write would remove all that ever went once more, and what others use with it."""
    capacity = 16 * RECORD
    with opened(root, capacity_bytes=capacity) as writer, opened(root, capacity_bytes=capacity) as reader:
        erased, erase = [], reader.erase
        reader.erase = lambda name: erased.append(name) or erase(name)
        for number in range(100):
            put(writer, number)
            assert get(reader, number)[0] is OK
            eventually(lambda: "cacheflow-scan" not in {thread.name for thread in threading.enumerate()})
        assert reader.stats().num_objects <= 16 + 16 // 8
        assert put(reader, 100) == (PutOutcome.STORED,)
        assert len(erased) <= 1 + 16 // 8


def test_a_scan_that_hangs_is_left_behind_with_the_other_threads(root, monkeypatch, caplog):
    """In the time that closing takes in all."""
    monkeypatch.setattr(threaded, "_JOIN_TIMEOUT_S", 0.01)
    capacity, gate = 16 * RECORD, threading.Event()
    with opened(root, capacity_bytes=capacity) as writer:
        reader = opened(root, capacity_bytes=capacity)
        reader.scan = lambda known: gate.wait(60) and []
        put(writer, *range(4))
        assert [get(reader, number)[0] for number in range(4)] == [OK] * 4
        reader.close()
        assert "is hung in the backend and was left behind" in caplog.text
        gate.set()


def test_a_record_that_a_scan_finds_before_its_write_has_ended_counts_once(root):
    """Or the next write would evict one too many: two writers fill a store to its last byte."""
    with opened(root, capacity_bytes=8 * RECORD, num_threads=1) as store:
        write, counted = store.write_whole, []

        def scanned(*args, **options):
            outcome = write(*args, **options)
            store.learn()
            counted.append(store.stats().used_bytes)
            return outcome

        store.write_whole = scanned
        put(store, *range(8))
        assert counted == [number * RECORD for number in range(8)], "its bytes are reserved until it has ended"
        assert store.contains([key(number) for number in range(8)]) == (True,) * 8


def test_drop_front_takes_bytes_off_a_list_of_buffers():
    parts = [memoryview(b"abc"), memoryview(b"de"), memoryview(b"f")]
    for count in range(7):
        assert b"".join(drop_front(parts, count)) == b"abcdef"[count:]


def test_more_parts_than_a_system_call_takes(root):
    data = payload(1, 3000)
    with opened(root) as store:
        request = put_request(1, data)
        many = type(request)(request.key, [data[i : i + 2] for i in range(0, 3000, 2)], (3000,), "uint8")
        assert store.submit_put([many]).wait() == (PutOutcome.STORED,)
        outcome, buffer = get(store, 1, 3000)
        assert outcome is OK
        assert np.array_equal(buffer, data)


def test_a_record_deleted_while_it_is_read_leaves_no_entry_behind(root, monkeypatch):
    with opened(root, num_threads=1) as store:
        put(store, 1, 2)
        preadv = os.preadv

        def delete_then_read(descriptor, parts, offset):
            store.remove(key(1))
            return preadv(descriptor, parts, offset)

        monkeypatch.setattr(os, "preadv", delete_then_read)
        assert get(store, 1)[0] is OK, "a reader that has the file open still gets its bytes"
        assert store.stats().num_objects == 1
        assert store.stats().used_bytes == RECORD
