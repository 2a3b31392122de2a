from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.bench.records.vllm import NEIGHBOUR, VllmRecord
from cacheflow.bench.summary import summarise
from cacheflow.bench.vllm.report import draw_vllm, vllm_tables
from cacheflow.errors import ConfigError
from support.sample_records import sample_record


def vllm_record(**changes: Any) -> VllmRecord:
    """A plausible record, with fields changed."""
    values: dict[str, Any] = {
        "suite": "vllm", "policy": "cacheflow", "model": "tiny", "device": "cpu", "dtype": "bfloat16",
        "num_tokens": 4096, "suffix_tokens": 37, "chunk_tokens": 512, "num_layers": 30, "link_bytes_per_s": 2e7,
        "load_compute_ratio": 1.0, "repeat": 0, "restore_s": None, "ttft_s": 2.6, "bound_restore_s": 2.4,
        "bound_ttft_s": 2.5, "compute_busy": None, "io_busy": None, "recomputed_cells": 120, "loaded_cells": 120,
        "wasted_bytes": 0, "correct": True, "environment": {"vllm": "0.32.0"}, "cached_tokens": 4096,
        "equal_tokens": 32, "compared_tokens": 32, "first_logprob_distance": 0.0,
    }  # fmt: skip
    return VllmRecord(**{**values, **changes})


def test_records_come_back_as_they_were_written_and_other_suites_are_skipped(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    records = [
        vllm_record(),
        vllm_record(policy="vllm", correct=False, equal_tokens=3, note="tokens differ"),
        vllm_record(perturbation=NEIGHBOUR, itl_mean_s=0.02, itl_p99_s=0.05, itl_max_s=0.06, repeat=1),
    ]
    append_record(path, sample_record())
    for record in records:
        append_record(path, record)
    assert read_records(path, VllmRecord) == records


def test_a_time_counts_without_a_restoration_time():
    assert vllm_record().timed
    assert not vllm_record(correct=False, note="x").timed
    assert not vllm_record(ttft_s=None).timed


def test_a_time_without_a_check_is_refused_here_too():
    with pytest.raises(ConfigError, match="without a check"):
        vllm_record(correct=None)


def test_differing_tokens_count_as_correct_only_with_an_explanation():
    with pytest.raises(ConfigError, match="needs a note"):
        vllm_record(equal_tokens=31)
    assert vllm_record(equal_tokens=31, note="a tie").correct


@pytest.mark.parametrize(
    "changes", [{"equal_tokens": 33}, {"cached_tokens": -1}, {"itl_max_s": -1.0}, {"first_logprob_distance": -0.1}]
)
def test_impossible_values_are_refused(changes: dict[str, Any]):
    with pytest.raises(ConfigError):
        vllm_record(**changes)


def test_a_malformed_line_is_named(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text(vllm_record().to_json() + "\n" + '{"suite": "vllm"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_records(path, VllmRecord)


def _shown(records: list[VllmRecord]) -> str:
    console = Console(width=150)
    with console.capture() as capture:
        console.print(vllm_tables(records))
    return capture.get()


def test_a_table_shows_medians_the_bound_and_losses():
    records = [vllm_record(policy="vllm", ttft_s=4.8), vllm_record(ttft_s=5.2)]
    shown = _shown(records)
    assert "4.80 s" in shown
    assert "5.20 s" in shown
    assert "2.50 s" in shown  # the bound
    assert "‼" in shown  # ours lost by more than promised
    assert "20.0 MB/s" in shown


def test_a_wrong_policy_shows_no_time():
    shown = _shown([vllm_record(ttft_s=3.21, correct=False, equal_tokens=1, note="tokens differ from token 1 on")])
    assert "3.21" not in shown
    assert "no, 1 of 1" in shown
    assert "tokens differ from token 1 on" in shown


def test_runs_beside_a_neighbour_are_a_setting_of_their_own():
    beside = vllm_record(perturbation=NEIGHBOUR, itl_mean_s=0.021, itl_p99_s=0.055, itl_max_s=0.066)
    assert len(summarise([vllm_record(), beside])) == 2
    assert "66.0 ms" in _shown([beside])
    tie = vllm_record(perturbation=NEIGHBOUR, equal_tokens=15, note="tokens differ from token 15 on: a tie")
    (row,) = [line for line in _shown([tie]).splitlines() if line.startswith(" cacheflow ")]
    assert row.split()[-1] == "tie"
    assert "ITL" not in _shown([vllm_record()])


def test_a_latency_above_the_one_asked_for_is_marked_and_runs_without_one_are_another_setting():
    times = {"itl_mean_s": 0.021, "itl_max_s": 0.066}
    asked = {**NEIGHBOUR, "itl_slo_ms": 60.0}
    kept = vllm_record(perturbation=asked, itl_p99_s=0.055, **times)
    broken = vllm_record(policy="cake", perturbation=asked, itl_p99_s=0.061, **times)
    shown = _shown([kept, broken])
    assert "itl_slo_ms 60" in shown
    assert "61.0 ms >SLO" in shown
    assert shown.count(">SLO") == 1
    without = vllm_record(perturbation=NEIGHBOUR, itl_p99_s=0.061, **times)
    assert ">SLO" not in _shown([without])
    assert len(summarise([kept, without])) == 2


def test_a_figure_is_drawn_per_study(tmp_path: Path):
    pytest.importorskip("matplotlib")
    records = [
        vllm_record(policy=policy, load_compute_ratio=ratio, ttft_s=ttft_s)
        for policy, ttft_s in (("vllm", 4.8), ("lmcache", 3.0), ("cacheflow", 2.0))
        for ratio in (0.25, 1.0, 4.0)
    ]
    (path,) = draw_vllm(records, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
