"""A disk, or a quota, smaller than the capacity: old objects make room for new ones, and the bound follows the disk."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cacheflow
from cacheflow.errors import StoreError
from cacheflow.stores.base import PinOutcome, PutOutcome
from cacheflow.stores.file import FileStore
from cacheflow.stores.retention import Retention
from cacheflow.types import LoadOutcome
from support.examples import examples
from support.manual_clock import ManualClock
from support.small_disk import SmallDisk, mounted
from support.store_objects import get, key, payload, put

CAPACITY = 1 << 30
RECORD = 4096 + 1000
MIB = 1 << 20
OK, STORED, FULL = LoadOutcome.OK, PutOutcome.STORED, PutOutcome.FULL


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def small_mount(tmp_path):
    with mounted(tmp_path / "mount", num_bytes=4 * MIB) as folder:
        yield folder


def opened(directory, **options):
    usual = {"capacity_bytes": CAPACITY, "fsync": False, "num_threads": 1, "retention": Retention(pinned_share=1.0)}
    return FileStore(directory, **(usual | options))


def held(store, numbers):
    return [number for number in numbers if store.contains([key(number)])[0]]


def fill(path):
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# With a budget in place of a disk.


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_the_least_recently_used_make_room_on_a_full_disk(root, caplog, error):
    disk = SmallDisk(root, 40 * RECORD, error=error)
    with opened(disk) as store:
        assert put(store, *range(40)) == (STORED,) * 40
        assert disk.num_full == 0
        get(store, 0)
        store.pin([key(1)], ttl_s=60.0)
        assert put(store, 40) == (STORED,)
        evicted = sorted(set(range(41)) - set(held(store, range(41))))
        assert evicted == list(range(2, 2 + len(evicted)))
        assert len(evicted) <= 40 // 16 + 2, "one small record costs the headroom and its own room, not the rest"
        bound = store.capabilities().capacity_bytes
        assert 40 * RECORD * 14 // 16 <= bound < 40 * RECORD
        assert put(store, *range(41, 400)) == (STORED,) * 359
        assert disk.num_full == 1, "the bound is lowered: later writes evict before they fail"
        assert held(store, [0, 1, *range(380, 400)]) == [1, *range(380, 400)]
        assert store.stats().used_bytes <= bound
        assert store.stats().put_outcomes[PutOutcome.ERROR] == 0
    (line,) = warnings(caplog)
    assert str(root) in line
    assert os.strerror(error) in line
    for number in (40 * RECORD, CAPACITY, bound):
        assert str(number) in line
    assert not list((root / "staging").iterdir())


def test_a_disk_that_only_pinned_objects_fill_is_full_and_nothing_goes(root):
    clock = ManualClock()
    disk = SmallDisk(root, 10 * RECORD)
    with opened(disk, clock=clock) as store:
        put(store, *range(10))
        store.pin([key(number) for number in range(10)], ttl_s=10.0)
        assert put(store, 10, 11, 12) == (FULL,) * 3
        assert disk.num_full <= 1, "what cannot be evicted for is not written in vain"
        assert held(store, range(13)) == list(range(10))
        clock.now_s += 10.0
        assert put(store, 10) == (STORED,)
        assert get(store, 10)[0] is OK


def test_a_record_larger_than_the_disk_is_full_and_costs_few_others(root):
    disk = SmallDisk(root, 40 * RECORD)
    with opened(disk) as store:
        put(store, *range(20))
        assert put(store, 100, num_bytes=50 * RECORD) == (FULL,)
        assert len(held(store, range(20))) >= 15
        assert put(store, 20, 21) == (STORED,) * 2


def test_a_disk_that_never_gives_room_ends_the_write(root):
    """As where snapshots keep what was removed."""

    class Broken(SmallDisk):
        def free_bytes(self):
            return 1 << 40

        def write(self, name, parts, *, sync):
            self.num_full += 1
            raise OSError(errno.ENOSPC, "no space")

    with opened(root) as store:
        put(store, *range(100))
    disk = Broken(root, 0)
    with opened(disk) as store:
        assert put(store, 1000) == (FULL,)
        assert 1 < disk.num_full < 10
        assert len(held(store, range(100))) >= 70


def test_other_failures_evict_nothing(root, caplog):
    disk = SmallDisk(root, 3 * RECORD, error=errno.EIO)
    with opened(disk) as store:
        assert put(store, 1, 2, 3, 4, 5) == (STORED,) * 3 + (PutOutcome.ERROR,) * 2
        assert held(store, range(6)) == [1, 2, 3]
        assert store.capabilities().capacity_bytes == CAPACITY
    (line,) = warnings(caplog)
    assert "a write failed" in line


def test_the_bound_follows_what_others_leave_of_the_disk(root, caplog):
    clock = ManualClock()
    disk = SmallDisk(root, 100 * RECORD)
    first = 0

    def put_50(store):
        nonlocal first
        first += 50
        assert put(store, *range(first, first + 50)) == (STORED,) * 50
        num_held = len(held(store, range(first, first + 50)))
        return num_held, store.capabilities().capacity_bytes // RECORD

    disk.others_bytes = 90 * RECORD
    with opened(disk, capacity_bytes=60 * RECORD, clock=clock) as store:
        assert put_50(store) == (9, 9)
        disk.others_bytes = 60 * RECORD
        assert put_50(store) == (9, 9), "it is not measured anew at every write"
        clock.now_s += 61.0
        assert put_50(store) == (37, 37)
        disk.others_bytes = 62 * RECORD
        clock.now_s += 61.0
        assert put_50(store) == (35, 35)
        disk.others_bytes = 0
        clock.now_s += 61.0
        assert put_50(store) == (50, 60)
        assert disk.num_full == 1
    assert len(warnings(caplog)) == 1


def test_a_quota_that_the_file_system_does_not_tell_costs_one_failed_write_a_minute(root):
    class Quota(SmallDisk):
        def write(self, name, parts, *, sync):
            free_bytes = self.free_bytes
            self.free_bytes = super().free_bytes
            try:
                super().write(name, parts, sync=sync)
            finally:
                self.free_bytes = free_bytes

    clock = ManualClock()
    disk = Quota(root, 40 * RECORD, error=errno.EDQUOT)
    disk.free_bytes = lambda: CAPACITY
    with opened(disk, clock=clock, num_threads=1) as store:
        for minute in range(5):
            numbers = range(100 * minute, 100 * minute + 100)
            assert put(store, *numbers) == (STORED,) * 100
            assert disk.num_full == minute + 1
            assert len(held(store, numbers)) > 30
            clock.now_s += 61.0


def test_two_stores_share_a_full_disk(root):
    disks = [SmallDisk(root, 64 * RECORD) for _ in range(2)]
    with opened(disks[0]) as mine, opened(disks[1]) as theirs:
        for number in range(300):
            assert put(mine, number) == (STORED,)
            assert put(theirs, 1000 + number) == (STORED,)
        assert held(mine, [*range(290, 300), *range(1290, 1300)]) == [*range(290, 300), *range(1290, 1300)]
    assert sum(disk.num_full for disk in disks) < 600 / 3, "the headroom keeps failed writes, and scans, few"


def test_what_others_filled_the_disk_with_is_evicted(root):
    disks = [SmallDisk(root, 32 * RECORD) for _ in range(2)]
    with opened(disks[0]) as mine, opened(disks[1]) as theirs:
        put(theirs, *range(32))
        assert put(mine, 100) == (STORED,)  # knew of nothing that it could evict
        assert mine.stats().num_evicted > 0
        assert 28 <= len(held(mine, range(32))) < 32


def test_files_that_are_no_records_are_neither_counted_nor_evicted(root):
    with opened(root) as store:
        put(store, 1)
    stray = root / "objects" / "00" / "00" / "core"
    stray.write_bytes(bytes(5000))
    with opened(root, capacity_bytes=2 * RECORD) as store:
        assert store.stats().num_objects == 1
        assert put(store, 2, 3, 4) == (STORED,) * 3
        assert held(store, [1, 2, 3, 4]) == [3, 4]
    assert stray.exists()


class Trial:
    """One random course of events on a small disk, and what must hold after each."""

    def __init__(self, root, disk_bytes):
        self.clock = ManualClock()
        self.disk = SmallDisk(root, disk_bytes)
        self.store = opened(self.disk, clock=self.clock)
        self.sizes = {}
        self.pinned_until_s = {}

    def pinned(self):
        return sorted(number for number, until_s in self.pinned_until_s.items() if until_s > self.clock.now_s)

    def put(self, number, num_bytes):
        num_bytes = self.sizes.setdefault(number, num_bytes)
        pinned_bytes = sum(4096 + self.sizes[each] for each in self.pinned())
        (outcome,) = put(self.store, number, num_bytes=num_bytes)
        if outcome is FULL:
            room = self.store.capabilities().capacity_bytes
            assert pinned_bytes + 4096 + num_bytes > room, "full only where pins leave too little"
            assert self.disk.others_bytes or room >= self.disk.disk_bytes * 15 // 16
        else:
            assert outcome in (STORED, PutOutcome.EXISTS)
            assert self.store.contains([key(number)]) == (True,), "the newest write survives"

    def get(self, number, _value):
        if held(self.store, [number]):
            outcome, buffer = get(self.store, number, self.sizes[number])
            assert outcome is OK
            assert np.array_equal(buffer, payload(number, self.sizes[number]))

    def pin(self, number, ttl_s):
        if self.store.pin([key(number)], ttl_s=ttl_s) == (PinOutcome.PINNED,):
            until_s = self.clock.now_s + ttl_s
            self.pinned_until_s[number] = max(until_s, self.pinned_until_s.get(number, 0.0))

    def unpin(self, number, _value):
        self.store.unpin([key(number)])
        self.pinned_until_s.pop(number, None)

    def wait(self, _number, seconds):
        self.clock.now_s += seconds

    def others(self, _number, num_bytes):
        """Somebody else writes what finds room, or removes."""
        self.disk.others_bytes = min(num_bytes * 20, self.disk.disk_bytes - self.disk.record_bytes())

    def check(self):
        assert held(self.store, self.pinned()) == self.pinned(), "pinned objects stay"
        assert self.disk.record_bytes() == self.store.stats().used_bytes
        assert self.disk.record_bytes() + self.disk.others_bytes <= self.disk.disk_bytes
        assert not list((self.disk.root / "staging").iterdir())


STEPS = st.tuples(
    st.sampled_from(["put"] * 4 + ["get", "pin", "unpin", "wait", "others"]), st.integers(0, 40), st.integers(1, 9000)
)


@settings(max_examples=examples(60))
@given(disk_bytes=st.integers(5_000, 200_000), steps=st.lists(STEPS, min_size=20, max_size=100))
def test_puts_gets_and_pins_on_a_disk_smaller_than_the_capacity(disk_bytes, steps):
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder) / "store", disk_bytes)
        with trial.store:
            for what, number, value in steps:
                getattr(trial, what)(number, value)
                trial.check()


# On a real file system.


def test_a_real_file_system_smaller_than_the_capacity(small_mount, caplog):
    num_bytes = 60_000
    with opened(small_mount / "store") as store:
        put(store, 0, num_bytes=num_bytes)
        store.pin([key(0)], ttl_s=600.0)
        for number in range(1, 300):
            assert put(store, number, num_bytes=num_bytes) == (STORED,)
        bound = store.capabilities().capacity_bytes
        assert 3 * MIB < bound < 4 * MIB
        assert store.stats().used_bytes <= bound
        assert held(store, [0, *range(260, 300)]) == [0, *range(260, 300)]
        for number in (0, 260, 299):
            outcome, buffer = get(store, number, num_bytes)
            assert outcome is OK
            assert np.array_equal(buffer, payload(number, num_bytes))
    assert len(warnings(caplog)) == 1
    assert not list((small_mount / "store" / "staging").iterdir())


def test_records_of_all_sizes_at_once_on_a_real_file_system(small_mount):
    with opened(small_mount / "store", num_threads=3) as store:
        for start in range(0, 400, 20):
            sizes = {number: 1 + number * 7919 % 100_000 for number in range(start, start + 20)}
            for number, num_bytes in sizes.items():
                assert put(store, number, num_bytes=num_bytes) == (STORED,)
            assert held(store, sizes) == list(sizes)
        assert put(store, *range(1000, 1200), num_bytes=50_000).count(STORED) > 190  # by three threads at once


def test_a_real_disk_without_room_for_files(tmp_path):
    with mounted(tmp_path / "mount", num_bytes=f"64m,nr_inodes={200}") as folder, opened(folder / "store") as store:
        for number in range(300):
            assert put(store, number) == (STORED,)
            assert held(store, [number]) == [number]


def test_somebody_elses_file_comes_and_goes_on_a_real_file_system(small_mount):
    clock = ManualClock()
    with opened(small_mount / "store", capacity_bytes=3 * MIB, clock=clock) as store:
        other = small_mount / "other"
        other.write_bytes(bytes(2 * MIB))
        for number in range(60):
            assert put(store, number, num_bytes=60_000) == (STORED,)
        assert store.capabilities().capacity_bytes < 2 * MIB
        other.unlink()
        clock.now_s += 61.0
        for number in range(100, 140):
            assert put(store, number, num_bytes=60_000) == (STORED,)
        assert store.capabilities().capacity_bytes == 3 * MIB
        assert held(store, range(100, 140)) == list(range(100, 140))


def test_processes_share_a_real_full_disk(small_mount):
    root = small_mount / "store"
    program = (
        "import sys\n"
        f"sys.path[:0] = [{str(Path(cacheflow.__file__).parents[1])!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from cacheflow.stores.file import FileStore\n"
        "from support.store_objects import put\n"
        "start = int(sys.argv[1])\n"
        f"store = FileStore({str(root)!r}, capacity_bytes={CAPACITY}, fsync=False)\n"
        "outcomes = [put(store, number, num_bytes=30_000)[0].value for number in range(start, start + 300)]\n"
        "print(*outcomes)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(start)], stdout=subprocess.PIPE, text=True)
        for start in (0, 1000, 2000)
    ]
    outcomes = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {outcome for each in outcomes for outcome in each} <= {"stored", "full"}
    assert all(each.count("stored") > 250 for each in outcomes)
    assert not list((root / "staging").iterdir())
    with opened(root) as store:
        assert 2 * MIB < store.stats().used_bytes <= 4 * MIB
        assert any(held(store, [299, 1299, 2299]))


def test_a_full_real_disk_can_be_opened_and_used(small_mount):
    root = small_mount / "store"
    with opened(root) as store:
        put(store, *range(20), num_bytes=60_000)
    fill(small_mount / "other")
    with opened(root) as store:
        assert store.stats().num_objects == 20
        assert put(store, 100, num_bytes=60_000) == (STORED,)
        assert get(store, 100, 60_000)[0] is OK


def test_a_new_directory_on_a_disk_without_room_is_refused(small_mount):
    fill(small_mount / "other")
    with pytest.raises(StoreError, match=r"No space left on device.*choose a directory"):
        opened(small_mount / "store")
    assert not list(small_mount.glob("store/staging/*"))


def test_what_a_dead_writer_left_makes_room_first(root):
    disk = SmallDisk(root, 10 * RECORD)
    with opened(disk) as store:
        put(store, *range(10))
        remains = root / "staging" / "1-dead"
        remains.write_bytes(b"half a record")
        os.utime(remains, (0, 0))
        assert put(store, 10) == (STORED,)
    assert not remains.exists()
