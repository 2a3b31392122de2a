"""A disk that turns read-only, permissions that go, clocks that jump: each costs writes or hits, and no answer."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cacheflow
from cacheflow import cli
from cacheflow.errors import StoreError
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.directory import STALE_STAGING_S
from cacheflow.stores.file import FileStore
from cacheflow.types import LoadOutcome
from support.small_disk import mounted
from support.store_objects import get, key, put

CAPACITY = 1 << 20
RECORD = 4096 + 1000
OK, STORED = LoadOutcome.OK, PutOutcome.STORED
HOUR_S = 3600.0


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


def opened(root, **options):
    return FileStore(root, **({"capacity_bytes": CAPACITY, "fsync": False} | options))


def file_of(root, number):
    (path,) = root.glob(f"objects/*/*/*{number:064x}*")
    return path


def held(store, numbers):
    return [number for number in numbers if store.contains([key(number)])[0]]


def test_a_disk_that_turns_read_only_serves_what_it_holds_and_heals(tmp_path, capsys):
    with mounted(tmp_path / "mount", num_bytes=4 << 20) as folder:

        def remount(how):
            subprocess.run([shutil.which("mount"), "-o", f"remount,{how}", str(folder)], check=True)

        with opened(folder / "store") as store:
            put(store, 1)
            remount("ro")
            assert put(store, 2) == (PutOutcome.ERROR,)
            assert get(store, 1)[0] is OK
            assert store.delete([key(1)]) == 0
            assert held(store, [1, 2]) == [1]
            with pytest.raises(StoreError, match="choose a directory this process can create and write"):
                opened(folder / "store")
            for command in ("stat", "verify"):
                assert cli.main(["store", command, f"file://{folder}/store"]) == 0
            refusals = {
                "gc --max-bytes 1": "Read-only",
                "clear --yes": "Read-only",
                "bench --mib 0.1": "not be written",
            }
            for words, said in refusals.items():
                command, *options = words.split()
                assert cli.main(["store", command, f"file://{folder}/store", *options]) == 2
                assert said in capsys.readouterr().err
            remount("rw")
            assert put(store, 2) == (STORED,)
            assert held(store, [1, 2]) == [1, 2]


NOBODY = 65534


def test_permissions_that_go_make_everything_a_miss(root):
    """In a process of its own, which gives up what root may do."""
    sources = [str(Path(cacheflow.__file__).parents[1]), str(Path(__file__).parents[1])]
    program = (
        "import os, sys\n"
        f"sys.path[:0] = {sources}\n"
        "from pathlib import Path\n"
        "from cacheflow.stores.file import FileStore\n"
        "from support.store_objects import get, key, put\n"
        f"root = Path({str(root)!r})\n"
        f"store = FileStore(root, capacity_bytes={CAPACITY}, fsync=False)\n"
        "print(put(store, 1)[0].value)\n"
        "(root / 'objects').chmod(0)\n"
        "(root / 'staging').chmod(0o500)\n"
        f"os.geteuid() or os.setuid({NOBODY})\n"
        "print(get(store, 1)[0].value, store.contains([key(1)])[0], put(store, 2)[0].value, store.delete([key(1)]))\n"
        "store.close()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout == "stored\nerror False error 0\n"
    for folder in ("objects", "staging"):
        (root / folder).chmod(0o755)
    with opened(root) as store:
        assert get(store, 1)[0] is OK
        assert put(store, 2) == (STORED,)


@pytest.mark.parametrize("jump_s", [-1e9, -HOUR_S, HOUR_S, 1e9])
def test_a_clock_that_jumped_costs_no_record_and_no_bound(root, jump_s, capsys):
    with opened(root) as store:
        put(store, *range(10))
    stamp_s = time.time() + jump_s
    for number in range(10):
        os.utime(file_of(root, number), (stamp_s + number, stamp_s + number))
    with opened(root, capacity_bytes=20 * RECORD, num_threads=1) as store:
        assert all(get(store, number)[0] is OK for number in range(10))
        assert put(store, *range(100, 140)) == (STORED,) * 40
        # Dated ahead by an hour is what another process keeps: it goes last, until a clock that was set back is there.
        kept = list(range(10)) if jump_s == HOUR_S else []
        assert held(store, range(140)) == kept + list(range(120 + len(kept), 140))
    for words in (["stat"], ["gc", "--older-than", "1d", "--dry-run"], ["verify"]):
        assert cli.main(["store", words[0], f"file://{root}", *words[1:]]) == 0
    assert "20 records are whole" in capsys.readouterr().out


def test_a_read_mends_a_time_in_the_future(root):
    with opened(root) as store:
        put(store, 1)
        path = file_of(root, 1)
        os.utime(path, (time.time() + 1e6,) * 2)
        get(store, 1)
        assert path.stat().st_mtime < time.time() + 1e5


@pytest.mark.parametrize("age_s", [-1e9, -2 * STALE_STAGING_S, 2 * STALE_STAGING_S, 1e9])
def test_what_a_dead_writer_left_goes_though_the_clock_jumped(root, age_s):
    with opened(root):
        pass
    old, young = root / "staging" / "1-dead", root / "staging" / "2-alive"
    old.write_bytes(b"half a record")
    young.write_bytes(b"half a record")
    os.utime(old, (time.time() - age_s,) * 2)
    with opened(root):
        assert not old.exists()
        assert young.exists()


def test_a_write_whose_staging_is_taken_for_stale_is_an_error_and_the_next_one_works(root, monkeypatch):
    """As when the clock jumps ahead by hours in the middle of it."""
    with opened(root) as store, opened(root) as other:
        with monkeypatch.context() as patch:
            write_all = os.pwritev

            def jumps(descriptor, parts, offset):
                for path in (root / "staging").iterdir():
                    os.utime(path, (0, 0))
                other.learn()
                return write_all(descriptor, parts, offset)

            patch.setattr("os.pwritev", jumps)
            assert put(store, 1) == (PutOutcome.ERROR,)
            assert held(store, [1]) == []
        assert put(store, 1) == (STORED,)
        assert get(other, 1)[0] is OK
