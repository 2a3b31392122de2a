"""Traces that hold what JSON and CSV allow and no trace has: one complaint with file, line and field."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads import records
from cacheflow.workloads.request import MAX_S, TraceRequest
from cacheflow.workloads.traces import read_trace

MOONCAKE = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
SAVED = {"request_id": 0, "arrival_s": 0, "input_tokens": 10, "output_tokens": 1, "block_ids": [0], "block_tokens": 512,
         "session_id": "", "after": None, "delay_s": 0}  # fmt: skip
SESSION = {"id": "a", "block_size": 64, "requests": [{"t": 0, "in": 10, "out": 1, "hash_ids": []}]}
AGENT = {"timestamp": 1, "input": "abc", "output": "x", "session_id": "s"}
DIGITS = "9" * 400


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as raised:
        list(read_trace(path))
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value)) < 400
    return str(raised.value)


@pytest.fixture
def refused(tmp_path):
    """What is said about a file of these lines."""

    def of(*lines: str, name: str = "bad.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return refusal(path)

    return of


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (MOONCAKE, "timestamp"), (MOONCAKE, "input_length"), (MOONCAKE, "output_length"),
        (SAVED, "arrival_s"), (SAVED, "input_tokens"), (SAVED, "block_tokens"), (SAVED, "delay_s"),
        (SESSION, "block_size"), (AGENT, "timestamp"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", DIGITS, "1e308", "1e400", "true", "[]"])
def test_a_number_that_is_none(refused, row, field, value):
    said = refused(json.dumps(row | {field: "@"}).replace('"@"', value))
    assert f"line 1: {field} is " in said
    assert "expected a" in said


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"timestamp": ' + "9" * 5000 + "}"])
def test_a_line_that_no_parser_reads(refused, line):
    assert "line 2: not readable as JSON" in refused(json.dumps(MOONCAKE), line)


@pytest.mark.parametrize("value", [DIGITS, "9" * 5000, "1e400", "nan", "1e300"])
def test_a_number_of_a_table_that_is_none(refused, value):
    said = refused("TIMESTAMP,ContextTokens,GeneratedTokens", f"2023-11-16 18:17:03,{value},5", name="bad.csv")
    assert "line 2: ContextTokens is" in said


def test_a_line_without_end(refused, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_CHARS", 1000)
    assert "line 2: longer than 1,000 characters" in refused(json.dumps(MOONCAKE), "x" * 5000)
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "x" * 5000]
    assert "line 2: longer than 1,000 characters" in refused(*rows, name="bad.csv")


def test_a_line_as_long_as_allowed_is_read(tmp_path, monkeypatch):
    line = json.dumps(MOONCAKE) + "\n"
    monkeypatch.setattr(records, "MAX_LINE_CHARS", len(line))
    path = tmp_path / "good.jsonl"
    path.write_text(line * 3)
    assert len(list(read_trace(path))) == 3


def test_what_a_request_is_refused_for_names_the_file(refused):
    assert "hash_ids repeat" in refused(json.dumps(MOONCAKE | {"hash_ids": [1, 1]}))
    far = json.dumps(MOONCAKE | {"timestamp": 1e15})
    assert "arrival_s is 1e+12; expected at most 1e+09 seconds" in refused(json.dumps(MOONCAKE), far)


def test_a_trace_over_thousands_of_years(refused):
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-01-01,5,5", "9999-01-01,5,5"]
    seconds = (datetime(9999, 1, 1) - datetime(2023, 1, 1)).total_seconds()
    assert f"request 1: arrival_s is {seconds:g}; expected at most" in refused(*rows, name="bad.csv")


@pytest.mark.parametrize("field", ["arrival_s", "delay_s"])
def test_the_longest_time(field):
    values = {"request_id": 0, "input_tokens": 1, "output_tokens": 1, "block_ids": (0,), "block_tokens": 1,
              "arrival_s": 0.0}  # fmt: skip
    assert getattr(TraceRequest(**values | {field: MAX_S}), field) == MAX_S
    with pytest.raises(TraceError, match=f"{field} is 2e"):
        TraceRequest(**values | {field: 2 * MAX_S})


def test_a_folder_in_place_of_a_trace(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"folder.jsonl: cannot be read: Is a directory"):
        list(read_trace(tmp_path / "folder.jsonl"))


def test_a_date_that_no_calendar_has(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "bad.parquet"
    columns = {key: [value] for key, value in MOONCAKE.items()}
    columns["timestamp"] = pyarrow.array([2**30], pyarrow.date32())
    parquet.write_table(pyarrow.table(columns), path)
    assert "after row 0: damaged, or not parquet" in refusal(path)
