"""Damage is said once, counted always, and mended by the next write."""

import logging

import numpy as np
import pytest

from cacheflow.stores import suspects
from cacheflow.stores.base import GetRequest, PutOutcome, ReadTap
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.types import LoadOutcome
from support.store_kinds import ALL, LMCACHE, url_of
from support.store_objects import TIMEOUT_S, get, key, put

CORRUPT = LoadOutcome.CORRUPT


@pytest.fixture(params=[*ALL, *LMCACHE])
def store(request, tmp_path):
    with open_store(url_of(request.param, request, tmp_path / "store"), capacity_bytes=1 << 20) as opened:
        yield opened


def get_damaged(store, *numbers):
    for number in numbers:
        request = GetRequest(key(number), np.zeros(1000, np.uint8), tap=ReadTap(5000))
        assert store.submit_get([request]).wait(TIMEOUT_S) == (CORRUPT,)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_first_damaged_record_is_a_warning_and_the_others_are_counted(store, caplog):
    put(store, 1, 2, 3)
    assert not warnings(caplog)
    get_damaged(store, 2)
    (line,) = warnings(caplog)
    assert key(2).name in line
    assert "recomputed and written again" in line
    assert line.startswith(str(store))
    get_damaged(store, 1, 2, 3)
    assert len(warnings(caplog)) == 1
    assert store.stats().get_outcomes[CORRUPT] == 4
    assert put(store, 2) == (PutOutcome.STORED,)
    assert get(store, 2)[0] is LoadOutcome.OK
    store.close()
    store.close()
    assert len(warnings(caplog)) == 2
    assert "4 reads found a damaged record" in warnings(caplog)[-1]


def test_one_damaged_record_is_said_once_and_none_never(store, caplog):
    put(store, 1)
    get(store, 1)
    get(store, 2)
    assert not warnings(caplog)
    get_damaged(store, 1)
    store.close()
    assert len(warnings(caplog)) == 1


def test_a_record_cut_short_is_damaged_too(tmp_path, caplog):
    with FileStore(tmp_path, capacity_bytes=1 << 20) as store:
        put(store, 1)
        (path,) = tmp_path.glob("objects/*/*/*")
        path.write_bytes(path.read_bytes()[:4000])
        assert get(store, 1)[0] is CORRUPT
        assert key(1).name in warnings(caplog)[0]


def test_damage_on_the_way_through_wrappers_is_said_by_the_store_within(store, caplog):
    put(store, 1)
    with FaultyStore(store, FaultPlan(rules=(FaultRule(fault=Fault.CORRUPT),))) as faulty:
        assert get(faulty, 1)[0] is CORRUPT
        assert len(warnings(caplog)) == 1


def test_damage_that_nobody_asks_about_again_is_forgotten_and_found_anew(monkeypatch):
    monkeypatch.setattr(suspects, "MAX_SUSPECTS", 3)
    with MemoryStore(capacity_bytes=1 << 20) as store:
        put(store, *range(5))
        get_damaged(store, *range(5))
        keys = [key(number) for number in range(5)]
        assert store.contains(keys) == (True, True, False, False, False)
        get_damaged(store, 0, 3)
        assert store.contains(keys) == (False, True, True, False, False)
        assert put(store, 3) == (PutOutcome.STORED,)
        assert store.delete(keys[:1]) == 1
        assert put(store, 0) == (PutOutcome.STORED,)
        assert store.contains(keys) == (True, True, True, True, False)
