"""Store directories that cannot be used: an error that says so, and what is in them untouched."""

import pytest

from cacheflow.errors import (
    StoreError,
)
from cacheflow.stores.file import FileStore
from cacheflow.stores.url import file_url
from support.bad_input import CAPACITY, bench, torch_test


def test_a_store_directory_that_is_not_writable(unwritable):
    with pytest.raises(StoreError, match=r"cannot be used.*choose a directory this process can create and write"):
        FileStore(unwritable, capacity_bytes=CAPACITY)
    assert unwritable.parent.read_text() == "kept"


@torch_test
def test_a_store_directory_that_is_not_writable_on_the_command_line(
    unwritable, model_folder, tmp_path, refused, one_thread
):
    quick = ("--chunk", 32, "--max-tokens", 64, "--repeats", 1, "--out", tmp_path / "p.json")
    assert f"store directory {unwritable} cannot be used" in refused("calibrate", model_folder, *quick,
                                                                     "--store", file_url(unwritable))  # fmt: skip
    assert not (tmp_path / "p.json").exists()
    dead = ("--store", "redis://127.0.0.1:1/0")  # said before the model, which is not there, is looked for
    assert "redis://127.0.0.1:1/0 cannot be used" in refused(*bench(tmp_path / "no model", tmp_path / "o", *dead))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store").write_text("kept")
    assert "cannot be used" in refused(*bench(model_folder, tmp_path / "out", "--store", "file"))
    assert (tmp_path / "out" / "store").read_text() == "kept"


MARKERS = {
    "another version": ('{"record_version": 99, "checksum": "XXH3_128"}', "records of version 99, this is version 1"),
    "another version, with checksums of its own": (
        '{"record_version": 2, "checksum": "XXH4"}',
        "records of version 2, this is version 1",
    ),
    "no marker": ("something else entirely", "is not a store marker"),
    "half a marker": ('{"record_version": 1}', "is not a store marker"),
    "another checksum": ('{"record_version": 1, "checksum": "CRC32"}', "is not a store marker"),
}


@pytest.fixture
def old_store(tmp_path):
    """A directory with records of another version."""

    def make(root, marker):
        (root / "objects" / "ab").mkdir(parents=True)
        (root / "objects" / "ab" / "record").write_bytes(b"precious")
        (root / "cacheflow-store.json").write_text(marker)
        return root

    return make


def assert_untouched(root, marker):
    assert (root / "objects" / "ab" / "record").read_bytes() == b"precious"
    assert (root / "cacheflow-store.json").read_text() == marker


@pytest.mark.parametrize(("marker", "message"), MARKERS.values(), ids=list(MARKERS))
def test_a_store_directory_of_another_record_version(tmp_path, old_store, marker, message):
    root = old_store(tmp_path / "store", marker)
    with pytest.raises(StoreError, match=message) as raised:
        FileStore(root, capacity_bytes=CAPACITY)
    assert str(root) in str(raised.value)
    assert "use another directory" in str(raised.value)
    assert_untouched(root, marker)


@torch_test
def test_a_store_of_another_record_version_on_the_command_line(model_folder, tmp_path, old_store, refused, one_thread):
    marker, _ = MARKERS["another version"]
    root = old_store(tmp_path / "out" / "store", marker)
    quick = ("--chunk", 32, "--max-tokens", 64, "--repeats", 1, "--out", tmp_path / "p.json")
    assert "records of version 99" in refused("calibrate", model_folder, *quick, "--store", file_url(root))
    assert "records of version 99" in refused(*bench(model_folder, tmp_path / "out", "--store", "file"))
    assert_untouched(root, marker)
    assert not (tmp_path / "p.json").exists()
    assert not (tmp_path / "out" / "results.jsonl").exists()
