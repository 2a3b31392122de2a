"""Records of batches: there and back, and what they refuse."""

from __future__ import annotations

import json

import pytest

from cacheflow.bench.records.batch import BatchRecord, BatchTimes
from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.errors import ConfigError
from support.batch_records import batch_record


def test_there_and_back(tmp_path):
    records = [batch_record(), batch_record("cake", starvation_s=3.0, starvation_kept=False, correct=False)]
    path = tmp_path / "results.jsonl"
    for record in records:
        append_record(path, record)
    assert read_records(path, BatchRecord) == records


def test_times_of_a_batch():
    times = BatchTimes.of([0.0, 1.0, 2.0], [4.0, 1.0, 3.0])
    assert times.mean_ttft_s == pytest.approx(8.0 / 3)
    assert times.p99_ttft_s == 4.0
    assert times.makespan_s == 5.0
    assert times.ttft_s == (4.0, 1.0, 3.0)


def test_late_requests_are_counted():
    assert batch_record(ttft_s=(1.0, 3.0)).num_late == 1
    assert batch_record(ttft_s=(2.0, 2.0)).num_late == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"mean_ttft_s": 0.0},
        {"makespan_s": float("inf")},
        {"compute_busy": 1.5},
        {"correct": None},
        {"order": (0, 0)},
        {"order": (0, 1)},
        {"lengths": (512, 1024, 2048)},
        {"compute_drift": -1.0},
    ],
)
def test_what_no_run_can_have_is_refused(bad):
    with pytest.raises(ConfigError, match="record"):
        batch_record(**bad)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.pop("requests"), "malformed"),
        (lambda values: values.update(unheard="of"), "unheard"),
        (lambda values: values["simulated"].pop("ttft_s"), "malformed"),
        (lambda values: values["simulated"].update(ttft_s=[1.0]), "1 requests were simulated"),
    ],
    ids=["no requests", "unknown field", "no simulated times", "too few simulated times"],
)
def test_malformed_lines_are_refused_with_their_number(tmp_path, edit, message):
    values = json.loads(batch_record().to_json())
    edit(values)
    path = tmp_path / "results.jsonl"
    path.write_text(batch_record().to_json() + "\n\n" + json.dumps(values) + "\n")
    with pytest.raises(ConfigError, match=f"line 3.*{message}"):
        read_records(path, BatchRecord)


@pytest.mark.parametrize("line", ["[]", "{", "3"])
def test_lines_that_are_no_record(line):
    with pytest.raises(ConfigError):
        BatchRecord.from_json(line)
