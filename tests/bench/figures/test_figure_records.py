from pathlib import Path

import pytest
from msgspec.structs import replace

from cacheflow.bench.figures.command import read_figures, write_figures
from cacheflow.bench.figures.gains import RIVALS, gains
from cacheflow.bench.records.figure import PROBABILITIES, FigureRecord
from cacheflow.errors import ConfigError


def record(series: str = "cacheflow", **changes) -> FigureRecord:
    base = FigureRecord(
        suite="figure-6", series=series, policy=series, model="Qwen3-8B", gpu="H100",
        cost_source="roofline", link_bytes_per_s=1.25e9, chunk_tokens=512, num_layers=36,
        num_tokens=6144.0, suffix_tokens=256.0, load_compute_ratio=4.0, workload="alone", ttft_s=0.15, restore_s=0.14,
        bound_ttft_s=0.148, bound_restore_s=0.14, compute_busy=1.0, io_busy=0.9,
    )  # fmt: skip
    return replace(base, **changes)


def test_a_record_comes_back_from_its_line():
    many = record(
        num_requests=3,
        p99_ttft_s=0.2,
        bound_p99_ttft_s=0.19,
        in_time=0.5,
        slo_s=2.0,
        ttft_quantiles_s=tuple(0.15 for _ in PROBABILITIES),
    )
    for each in (record(), many):
        assert FigureRecord.from_json(each.to_json()) == each


def test_records_come_back_from_a_file_in_order(tmp_path: Path):
    written = [record("load", ttft_s=0.5), record()]
    write_figures(tmp_path / "results.jsonl", written)
    assert read_figures(tmp_path / "results.jsonl") == written


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ttft_s": 0.147}, "below its bound"),
        ({"restore_s": 0.139}, "below its bound"),
        ({"p99_ttft_s": 0.1, "bound_p99_ttft_s": 0.2}, "below its bound"),
        ({"ttft_s": float("nan")}, "nan"),
        ({"compute_busy": 1.01}, "compute_busy"),
        ({"io_busy": -0.1}, "io_busy"),
        ({"in_time": 2.0}, "in_time"),
        ({"ttft_quantiles_s": (0.1, 0.2)}, "2 values"),
    ],
)
def test_what_no_run_can_give_is_refused(changes: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        record(**changes)


def test_a_malformed_line_is_named(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text(f'{record().to_json()}\n{{"suite": "figure-6"}}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        read_figures(path)


def sweep(**ttfts_s: float) -> list[FigureRecord]:
    times_s = dict.fromkeys((*RIVALS, "cacheflow"), 0.3) | ttfts_s
    return [record(name, ttft_s=time_s) for name, time_s in times_s.items()]


def test_gains_are_over_the_best_of_each_group():
    (gain,) = gains(sweep(cacheflow=0.2, cake=0.25, cacheflow_v2=0.22, cacheflow_v1=0.28))
    assert gain.pure.series == "recompute"
    assert gain.existing.series == "cake"
    assert gain.rival.series == "cacheflow_v2"
    assert gain.over_pure == pytest.approx(1.5)
    assert gain.over_existing == pytest.approx(1.25)
    assert gain.over_rival == pytest.approx(1.1)
    assert not gain.loses


@pytest.mark.parametrize(("ours_s", "loses"), [(0.310, False), (0.312, True)])
def test_a_loss_counts_beyond_two_percent_and_five_milliseconds(ours_s: float, loses: bool):
    (gain,) = gains(sweep(cacheflow=ours_s, load=0.3))
    assert gain.loses is loses


def test_a_policy_is_taken_at_its_best_chunk_size_and_an_incomplete_setting_is_left_out():
    coarse = [replace(each, chunk_tokens=2048, ttft_s=each.ttft_s - 0.1) for each in sweep() if each.series == "load"]
    other = replace(record(), num_tokens=12_288.0)
    (gain,) = gains([*sweep(), *coarse, other])
    assert gain.existing.series == "load"
    assert gain.existing.chunk_tokens == 2048
