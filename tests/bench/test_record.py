import json
import math
import socket
from multiprocessing import get_context
from pathlib import Path

import pytest

from cacheflow.bench.environment import environment
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.restore import GuardRecord, RestoreRecord
from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.errors import ConfigError
from support.sample_records import sample_record


def test_a_time_without_a_check_cannot_be_recorded():
    with pytest.raises(ConfigError, match="without a check: correct is None"):
        sample_record(correct=None)
    with pytest.raises(ConfigError, match="without a check"):
        sample_record(correct=None, restore_s=None)
    with pytest.raises(ConfigError, match="without a check: correct is 1"):
        sample_record(correct=1)


def test_an_unchecked_run_is_recorded_without_times():
    record = sample_record(correct=None, restore_s=None, ttft_s=None)
    assert not record.timed


def test_a_wrong_run_keeps_its_time_but_may_not_show_it():
    record = sample_record(correct=False)
    assert record.restore_s is not None
    assert not record.timed


@pytest.mark.parametrize(
    "changes",
    [
        {"restore_s": -1.0},
        {"ttft_s": math.nan},
        {"bound_ttft_s": math.inf},
        {"num_tokens": -1},
        {"num_layers": 0},
        {"compute_busy": 1.5},
        {"link_bytes_per_s": 0.0},
        {"link_bytes_per_s": math.nan},
        {"load_compute_ratio": -1.0},
        {"policy": ""},
    ],
    ids=lambda changes: next(iter(changes)) + "=" + str(next(iter(changes.values()))),
)
def test_impossible_numbers_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        sample_record(**changes)


def test_records_come_back_as_they_were_written(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    records = [
        sample_record(guard=GuardRecord(choice="hybrid", reason="12 % under load")),
        sample_record(suffix_tokens=0, ttft_s=None, bound_ttft_s=None, link_bytes_per_s=None, repeat=1),
        sample_record(perturbation={"cost_error": 2.0}, correct=False),
    ]
    for record in records:
        append_record(path, record)
    assert read_records(path, RestoreRecord) == records
    assert len(path.read_text().splitlines()) == 3


def test_a_link_without_limit_is_none():
    assert sample_record(link_bytes_per_s=math.inf) == sample_record(link_bytes_per_s=None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param("{", "not JSON", id="truncated"),
        pytest.param("[]", "malformed record: Expected `object`, got `array`", id="list"),
        pytest.param('{"suite": "restore"}', "missing required field `policy`", id="fields missing"),
        pytest.param('{"suite": "x"}', "suite is 'x', must be one of restore, perturbed", id="suite unknown"),
        pytest.param('{"suite": "restore", "speed": 1}', "unknown field `speed`", id="field unknown"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, reason: str):
    path = tmp_path / "results.jsonl"
    path.write_text(sample_record().to_json() + "\n\n" + line + "\n")
    with pytest.raises(ConfigError, match=f"line 3: .*{reason}"):
        read_records(path, RestoreRecord)


def test_a_value_of_the_wrong_type_is_named_by_line(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    values = json.loads(sample_record().to_json()) | {"num_tokens": "many"}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"line 1: malformed record: Expected `int`, got `str` - at `\$.num_tokens`"):
        read_records(path, RestoreRecord)


def test_a_missing_results_file_is_an_error_of_ours(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl", BenchRecord)


def _append_many(path: Path, policy: str) -> None:
    for repeat in range(50):
        append_record(path, sample_record(policy=policy, repeat=repeat))


def test_processes_may_append_to_one_file(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    context = get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, name)) for name in ("load", "cake")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(read_records(path, RestoreRecord)) == 100


def test_the_environment_names_versions_but_no_host_or_path():
    where = environment(num_threads=2)
    assert where["num_threads"] == 2
    assert where["python"]
    text = json.dumps(where)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text
    assert isinstance(RestoreRecord.from_json(sample_record(environment=where).to_json()), RestoreRecord)
