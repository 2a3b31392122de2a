"""Results files: whole lines whatever happens, half lines found before the work, one measurement in a folder."""

from __future__ import annotations

import os
import resource
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from cacheflow.bench.results_file import append_line, only_run, read_lines, replacing, take_up
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json


def read(path: Path) -> list:
    return read_lines(path, parse_json)


def refuse(text: str) -> None:
    raise AssertionError(f"there was nothing to tell: {text}")


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.jsonl"
    append_line(path, '{"a": 1}')
    return path


@pytest.mark.parametrize("half", ['{"a": 2, "b', "{", '{"a": "é'.encode()[:-1].decode(errors="surrogateescape")])
def test_a_half_written_last_line_is_cut_off_and_said(results, half):
    whole = results.read_bytes()
    torn = half.encode(errors="surrogateescape")
    results.write_bytes(whole + torn)
    said = []
    assert take_up(results, read, tell=said.append) == [{"a": 1}]
    assert results.read_bytes() == whole
    assert len(said) == 1
    assert f"{results}: the last line was only half written" in said[0]
    assert f"{len(torn)} bytes" in said[0]


def test_a_file_that_is_nothing_but_half_a_line_holds_no_record(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": "' + "x" * 200_000)
    said = []
    assert take_up(path, read, tell=said.append) == []
    assert path.read_bytes() == b""
    assert len(said) == 1


def test_a_half_line_behind_a_long_one_is_found(results):
    append_line(results, '"' + "x" * 200_000 + '"')
    before = results.read_bytes()
    results.write_bytes(before + b'"' + b"y" * 200_000)
    assert len(take_up(results, read, tell=lambda text: None)) == 2
    assert results.read_bytes() == before


def test_a_whole_last_line_gets_its_end_and_nothing_is_said(results):
    results.write_text('{"a": 1}\n{"a": 2}')
    assert take_up(results, read, tell=refuse) == [{"a": 1}, {"a": 2}]
    append_line(results, '{"a": 3}')
    assert read(results) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_damaged_line_that_has_an_end_is_left_for_its_owner(results):
    results.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ConfigError, match=r"results.jsonl, line 2: not JSON"):
        take_up(results, read, tell=refuse)
    assert results.read_text() == '{"a": 1}\n{"a"\n'


def test_no_file_yet_is_no_record(tmp_path):
    assert take_up(tmp_path / "none.jsonl", read, tell=refuse) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_place_of_the_file(tmp_path):
    for attempt in (lambda: take_up(tmp_path, read, tell=refuse), lambda: append_line(tmp_path, "{}")):
        with pytest.raises(ConfigError, match=f"results file {tmp_path} cannot be written: Is a directory"):
            attempt()


def test_separators_inside_a_text_do_not_end_a_line(results):
    append_line(results, '{"a": "x\u2028y\x85z"}')
    assert read(results)[1] == {"a": "x\u2028y\x85z"}


def _append_until_full(path: Path, limit: int, answer) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        while True:
            append_line(path, '{"a": "' + "x" * 90 + '"}')
    except ConfigError as error:
        answer.send(str(error))


@pytest.mark.parametrize("limit", [1000, 1050])  # the one ends inside a line, the other on one
def test_a_full_disk_leaves_whole_lines_and_is_said(results, limit):
    context = get_context("fork")
    here, there = context.Pipe()
    worker = context.Process(target=_append_until_full, args=(results, limit, there))
    worker.start()
    assert f"results file {results} cannot be written" in here.recv()
    worker.join()
    assert results.read_text().endswith("}\n")
    assert len(read(results)) == 1 + (limit - 9) // 100


def _hold(folder: Path, answer) -> None:
    with only_run(folder):
        answer.send("held")
        answer.recv()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_second_measurement_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    context = get_context("fork")
    here, there = context.Pipe()
    worker = context.Process(target=_hold, args=(tmp_path, there))
    worker.start()
    assert here.recv() == "held"
    with pytest.raises(ConfigError, match=f"--out {tmp_path} is in use by another run"), only_run(tmp_path):
        raise AssertionError("both hold it")
    here.send("die")
    worker.join()
    with only_run(tmp_path):  # whoever was killed holds nothing
        pass


def _count_up(path: Path) -> None:
    for _ in range(50):
        with replacing(path):
            part = path.with_suffix(".part")
            part.write_text(str(int(path.read_text() or 0) + 1))
            part.replace(path)


def test_a_file_that_several_replace_loses_nothing(tmp_path):
    path = tmp_path / "counter"
    context = get_context("fork")
    workers = [context.Process(target=_count_up, args=(path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_text() == "100"


def test_a_device_in_place_of_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left"):
        append_line(path, "{}")
    with pytest.raises(ConfigError, match="it is a device, which has no end"):
        take_up(path, read, tell=refuse)
