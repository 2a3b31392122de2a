"""An adapter is known by the content of its files, as they are now on one side and as they were loaded on the other."""

import os
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from cacheflow.vllm.adapters import Adapter, AdapterFiles, AdapterLoad, LoadedAdapters

pytestmark = pytest.mark.torch


def write(folder, content="weights", config="{}"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_text(content)
    return folder


def adapter(folder, *, number=1, **changes):
    return Adapter(**{"name": "ad", "number": number, "path": str(folder), **changes})


def make_old(folder):
    """So that nobody has to doubt whether a file may still change within the resolution of its times."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def test_content_decides_and_nothing_else(tmp_path):
    files = AdapterFiles()
    one = files.version(adapter(write(tmp_path / "one")))
    assert files.version(adapter(write(tmp_path / "two"), number=7, name="other")).digest == one.digest
    assert files.version(adapter(write(tmp_path / "two"), number=7)).number == 7
    others = [
        adapter(write(tmp_path / "weights", "others")),
        adapter(write(tmp_path / "config", config='{"r": 8}')),
        adapter(tmp_path / "one", stacked_experts=True),
    ]
    assert len({one.digest, *(files.version(each).digest for each in others)}) == 4
    (tmp_path / "one" / "optimizer.pt").write_text("anything")
    (tmp_path / "one" / "README.md").write_text("anything")
    assert files.version(adapter(tmp_path / "one")) == one


@pytest.mark.parametrize("old", [True, False])
def test_files_that_change_are_read_again_also_where_times_and_sizes_stay(tmp_path, old):
    files, folder = AdapterFiles(), write(tmp_path / "ad")
    if old:
        make_old(folder)
    before = files.version(adapter(folder))
    write(folder, "WEIGHTS")  # as long as before, within the same tick of the clock
    if old:
        make_old(folder)  # ... and as old: the inode's own time tells
    assert files.version(adapter(folder)).digest != before.digest
    write(folder)
    assert files.version(adapter(folder)) == before


def test_files_that_did_not_change_are_read_once(tmp_path, monkeypatch):
    files, folder = AdapterFiles(), write(tmp_path / "ad")
    make_old(folder)
    time_ns = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: time_ns() + 10_000_000_000)  # the inodes have settled
    before = files.version(adapter(folder))
    monkeypatch.setattr("hashlib.file_digest", None)
    assert files.version(adapter(folder)) == before


def test_what_cannot_be_read_has_no_claim(tmp_path):
    files = AdapterFiles()
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty", "no-such-owner/no-such-adapter", "not a name: at all"):
        assert files.version(adapter(path)) is None


def runner_of(load):
    return SimpleNamespace(lora_manager=SimpleNamespace(_load_adapter=load))


def request(folder, number=1):
    return SimpleNamespace(lora_name="ad", lora_int_id=number, lora_path=str(folder), is_3d_lora_weight=False)


def load(runner, folder, *, number=1):
    return runner.lora_manager._load_adapter(request(folder, number))  # noqa: SLF001 -- vLLM has no other way


def test_a_worker_knows_what_it_loaded_whatever_the_files_are_now(tmp_path, caplog):
    folder, files = write(tmp_path / "ad"), AdapterFiles()
    runner = runner_of(lambda request: "loaded")
    loaded = LoadedAdapters(runner)
    first = files.version(adapter(folder))
    assert not loaded.contradicts(first)  # not loaded yet
    assert load(runner, folder) == "loaded"
    assert not loaded.contradicts(first)
    assert not loaded.contradicts(None)
    write(folder, "retrained")
    second = files.version(adapter(folder))
    assert loaded.contradicts(second)
    assert loaded.contradicts(second)
    assert len(caplog.records) == 1
    assert not loaded.contradicts(first)
    assert loaded.take_loads() == [AdapterLoad(first, replaced=False)]
    load(runner, folder)
    assert not loaded.contradicts(second)
    assert loaded.contradicts(first)
    assert loaded.take_loads() == [AdapterLoad(second, replaced=True)]
    assert loaded.take_loads() == []


def test_other_files_under_a_name_and_path_replace_those_before_whatever_the_number(tmp_path):
    """Unloaded, and loaded anew: vLLM gives it another number, and its own prefix cache knows it by name and path."""
    folder = write(tmp_path / "ad")
    runner = runner_of(lambda request: "loaded")
    loaded = LoadedAdapters(runner)
    load(runner, folder)
    load(runner, folder, number=2)
    write(folder, "retrained")
    load(runner, folder, number=3)
    assert [each.replaced for each in loaded.take_loads()] == [False, False, True]


def test_files_written_while_they_were_loaded_are_nobodys(tmp_path):
    folder = write(tmp_path / "ad")
    runner = runner_of(lambda request: write(folder, "half of the old, half of the new"))
    loaded = LoadedAdapters(runner)
    before = AdapterFiles().version(adapter(folder))
    load(runner, folder)
    assert loaded.contradicts(before)
    assert loaded.contradicts(AdapterFiles().version(adapter(folder)))


def test_without_a_view_of_loading_no_adapter_is_trusted(tmp_path):
    loaded = LoadedAdapters(SimpleNamespace())
    assert loaded.contradicts(AdapterFiles().version(adapter(write(tmp_path / "ad"))))
    assert not loaded.contradicts(None)
