"""Shared memory: one tier for all processes of a host, gone with the last of them, closed to other users."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cacheflow
from cacheflow.errors import ConfigError, StoreError
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.opening import check_store_url, open_store
from cacheflow.stores.shm import shm_folder
from cacheflow.types import LoadOutcome
from support.store_kinds import shm_url
from support.store_objects import get, key, payload, put

CAPACITY = 1 << 20
OK = LoadOutcome.OK


@pytest.fixture
def url(request):
    return shm_url(request)


def folder_of(url):
    return shm_folder(url.removeprefix("shm://"))


def opened(url, **options):
    return open_store(url, **({"capacity_bytes": CAPACITY} | options))


def start(url, program):
    prelude = (
        "import sys, time\n"
        f"sys.path[:0] = [{str(Path(cacheflow.__file__).parents[1])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from cacheflow.stores.opening import open_store\n"
        "from support.store_objects import get, put\n"
        f"store = open_store({url!r}, capacity_bytes={CAPACITY})\n"
    )
    command = [sys.executable, "-c", prelude + program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_one_process_writes_another_reads(url):
    with opened(url) as store:
        put(store, 1)
        with start(url, "print(get(store, 1)[0].value, put(store, 2)[0].value)\nstore.close()\n") as other:
            assert other.communicate()[0] == "ok stored\n"
        assert np.array_equal(get(store, 2)[1], payload(2))
        assert store.capabilities().name == "shm"
        assert not store.capabilities().persistent


def test_the_last_to_close_it_frees_the_memory(url):
    first, second = opened(url), opened(url)
    put(first, 1)
    first.close()
    assert get(second, 1)[0] is OK
    second.close()
    second.close()
    assert not list(folder_of(url).parent.glob(f"{folder_of(url).name}*"))
    with opened(url) as store:
        assert store.stats().num_objects == 0
        assert put(store, 1) == (PutOutcome.STORED,)


def test_what_a_killed_process_leaves_is_taken_up(url):
    with start(url, "put(store, 1)\nprint('written', flush=True)\ntime.sleep(600)\n") as other:
        assert other.stdout.readline() == "written\n"
        other.send_signal(signal.SIGKILL)
        other.wait()
    with opened(url, only_look=True) as store:
        assert get(store, 1)[0] is OK
    with opened(url + "?keep=yes") as store:
        assert get(store, 1)[0] is OK
    with opened(url) as store:
        assert get(store, 1)[0] is OK
    assert not folder_of(url).exists()


def test_what_was_killed_while_it_removed_the_store_is_removed(url):
    left = Path(f"{folder_of(url)}.removed-0123")
    left.mkdir()
    try:
        opened(url).close()
        assert not left.exists()
    finally:
        shutil.rmtree(left, ignore_errors=True)


@pytest.mark.parametrize("found", [True, False])
def test_a_store_that_is_removed_while_it_is_opened_is_made_anew(url, found, monkeypatch):
    mkdir, left = Path.mkdir, [1]

    def make_and_lose(self, *args, **options):
        if self == folder_of(url) and left:
            left.pop()
            mkdir(self, *args, **options)
            self.rmdir()  # by its last user, before anybody holds its lock
            if found:
                raise FileExistsError(self)
            return
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    with opened(url) as store:
        put(store, 1)
        assert get(store, 1)[0] is OK
    assert not left


def delete_under(store, url):
    """The folder of an open store, as its user may."""
    put(store, 1)
    shutil.rmtree(folder_of(url))
    assert get(store, 1)[0] is LoadOutcome.MISS


def test_a_folder_deleted_while_it_is_used_is_made_anew_closed_to_others_and_removed_by_the_last(url):
    umask = os.umask(0o022)
    try:
        with opened(url) as store:
            delete_under(store, url)
            assert put(store, 2) == (PutOutcome.STORED,)
            assert folder_of(url).stat().st_mode & 0o777 == 0o700
            with opened(url) as other:
                assert get(other, 2)[0] is OK
            assert get(store, 2)[0] is OK, "the first has it open still"
    finally:
        os.umask(umask)
    assert not folder_of(url).exists()


@pytest.mark.parametrize("writes", [True, False], ids=["writes", "only had it open"])
def test_who_had_a_folder_that_was_deleted_leaves_the_new_one_to_those_who_use_it(url, writes):
    first = opened(url)
    delete_under(first, url)
    if writes:
        assert put(first, 2) == (PutOutcome.STORED,)
    with opened(url) as second:
        assert put(second, 3) == (PutOutcome.STORED,)
        first.close()
        assert get(second, 3)[0] is OK
    assert not folder_of(url).exists()


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_folder_open_to_others_in_place_of_a_deleted_one_is_not_written_to(url, mode, caplog):
    with opened(url) as store:
        delete_under(store, url)
        folder_of(url).mkdir()
        folder_of(url).chmod(mode)
        assert put(store, 2, 3) == (PutOutcome.ERROR,) * 2
        assert caplog.text.count("is not a folder that this user alone may open") == 1
        assert not list(folder_of(url).iterdir())
        folder_of(url).rmdir()
        assert put(store, 2) == (PutOutcome.STORED,)


def test_a_folder_deleted_in_the_middle_of_a_write_is_not_made_anew_by_it(url, monkeypatch):
    pwritev = os.pwritev

    def write_and_delete(descriptor, *parts):
        monkeypatch.undo()
        shutil.rmtree(folder_of(url))
        return pwritev(descriptor, *parts)

    with opened(url) as store:
        monkeypatch.setattr(os, "pwritev", write_and_delete)
        assert put(store, 1) == (PutOutcome.ERROR,)
        assert not folder_of(url).exists()
        assert put(store, 1) == (PutOutcome.STORED,)
        assert folder_of(url).stat().st_mode & 0o777 == 0o700


def test_many_processes_open_and_close_at_once(url):
    program = (
        "store.close()\n"
        "for number in range(40):\n"
        f"    with open_store({url!r}, capacity_bytes={CAPACITY}) as store:\n"
        "        assert put(store, number)[0].value in ('stored', 'exists'), number\n"
        "        assert get(store, number)[0].value == 'ok', number\n"
        "print('done')\n"
    )
    others = [start(url, program) for _ in range(3)]
    for other in others:
        with other:
            assert other.communicate()[0] == "done\n"
    assert not folder_of(url).exists()


def test_it_is_bounded(url):
    with opened(url, capacity_bytes=3 * 5096 + 100) as store:
        for number in range(6):
            put(store, number)
        assert store.contains([key(number) for number in range(6)]) == (False,) * 3 + (True,) * 3


def test_other_users_cannot_look_into_it_and_a_folder_open_to_them_is_refused(url):
    with opened(url):
        assert folder_of(url).stat().st_mode & 0o777 == 0o700
    folder_of(url).mkdir()
    folder_of(url).chmod(0o777)
    with pytest.raises(StoreError, match="not a folder that this user alone may open"):
        opened(url)


def test_a_link_to_another_folder_is_refused(url, tmp_path):
    tmp_path.chmod(0o700)
    folder_of(url).symlink_to(tmp_path)
    try:
        with pytest.raises(StoreError, match="not a folder that this user alone may open"):
            opened(url)
    finally:
        folder_of(url).unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad", ["shm://", "shm:///name", "shm://a/b", "shm://a.b", "shm://..", "shm://a%2Fb", "shm://a:1", "shm://A"]
)
def test_a_name_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="must be shm://name"):
        check_store_url(bad)
