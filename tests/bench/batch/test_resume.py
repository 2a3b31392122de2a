"""``bench batch`` taken up again: what counts as done, and what is found before any work."""

from __future__ import annotations

import json

import pytest

from cacheflow import cli
from cacheflow.bench.batch.summary import BatchSetting, summarise_batches
from cacheflow.bench.records.batch import BatchRecord
from cacheflow.bench.records.suites import read_records
from support.batch_records import batch_record

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("torch_threads")]

TINY = ("--lengths", "64,40", "--chunk", "32", "--suffix", "8", "--dtype", "float32", "--repeats", "1", "--ratios", "1",
        "--policies", "cake")  # fmt: skip
SHAPE = {"name": "tiny", "num_layers": 2, "hidden_size": 64, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16,
         "intermediate_size": 128, "vocab_size": 320}  # fmt: skip


@pytest.fixture
def shape_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SHAPE))
    return path


@pytest.fixture
def bench(shape_file, tmp_path, capsys):
    """Runs the command in one folder; the exit code and what was printed."""

    def run(*options, shape=shape_file):
        words = ["bench", "batch", "--out", str(tmp_path / "out"), *TINY, *map(str, options)]
        code = cli.main([*words, "--shape", str(shape)] if shape else words)
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).replace("\n", " ")

    return run


@pytest.fixture
def results(tmp_path):
    return tmp_path / "out" / "results.jsonl"


def test_other_deadlines_are_other_runs(bench, results):
    assert bench()[0] == 0
    assert bench("--slo-factor", 5)[0] == 0
    assert bench("--slo-factor", 5)[0] == 0
    records = read_records(results, BatchRecord)
    assert [record.slo_factor for record in records] == [2.0, 5.0]
    assert len(summarise_batches(records)) == 2


def test_a_changed_shape_of_the_same_name_is_another_model(bench, shape_file, results):
    bench()
    shape_file.write_text(json.dumps(SHAPE | {"intermediate_size": 96}))
    assert bench()[0] == 0
    first, second = read_records(results, BatchRecord)
    assert first.model == second.model
    assert first.fingerprint != second.fingerprint
    assert BatchSetting.of(first) != BatchSetting.of(second)
    bench()
    assert len(read_records(results, BatchRecord)) == 2


def test_records_from_before_these_fields_are_read_and_do_not_count_as_done(bench, results):
    bench()
    old = json.loads(results.read_text())
    del old["fingerprint"], old["slo_factor"]
    results.write_text(json.dumps(old) + "\n")
    assert bench()[0] == 0
    assert [record.slo_factor for record in read_records(results, BatchRecord)] == [None, 2.0]


def test_a_half_written_last_line_is_cut_off_before_the_work_and_its_round_runs_again(bench, results):
    bench()
    torn = results.read_text()[:-200]
    results.write_text(torn)
    code, said = bench()
    assert code == 0
    assert f"the last line was only half written when a run ended; its {len(torn):,} bytes were cut off" in said
    assert len(read_records(results, BatchRecord)) == 1


def test_a_damaged_line_is_named_before_the_work(bench, results, no_work):
    results.parent.mkdir()
    results.write_text(batch_record().to_json() + '\n{"suite": "batch"}\n')
    code, said = bench()
    assert code == 2
    assert "results.jsonl, line 2: malformed record" in said


def test_a_second_run_into_the_same_folder_is_refused_before_the_work(bench, results, no_work):
    from cacheflow.bench.results_file import only_run

    results.parent.mkdir()
    with only_run(results.parent):
        code, said = bench()
    assert code == 2
    assert "is in use by another run" in said


def test_a_folder_that_nothing_can_be_written_into_is_refused_before_the_work(bench, no_work):
    code, said = bench("--out", "/proc/self")
    assert code == 2
    assert "--out /proc/self cannot be used" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--model", "some"), "--model and --shape both say what is restored: drop one of them"),
        (("--ratios", "1e-300"), "--ratios 1e-300 must be between 0.001 and 1000"),
        (("--ratios", "1,nan"), "--ratios 1.0,nan must be above 0 and finite"),
        (("--slo-factor", "nan"), "--slo-factor is nan, must be above 0 and finite"),
        (("--time-limit-s", "nan"), "--time-limit-s is nan, must be above 0"),
    ],
)
def test_options_that_no_study_can_have(bench, no_work, options, reason):
    code, said = bench(*options)
    assert code == 2
    assert reason in said


def test_a_run_that_is_interrupted_goes_on_where_it_was(bench, results, monkeypatch):
    from cacheflow.bench.batch import rounds as batch_rounds

    real, calls = batch_rounds.run_batch_round, []

    def interrupted(*args, **options):
        calls.append(args[1].ratio)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(batch_rounds, "run_batch_round", interrupted)
    assert bench("--ratios", "1,2")[0] == 130
    assert [record.load_compute_ratio for record in read_records(results, BatchRecord)] == [1.0]
    assert bench("--ratios", "1,2")[0] == 0
    assert [record.load_compute_ratio for record in read_records(results, BatchRecord)] == [1.0, 2.0]
    assert calls == [1.0, 2.0, 2.0]
