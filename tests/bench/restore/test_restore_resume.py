"""``bench restore`` taken up again: what counts as done, and what is found before any work."""

from __future__ import annotations

import pytest

from cacheflow import cli
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.bench.summary import summarise
from support.sample_records import sample_record

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("torch_threads")]

TINY = (
    *("--tokens", "64", "--chunk", "32", "--suffix", "8", "--dtype", "float32", "--repeats", "1"),
    *("--policies", "load", "--objectives", "ttft"),
)


@pytest.fixture
def bench(model_folder, tmp_path, capsys):
    """Runs the command in one folder; the exit code and what was printed."""

    def run(*options):
        words = ["bench", "restore", "--out", str(tmp_path / "out"), "--model", str(model_folder), *TINY]
        code = cli.main([*words, *map(str, options)])
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).replace("\n", " ")

    return run


@pytest.fixture
def results(tmp_path):
    return tmp_path / "out" / "results.jsonl"


def test_other_blocks_and_another_store_are_other_runs(bench, results):
    one = ("--ratios", 1)
    for more in ((), ("--layers-per-block", 3), ("--store", "file"), ("--layers-per-block", 3)):
        assert bench(*one, *more)[0] == 0
    records = read_records(results, RestoreRecord)
    kinds = [(record.layers_per_block, record.store) for record in records]
    assert kinds == [(1, "memory"), (3, "memory"), (1, "file")]
    assert all(record.fingerprint for record in records)
    assert len(summarise(records)) == 3
    assert len(list(results.parent.glob("*.png"))) >= 3


def test_another_models_records_do_not_count_as_done(bench, results):
    results.parent.mkdir()
    bench("--ratios", 1)
    results.write_text(results.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    bench("--ratios", 1)
    assert len(read_records(results, RestoreRecord)) == 2


def test_a_half_written_last_line_is_cut_off_before_the_work(bench, results, no_work, monkeypatch):
    from cacheflow.bench.restore import command as restore_command

    seen = []
    monkeypatch.setattr(restore_command, "_run_length", lambda *args: bool(seen.append(results.read_text())) or True)
    results.parent.mkdir()
    whole = sample_record().to_json() + "\n"
    results.write_text(whole + whole[:100])
    code, said = bench()
    assert code == 0
    assert "the last line was only half written" in said
    assert seen == [whole]


def test_a_damaged_line_is_named_before_the_work(bench, results, no_work):
    results.parent.mkdir()
    results.write_text('{"suite"\n')
    code, said = bench()
    assert code == 2
    assert "results.jsonl, line 1: not JSON" in said


def test_a_second_run_into_the_same_folder_is_refused_before_the_work(bench, results, no_work):
    from cacheflow.bench.results_file import only_run

    results.parent.mkdir()
    with only_run(results.parent):
        code, said = bench()
    assert code == 2
    assert "is in use by another run" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--ratios", 1, "--gbps", 1), "--ratios and --gbps both say how fast the link is: drop one of them"),
        (("--shape", "Qwen3-8B"), "--model and --shape both say what is restored: drop one of them"),
        (("--flash3",), "--flash3 is of --device cuda: drop it"),
        (("--perturb", "--store", "pinned"), "--perturb needs the throttled store"),
    ],
)
def test_options_that_contradict_each_other(bench, no_work, options, reason):
    code, said = bench(*options)
    assert code == 2
    assert reason in said
