"""``cacheflow bench batch`` on a tiny model, through the command line."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from cacheflow import cli
from cacheflow.bench.batch.policies import CONTENDERS
from cacheflow.bench.records.batch import BatchRecord
from cacheflow.bench.records.suites import read_records
from support.patience import PATIENT

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("torch_threads")]

TINY = ("--lengths", "64,128,40", "--chunk", "32", "--suffix", "16", "--dtype", "float32", "--repeats", "1")
TWO = ("--policies", "cake,mean_ttft", "--ratios", "1")


@pytest.fixture
def bench(model_folder, tmp_path, capsys):
    """Runs the command in one folder; the exit code, the records so far, and what was printed."""

    def run(*options):
        out = tmp_path / "out"
        code = cli.main(["bench", "batch", "--out", str(out), "--model", str(model_folder), *options])
        results = out / "results.jsonl"
        printed = capsys.readouterr()
        return code, read_records(results, BatchRecord) if results.exists() else [], printed.out + printed.err

    return run


def test_every_policy_is_measured_simulated_and_shown(bench, tmp_path):
    code, records, shown = bench(*TINY, "--ratios", "1")
    assert code == 0
    assert [record.policy for record in records] == list(CONTENDERS)
    assert len({record.order for record in records}) == 1
    for record in records:
        assert record.correct is True
        assert sorted(each.num_tokens for each in record.requests) == [40, 64, 128]
        assert all(
            each.recomputed_cells + each.loaded_cells == -(-each.num_tokens // 32) * 3 for each in record.requests
        )
        assert record.bound_makespan_s <= record.simulated.makespan_s * 1.0001
        assert record.bound_mean_ttft_s <= record.simulated.mean_ttft_s * 1.0001
        assert record.starvation_kept is None
        assert record.compute_drift > 0
        assert all(each.deadline_s > 0 for each in record.requests)
    for name in CONTENDERS:
        assert name in shown
    assert "simulator against reality, 24 requests" in shown
    assert (tmp_path / "out" / "batch.png").exists()


def test_orders_differ_between_repeats_and_are_the_same_for_all_policies(bench):
    lengths = ("--lengths", "32,40,48,56,64,72", *TINY[2:-1], "3")
    code, records, _ = bench(*lengths, *TWO)
    assert code == 0
    orders = {}
    for record in records:
        orders.setdefault(record.repeat, set()).add(record.order)
    assert [len(each) for each in orders.values()] == [1, 1, 1]
    assert len(set().union(*orders.values())) > 1


def test_the_same_command_runs_nothing_again_and_more_repeats_go_on(bench):
    _, first, _ = bench(*TINY, *TWO)
    _, second, shown = bench(*TINY, *TWO)
    assert second == first
    assert "are not run again" in shown
    _, third, _ = bench(*TINY[:-1], "2", *TWO)
    assert third[: len(first)] == first
    assert Counter(record.repeat for record in third) == {0: 2, 1: 2}


def test_arrivals_one_after_the_other_and_a_bound_on_starvation(bench):
    code, records, shown = bench(*TINY, *TWO, "--arrivals", "0.05", "--starvation-s", "0.01", "--slo-factor", "5")
    assert code == 0
    for record in records:
        gaps = [each.arrival_s for each in record.requests]
        assert gaps[0] == 0.0
        assert all(after - before > 0.04 for before, after in pairwise(gaps))
        assert record.starvation_kept is not None
        assert record.starvation_s == 0.01
    assert "0.05 s apart" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policies", "best"), "known are cake"),
        (("--policies", ","), "--policies is empty"),
        (("--ratios", "0"), "--ratios"),
        (("--lengths", "0,5"), "--lengths"),
        (("--suffix", "0"), "--suffix"),
        (("--arrivals", "-1"), "--arrivals"),
        (("--starvation-s", "0"), "--starvation-s"),
        (("--slo-factor", "-2"), "--slo-factor"),
        (("--lengths", "60000"), "longest prompt"),
    ],
)
def test_bad_options_are_one_line(bench, options, message):
    code, records, shown = bench(*TINY, *options)
    assert code == 2
    assert records == []
    assert message in shown


def test_arrivals_that_are_no_number(bench):
    with pytest.raises(SystemExit):
        bench(*TINY, "--arrivals", "soon")


def test_a_wrong_reference_is_found_out(model_folder):
    """The check can fail: a reference changed by one bit makes the run wrong."""
    from cacheflow.bench.batch.policies import find_contender
    from cacheflow.bench.batch.simulate import BatchCase
    from cacheflow.bench.batch.study import BatchStudy, BatchStudyOptions
    from support.embedded_cases import random_tokens, tiny

    options = BatchStudyOptions(lengths=(64, 96), suffix_tokens=8, chunk_tokens=32, cost_repeats=1, executor=PATIENT)
    study = BatchStudy(tiny(), random_tokens(options.num_tokens), options=options)
    study.prepare()
    problems = study.problems(bytes_per_s=study.bytes_per_s(1.0))
    case = BatchCase(problems=problems, arrivals_s=[0.0, 0.0], deadlines_s=[1.0, 1.0])
    assert [run.correct for run in study.run(find_contender("fcfs"), case, order=(0, 1))] == [True, True]
    study.prompts[1].reference.kv_L2THD[0, 0, 5, 0, 0] += 1.0
    assert [run.correct for run in study.run(find_contender("fcfs"), case, order=(0, 1))] == [True, False]
    study.close()


def test_starvation_is_kept_or_not():
    from cacheflow.bench.batch.rounds import starvation_kept
    from cacheflow.plan.bound import bound
    from support.problems import transformer_problem

    problems = [transformer_problem(num_tokens=1024, num_blocks=4)] * 2
    alone_s = bound(problems[0]).ttft_s
    check = {"problems": problems, "arrivals_s": [0.0, 0.5]}
    assert starvation_kept(**check, ttft_s=[1e9, 1e9], starvation_s=float("inf")) is None
    assert starvation_kept(**check, ttft_s=[alone_s, 2 * alone_s], starvation_s=0.1) is True
    assert starvation_kept(**check, ttft_s=[1.2 * alone_s + 0.1, alone_s], starvation_s=0.1) is False
