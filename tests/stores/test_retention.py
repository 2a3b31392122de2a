"""What goes first and what goes by itself: bounded pins, a time to live, tenants' quotas."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheflow.errors import ConfigError
from cacheflow.stores.base import PinOutcome, PutOutcome
from cacheflow.stores.file import FileStore
from cacheflow.stores.lru import HeldObject, LruIndex
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.retention import Retention
from cacheflow.types import LoadOutcome
from support import growth
from support.manual_clock import ManualClock
from support.store_kinds import ALL, LMCACHE, SHARED, opened, url_of
from support.store_objects import get, key, put

RECORD = 4096 + 1000
STORED, FULL = PutOutcome.STORED, PutOutcome.FULL
PINNED, MISSING, REFUSED = PinOutcome.PINNED, PinOutcome.MISSING, PinOutcome.REFUSED


def held(store, *numbers):
    return [number for number in numbers if store.contains([key(number)])[0]]


def until_gone(store, *numbers, timeout_s=60.0):
    """Wait until none of these is there."""
    ends_s = time.monotonic() + timeout_s
    while held(store, *numbers):
        assert time.monotonic() < ends_s, f"still there: {held(store, *numbers)}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ttl_s": 0.5}, "ttl_s is 0.5, must be at least 1"),
        ({"ttl_s": float("inf")}, "ttl_s is inf"),
        ({"ttl_s": float("nan")}, "ttl_s is nan"),
        ({"pinned_share": -0.1}, "pinned_share is -0.1"),
        ({"pinned_share": 1.1}, "pinned_share is 1.1"),
        ({"tenant_quota": 0.0}, "tenant_quota is 0.0"),
        ({"tenant_quota": 2.0}, "tenant_quota is 2.0"),
    ],
)
def test_what_is_out_of_range_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        Retention(**values)


# The index


def index_of(*entries, capacity_bytes=100, **retention):
    """Holds ``(name, bytes, tenant)``, used one second after the other from 0 on."""
    index = LruIndex(capacity_bytes, retention=Retention(**retention))
    for second, (name, num_bytes, tenant) in enumerate(entries):
        index.add(name, num_bytes, now_s=float(second), tenant=tenant)
    return index


def test_pins_hold_no_more_than_their_share():
    index = index_of(("a", 30, None), ("b", 20, None), ("c", 10, None), pinned_share=0.5)
    assert index.pin("a", until_s=10.0, now_s=0.0) is PINNED
    assert index.pin("b", until_s=20.0, now_s=0.0) is PINNED
    assert index.pin("c", until_s=10.0, now_s=0.0) is REFUSED
    assert index.pin("a", until_s=15.0, now_s=0.0) is PINNED, "what is pinned may stay so"
    assert index.pin("c", until_s=30.0, now_s=14.0) is REFUSED, "the second end of a counts"
    assert index.pin("c", until_s=30.0, now_s=15.0) is PINNED
    assert index.pinned_bytes == 30
    assert index.pin("d", until_s=30.0, now_s=15.0) is MISSING


@pytest.mark.parametrize("end", ["unpin", "discard"])
def test_a_pin_that_is_over_makes_room_for_another(end):
    index = index_of(("a", 50, None), ("b", 50, None), pinned_share=0.5)
    index.pin("a", until_s=10.0, now_s=0.0)
    assert index.pin("b", until_s=10.0, now_s=0.0) is REFUSED
    assert getattr(index, end)("a")
    assert index.pin("b", until_s=10.0, now_s=0.0) is PINNED
    index.rebuild([("c", HeldObject(50, 0.0))])
    assert index.pinned_bytes == 0


def test_pinning_again_moves_the_end_further_away_never_nearer():
    index = index_of(("a", 50, None), ("b", 50, None))
    index.pin("a", until_s=10.0, now_s=0.0)
    index.pin("a", until_s=5.0, now_s=0.0)
    assert index.reserve(50, now_s=7.0) == ("b",)
    index.pin("a", until_s=20.0, now_s=7.0)
    assert index.pin_left_s("a", now_s=12.0) == 8.0
    assert index.evict(50, now_s=12.0) is None
    assert index.evict(50, now_s=20.0) == ("a",)


def test_pins_that_are_renewed_or_ended_again_and_again_leave_nothing_behind():
    index = index_of(("a", 10, None), ("b", 10, None), ("c", 10, None), pinned_share=1.0)
    index.pin("c", until_s=1500.0, now_s=0.0)
    for second in range(1000):
        assert index.pin("a", until_s=1000.0 + second, now_s=0.0) is PINNED
        assert index.pin("b", until_s=1000.0 + second, now_s=0.0) is PINNED
        assert index.unpin("b")
    assert growth.held([index])["LruIndex._pin_ends"] < 100
    assert index.pin("b", until_s=2000.0, now_s=1998.0) is PINNED
    assert index.pinned_bytes == 20, "c has ended"
    index.pin("b", until_s=3000.0, now_s=1999.0)
    assert index.pinned_bytes == 10, "the last end of a counts"


def test_what_was_not_used_for_its_time_expires_unless_it_is_pinned():
    index = index_of(("a", 10, None), ("b", 10, None), ("c", 10, None), ttl_s=5.0)
    index.pin("a", until_s=6.5, now_s=0.0)
    index.touch("b", now_s=4.0)
    assert index.expire(now_s=6.0) == ()
    assert index.expire(now_s=7.0) == ("a", "c")
    assert index.expire(now_s=9.0) == ("b",)
    assert (len(index), index.used_bytes, index.num_evicted) == (0, 0, 0)


def test_what_was_used_in_the_future_is_kept_until_then():
    index = index_of(ttl_s=5.0)
    index.rebuild([("old", HeldObject(10, -1.0)), ("kept", HeldObject(10, 100.0))])
    assert index.expire(now_s=50.0) == ("old",)
    assert index.expire(now_s=105.0) == ("kept",)


def test_a_tenant_over_its_quota_makes_room_from_its_own():
    """The noisy one's are newest: by use alone the quiet one's would go."""
    entries = [("quiet 1", 20, "q"), ("quiet 2", 20, "q")] + [(f"noisy {n}", 20, "n") for n in range(3)]
    assert index_of(*entries).reserve(20, now_s=9.0, tenant="n") == ("quiet 1",)
    index = index_of(*entries, tenant_quota=0.5)
    assert index.reserve(20, now_s=9.0, tenant="n") == ("noisy 0",)
    index = index_of(*entries, tenant_quota=0.5)
    assert index.reserve(10, now_s=9.0, tenant="q") == ("noisy 0",), "whoever writes"
    index = index_of(*entries, tenant_quota=0.5)
    assert index.reserve(20, now_s=9.0) == ("noisy 0",)


def test_within_the_quotas_the_least_recently_used_goes_whose_ever_it_is():
    index = index_of(("a", 30, "a"), ("b", 30, "b"), ("c", 40, None), tenant_quota=0.5)
    assert index.reserve(10, now_s=9.0, tenant="b") == ("a",)


def test_a_tenant_may_fill_what_nobody_needs():
    index = index_of(("a", 40, "a"), ("b", 40, "a"), tenant_quota=0.5)
    assert index.reserve(20, now_s=9.0, tenant="a") == ()


def test_what_cannot_be_made_room_for_within_the_quota_is_full():
    index = index_of(("a", 50, "a"), ("b", 50, "b"), tenant_quota=0.5, pinned_share=1.0)
    assert index.reserve(60, now_s=9.0, tenant="c") is None, "larger than a quota"
    index.pin("a", until_s=99.0, now_s=9.0)
    assert index.reserve(10, now_s=9.0, tenant="a") is None, "its own is pinned, and others' it may not have"
    assert index.sizes() == {"a": 50, "b": 50}


def test_a_tenants_pins_hold_a_share_of_its_quota():
    index = index_of(("a", 20, "a"), ("b", 20, "a"), ("c", 20, "c"), tenant_quota=0.5, pinned_share=0.5)
    assert [index.pin(name, until_s=9.0, now_s=0.0) for name in "abc"] == [PINNED, REFUSED, PINNED]


def test_a_tenant_that_becomes_known_is_counted_from_the_next_use_on():
    index = index_of(("a", 60, None), ("b", 40, "b"), tenant_quota=0.5)
    index.touch("a", now_s=5.0, tenant="a")
    index.rebuild([("b", HeldObject(40, 0.0)), ("a", HeldObject(60, 5.0))])
    assert index.reserve(10, now_s=9.0, tenant="b") == ("a",)


TENANT_STEPS = st.tuples(
    st.sampled_from(["write", "write", "write", "touch", "pin", "discard", "rebuild"]),
    st.integers(0, 11),
    st.sampled_from(["a", "b", "c", None]),
    st.integers(1, 40),
)


@settings(deadline=None)
@given(quota=st.sampled_from([0.2, 0.34, 0.5, 1.0]), steps=st.lists(TENANT_STEPS, max_size=60))
def test_no_tenant_pushes_out_anothers_while_it_is_over_its_quota(quota, steps):
    index = LruIndex(100, retention=Retention(tenant_quota=quota, pinned_share=0.5))
    tenant_of: dict[str, str | None] = {}
    now_s = 0.0

    def bytes_of(tenant, sizes):
        return sum(size for name, size in sizes.items() if tenant_of[name] == tenant)

    for what, number, tenant, size in steps:
        now_s += 1.0
        name = f"{number}"
        before = index.sizes()
        if what == "write" and name not in before:
            victims = index.reserve(size, now_s=now_s, tenant=tenant)
            if victims is None:
                assert index.sizes() == before
                continue
            after = {each: num for each, num in before.items() if each not in victims}
            others = [each for each in victims if tenant_of[each] != tenant]
            if tenant is not None and others:
                assert bytes_of(tenant, after) + size <= quota * 100, "it had made all the room that it owed"
            index.commit(name, size, now_s=now_s, tenant=tenant)
            tenant_of[name] = tenant
            assert sum(index.sizes().values()) == index.used_bytes <= 100
        elif what == "touch":
            index.touch(name, now_s=now_s)
        elif what == "pin":
            index.pin(name, until_s=now_s + size, now_s=now_s)
            assert index.pinned_bytes <= 50
        elif what == "discard":
            index.discard(name)
        elif what == "rebuild":
            index.rebuild([(each, HeldObject(num, now_s)) for each, num in before.items()])


# Stores


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(params=[*ALL, *LMCACHE])
def url(request, tmp_path):
    return url_of(request.param, request, tmp_path / "store")


def test_what_nobody_uses_goes_by_itself_and_what_is_pinned_stays(url):
    with opened(url, capacity_bytes=1 << 20, retention=Retention(ttl_s=1.0)) as store:
        put(store, 1, 2, 3)
        assert store.pin([key(2)], ttl_s=3600.0) == (PINNED,)
        until_gone(store, 1, 3)
        assert held(store, 2) == [2]
        assert get(store, 2)[0] is LoadOutcome.OK
        assert get(store, 1)[0] is LoadOutcome.MISS
        assert put(store, 1) == (STORED,)
        store.unpin([key(2)])
        until_gone(store, 1, 2)


def test_what_is_used_stays(url):
    with opened(url, capacity_bytes=1 << 20, retention=Retention(ttl_s=3.0)) as store:
        put(store, 1, 2)
        while held(store, 1):
            assert get(store, 2)[0] is LoadOutcome.OK
            time.sleep(0.05)
        assert get(store, 2)[0] is LoadOutcome.OK


def test_without_a_time_to_live_nothing_expires(url, clock):
    with opened(url, capacity_bytes=1 << 20, clock=clock) as store:
        put(store, 1)
        clock.now_s += 1e9
        assert store.sweep() == 0
        assert held(store, 1) == [1]


def test_pins_of_a_store_are_bounded(url):
    with opened(url, capacity_bytes=4 * RECORD + 100, retention=Retention(pinned_share=0.5)) as store:
        for number in range(4):
            put(store, number)
        outcomes = store.pin([key(number) for number in range(5)], ttl_s=60.0)
        assert outcomes == (PINNED, PINNED, REFUSED, REFUSED, MISSING)
        for number in range(10, 20):
            assert put(store, number) == (STORED,), "keeps never fill a store"
        assert held(store, 0, 1, 2, 3) == [0, 1]


def claim(store, tenant, *numbers):
    store.claim([key(number).chain_hash for number in numbers], tenant=tenant)


def test_one_tenant_cannot_throw_out_what_others_saved(url):
    retention = Retention(tenant_quota=0.5)
    with opened(url, capacity_bytes=6 * RECORD + 100, retention=retention) as store:
        claim(store, "quiet", 1, 2, 3)
        claim(store, "noisy", *range(10, 40))
        for number in (1, 2, 3):
            put(store, number)
        for number in range(10, 40):
            assert put(store, number) == (STORED,)
        assert held(store, 1, 2, 3, 37, 38, 39) == [1, 2, 3, 37, 38, 39]
        assert store.stats().num_objects == 6


def test_without_a_quota_claims_mean_nothing(url):
    with opened(url, capacity_bytes=6 * RECORD + 100) as store:
        claim(store, "quiet", 1)
        for number in range(1, 20):
            put(store, number)
        assert held(store, 1, 19) == [19]


@pytest.mark.parametrize("kind", SHARED)
def test_a_tenant_is_known_by_its_chunks_also_in_what_other_processes_wrote(kind, request, tmp_path):
    """Tensor-parallel ranks write objects of the same chunks, each its own."""
    url, retention = url_of(kind, request, tmp_path / "store"), Retention(tenant_quota=0.5)
    bounds = {"capacity_bytes": 10 * RECORD, "retention": retention}
    with opened(url, **bounds) as one, opened(url, **bounds) as other:
        claim(one, "quiet", 1)
        put(one, 1)
        claim(one, "noisy", 2, 3, 4, 5, *range(10, 30))
        for number in (2, 3, 4, 5):
            assert put(other, number) == (STORED,)
        for number in range(10, 30):
            assert put(one, number) == (STORED,)
        assert held(one, 1, 29) == [1, 29]


def test_a_pin_of_one_process_is_seen_by_another_in_files(tmp_path):
    """The file's last use is dated ahead, so that another process evicts it last, and `gc` leaves it."""
    with (
        FileStore(tmp_path, capacity_bytes=1 << 20, fsync=False) as mine,
        FileStore(tmp_path, capacity_bytes=5 * RECORD, fsync=False) as theirs,
    ):
        put(mine, 1)
        put(mine, 2)
        assert mine.pin([key(1)], ttl_s=600.0) == (PINNED,)
        for number in range(10, 30):
            assert put(theirs, number) == (STORED,)
        assert held(theirs, 1, 2) == [1]
        mine.unpin([key(1)])
        for number in range(30, 50):
            put(theirs, number)
        assert held(theirs, 1) == []


def test_a_kept_file_keeps_its_date_when_it_is_read(tmp_path):
    with FileStore(tmp_path, capacity_bytes=1 << 20, fsync=False) as store:
        put(store, 1)
        store.pin([key(1)], ttl_s=600.0)
        store.pin([key(1)], ttl_s=60.0)
        (path,) = tmp_path.glob("objects/*/*/*")
        assert get(store, 1)[0] is LoadOutcome.OK
        assert path.stat().st_mtime > time.time() + 300.0
        store.unpin([key(1)])
        assert path.stat().st_mtime <= time.time() + 1.0


@pytest.mark.parametrize("kind", ["file", "shm"])
def test_a_pin_of_files_ends_by_itself(kind, request, tmp_path):
    url, numbers = url_of(kind, request, tmp_path / "store"), itertools.count(2)
    with opened(url, capacity_bytes=4 * RECORD) as store:
        put(store, 1)
        assert store.pin([key(1)], ttl_s=1.0) == (PINNED,)
        ends_s = time.monotonic() + 60.0
        while held(store, 1):
            assert time.monotonic() < ends_s
            assert put(store, next(numbers)) == (STORED,)


def test_memory_that_has_expired_can_be_written_again(clock):
    with MemoryStore(capacity_bytes=3 * RECORD, retention=Retention(ttl_s=10.0), clock=clock) as store:
        put(store, 1, 2)
        clock.now_s += 9.0
        assert store.sweep() == 0
        get(store, 1)
        clock.now_s += 1.0
        assert store.sweep() == 1
        assert held(store, 1, 2) == [1]
        assert put(store, 2, 3) == (STORED, STORED)
        assert store.stats().used_bytes == 3 * RECORD
