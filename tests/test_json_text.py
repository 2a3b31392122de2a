"""JSON from people and disks: one kind of error, whatever is wrong with it."""

from __future__ import annotations

import pytest

from cacheflow import json_text
from cacheflow.errors import ConfigError
from cacheflow.json_text import parse_json, read_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value at column 1"),
        ('{"a": 1,\n "b"', "at line 2, column 5"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "a number has thousands of digits"),
    ],
    ids=["empty", "second line", "lists", "objects", "digits"],
)
def test_what_is_no_json(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_json(text)


def test_what_is_json():
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_text(tmp_path)
    path = tmp_path / "file"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8: byte 0 is 0xe9"):
        read_text(path)
    monkeypatch.setattr(json_text, "MAX_FILE_BYTES", 3)
    path.write_text("1234")
    with pytest.raises(ConfigError, match="larger than 3 bytes"):
        read_text(path)
    path.write_text("123")
    assert read_text(path) == "123"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "file"
    path.write_bytes("é".encode("utf-8-sig"))
    assert read_text(path) == "é"
