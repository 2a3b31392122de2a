"""Batches summarised: ratios within repeats, losing cells, and the simulator against what happened."""

from __future__ import annotations

import pytest
from rich.console import Console

from cacheflow.bench.batch.report import batch_tables, draw_batches
from cacheflow.bench.batch.summary import simulator_agreement, summarise_batches, ttft_by_request
from cacheflow.bench.table import LOSES
from support.batch_records import batch_record


def shown(records):
    console = Console(width=140, record=True)
    console.print(batch_tables(records))
    return console.export_text()


def test_medians_and_ratios_within_repeats():
    records = [
        batch_record("cake", ttft_s=(2.0, 4.0)),
        batch_record("mean_ttft", ttft_s=(1.0, 2.0)),
        batch_record("cake", ttft_s=(4.0, 8.0), repeat=1),
        batch_record("mean_ttft", ttft_s=(3.0, 3.0), repeat=1),
    ]
    (summary,) = summarise_batches(records)
    ours, rival = summary.of("mean_ttft"), summary.of("cake")
    assert ours["mean_ttft_s"].median == pytest.approx((1.5 + 3.0) / 2)
    assert (ours.over_rival.low, ours.over_rival.high) == (0.5, 0.5)
    assert ours.rival == "cake"
    assert not ours.loses
    assert rival.over_rival is None
    assert ours["mean_over_bound"].low == pytest.approx(1.0)
    assert ttft_by_request(ours) == (2.5, 2.0)


def test_a_policy_that_loses_by_its_own_objective_is_marked():
    records = [
        batch_record("fcfs", ttft_s=(1.0, 2.0)),
        batch_record("mean_ttft", ttft_s=(1.0, 3.0)),
        batch_record("slo", ttft_s=(1.9, 1.9)),
    ]
    (summary,) = summarise_batches(records)
    assert summary.of("mean_ttft").loses
    assert not summary.of("slo").loses
    text = shown(records)
    assert text.count(LOSES) == 2
    assert "lower bound" in text


def test_a_wrong_run_shows_no_time():
    records = [batch_record("fcfs", ttft_s=(1.0, 2.0)), batch_record("slo", ttft_s=(7.77, 7.77), correct=False)]
    text = shown(records)
    assert "no, 1 of 1" in text
    assert "7.77" not in text
    assert simulator_agreement(records).num_requests == 2


def test_settings_are_kept_apart_and_a_repeat_counts_once():
    records = [
        batch_record(load_compute_ratio=2.0),
        batch_record(load_compute_ratio=0.5),
        batch_record(load_compute_ratio=0.5, ttft_s=(5.0, 5.0)),
    ]
    summaries = summarise_batches(records)
    assert [each.setting.load_compute_ratio for each in summaries] == [0.5, 2.0]
    assert summaries[0].of("mean_ttft").num_runs == 1
    assert summaries[0].of("mean_ttft")["mean_ttft_s"].median == 5.0


def test_agreement_counts_errors_and_rankings():
    records = [
        batch_record("cake", ttft_s=(2.0, 4.0), simulated_s=(2.2, 4.0)),
        batch_record("fcfs", ttft_s=(2.0, 4.1), simulated_s=(2.0, 4.0)),
        batch_record("mean_ttft", ttft_s=(1.0, 2.0), simulated_s=(1.0, 5.0)),
    ]
    agreement = simulator_agreement(records)
    assert agreement.num_requests == 6
    assert agreement.max_error == pytest.approx(1.5)
    # cake and fcfs differ by less than 5 %; mean_ttft differs clearly from both, in both measures
    assert agreement.num_pairs == 4
    assert agreement.num_ranked_alike == 2  # its simulated mean is less, 3.0 of 3.1 and not of 3.0; its last end is not


def test_nothing_to_compare():
    assert simulator_agreement([]) is None
    assert simulator_agreement([batch_record(correct=False)]) is None


def test_the_starvation_column_is_there_when_it_was_bounded():
    kept = batch_record("fcfs", starvation_s=1.0, starvation_kept=True)
    assert "starved" in shown([kept])
    assert "broken" in shown([batch_record("fcfs", starvation_s=1.0, starvation_kept=False)])
    assert "starved" not in shown([batch_record("fcfs")])


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        batch_record(policy, load_compute_ratio=ratio) for policy in ("cake", "mean_ttft") for ratio in (0.5, 1.0)
    ]
    (path,) = draw_batches(records, tmp_path)
    assert path.name == "batch.png"
    assert path.stat().st_size > 10_000
