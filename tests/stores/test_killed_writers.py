"""Writers killed in mid-write (``kill -9``): no record is torn, and the next one clears what they left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cacheflow
from cacheflow import cli
from cacheflow.stores.opening import open_store
from cacheflow.stores.shm import shm_folder
from cacheflow.stores.url import StoreUrl
from cacheflow.types import LoadOutcome
from support import killed_writers
from support.store_kinds import left_behind, url_of
from support.store_objects import get, key, put

KILLS = [10, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("num_kills", KILLS)
@pytest.mark.parametrize("kind", ["file", "shm"])
def test_no_record_is_torn_and_nothing_stays(kind, num_kills, request, tmp_path, capsys):
    url = url_of(kind, request, tmp_path / "store")
    root = tmp_path / "store" if kind == "file" else shm_folder(StoreUrl.parse(url).host)
    paths = os.pathsep.join(str(Path(module.__file__).parents[1]) for module in (cacheflow, killed_writers))
    words = [sys.executable, killed_writers.__file__, paths, left_behind(url), root / "staging", num_kills]
    subprocess.run(list(map(str, words)), check=True)

    assert cli.main(["store", "verify", url]) == 0
    shown = capsys.readouterr().out
    assert " 0 damaged, 0 could not be read" in " ".join(shown.split())
    assert not shown.startswith("0 records")

    with open_store(left_behind(url), capacity_bytes=killed_writers.CAPACITY) as store:
        assert not list((root / "staging").iterdir())
        kept = [number for number in range(killed_writers.NUM_KEYS) if store.contains([key(number)])[0]]
        for number in kept:
            assert get(store, number, killed_writers.RECORD_BYTES)[0] is LoadOutcome.OK
        put(store, 100)
        assert get(store, 100)[0] is LoadOutcome.OK
