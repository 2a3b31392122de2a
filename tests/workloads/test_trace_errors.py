"""A bad trace is refused with the file, the line, the field and what is expected."""

import builtins
import gzip
import json

import pytest

from cacheflow.errors import ConfigError, TraceError
from cacheflow.workloads.traces import read_trace

GOOD = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


def trace(tmp_path, *rows, name="bad.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refusal(path, error=TraceError, **options):
    with pytest.raises(error) as raised:
        list(read_trace(path, **options))
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_length": None}, "input_length is missing; expected an integer, 1 or more"),
        ({"input_length": -3}, "input_length is -3; expected an integer, 1 or more"),
        ({"input_length": 0}, "input_length is 0; expected an integer, 1 or more"),
        ({"input_length": 1.5}, "input_length is 1.5; expected an integer"),
        ({"input_length": "600"}, "input_length is '600'; expected an integer"),
        ({"input_length": True}, "input_length is True; expected an integer"),
        ({"output_length": -1}, "output_length is -1; expected an integer, 0 or more"),
        ({"timestamp": float("nan")}, "timestamp is nan; expected a number"),
        ({"hash_ids": [0]}, "1 hash_ids for input_length 600; expected 2"),
        ({"hash_ids": [0, 1, 2]}, "3 hash_ids for input_length 600; expected 2"),
        ({"hash_ids": [0, -1]}, "hash_ids is [0, -1]; expected a list of integers, 0 or more"),
        ({"hash_ids": 7}, "hash_ids is 7; expected a list"),
    ],
)
def test_wrong_fields_are_named_with_their_line(tmp_path, change, said):
    message = refusal(trace(tmp_path, GOOD, {**GOOD, **change}))
    assert "bad.jsonl, line 2: " in message
    assert said in message


def test_time_that_goes_backwards_is_said_with_both_values(tmp_path):
    message = refusal(trace(tmp_path, GOOD, {**GOOD, "timestamp": 900}, {**GOOD, "timestamp": 800}))
    assert "line 3: timestamp 800 comes after 900" in message
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,1\n2023-11-16 18:15:45.68,1,1\n")
    assert "line 3: TIMESTAMP 2023-11-16 18:15:45.68" in refusal(path)


def test_malformed_json_and_rows_that_are_no_objects(tmp_path):
    assert "line 3: not JSON: Expecting property name enclosed in double quotes at column 2" in refusal(
        trace(tmp_path, GOOD, "", "{oops")
    )
    assert "line 1: [1, 2]; expected a JSON object" in refusal(trace(tmp_path, "[1, 2]"))


def test_empty_and_unknown_files(tmp_path):
    assert "empty; expected at least one request" in refusal(trace(tmp_path))
    header_only = tmp_path / "head.csv"
    header_only.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    assert "empty" in refusal(header_only)
    message = refusal(trace(tmp_path, {"prompt": 1, "reply": 2}))
    assert "no known trace format has the fields prompt, reply" in message
    assert "mooncake has hash_ids, input_length, timestamp" in message


def test_a_named_format_names_the_field_that_lacks(tmp_path):
    path = trace(tmp_path, {"timestamp": 0, "input_length": 5, "output_length": 1})
    assert "line 1: hash_ids is missing" in refusal(path, format="mooncake")
    assert "no known trace format" in refusal(path, format="claudecode")


def test_damaged_files(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(cut)
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(GOOD))
    assert "damaged" in refusal(plain)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"timestamp": "\xff"}\n')
    assert "damaged" in refusal(latin)


def test_arguments_are_refused_before_the_file_is_opened(tmp_path):
    path = tmp_path / "missing.jsonl"
    for options, said in (
        ({"format": "mooncke"}, "trace format 'mooncke' is not known; expected auto, cacheflow, mooncake"),
        ({"block_tokens": 0}, "block_tokens 0 must be 1 or more"),
        ({"limit": 0}, "limit 0 must be 1 or more"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_trace(path, **options)
    assert "missing.jsonl: cannot be read: No such file" in refusal(path, ConfigError)
    assert "expected a file that ends in .jsonl, .jsonl.gz" in refusal(tmp_path / "trace.txt", ConfigError)


def test_block_sizes_that_do_not_fit(tmp_path):
    assert "block_tokens 100 does not fit a trace of 512-token blocks" in refusal(
        trace(tmp_path, GOOD), ConfigError, block_tokens=100
    )


def test_fields_inside_lists_are_named_with_their_place(tmp_path):
    call = {"t": 0.0, "in": 128, "out": 1, "hash_ids": [1, 2]}
    session = {"id": "s", "block_size": 64, "requests": [call, {**call, "in": 200}]}
    assert "line 1, requests[1]: 2 hash_ids for 200 input tokens; expected 3" in refusal(trace(tmp_path, session))
    assert "line 1: requests is empty" in refusal(trace(tmp_path, {**session, "requests": []}))
    assert "requests[0] is 5; expected an object" in refusal(trace(tmp_path, {**session, "requests": [5]}))


def test_more_reused_than_there_is(tmp_path):
    row = {"trace": "a", "t": 0.0, "input": 100, "output": 9, "reused_tokens": 128}
    assert "reused_tokens is 128; expected at most input, 100" in refusal(trace(tmp_path, row))
    rounds = {
        "session_id": "s", "input_tokens_total": 10, "prefix_tokens": 11, "output_tokens": 1, "timing_events": [],
    }  # fmt: skip
    assert "prefix_tokens is 11; expected at most input_tokens_total, 10" in refusal(trace(tmp_path, rounds))
    assert "timing_events is empty" in refusal(trace(tmp_path, {**rounds, "prefix_tokens": 0}))


def test_a_trace_of_empty_prompts(tmp_path):
    row = {"timestamp": 1, "input": "", "output": "a", "session_id": "s"}
    assert "line 1: input is empty" in refusal(trace(tmp_path, row))


def test_csv_cells_that_are_missing_or_no_numbers(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n5\n")
    assert "line 2: num_decode_tokens is missing" in refusal(path)
    path.write_text("num_prefill_tokens,num_decode_tokens\n5,many\n")
    assert "line 2: num_decode_tokens is 'many'; expected an integer" in refusal(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert "pip install 'cacheflow-kv[traces]'" in refusal(tmp_path / "t.parquet", ConfigError)


def test_parquet_rows_are_read_like_json_ones(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {"trace": "a", "t": 0.0, "input": 640, "output": 9, "reused_tokens": 0, "api_time": None}
    rows = [row, {**row, "t": 5.0, "input": 700, "reused_tokens": 640}]
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_trace(path, block_tokens=64)
    assert second.block_ids[:10] == first.block_ids
    parquet.write_table(pyarrow.Table.from_pylist([row, {**row, "input": -1}]), path)
    assert "t.parquet, row 2: input is -1" in refusal(path)
    path.write_bytes(b"no parquet at all")
    assert "damaged, or not parquet" in refusal(path)
