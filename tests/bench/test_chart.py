import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from cacheflow.bench.chart import draw_results, in_order
from cacheflow.errors import ConfigError
from support.sample_records import sample_record, sample_sweep


def test_records_become_figures(tmp_path: Path):
    pytest.importorskip("matplotlib")
    alone = [replace(record, suffix_tokens=0, ttft_s=None, bound_ttft_s=None) for record in sample_sweep()]
    files = draw_results([*sample_sweep(), *alone], tmp_path / "figures")
    assert [file.name for file in files] == [
        "restore-tiny-cpu-float32-4096-c512-over-bound.png",
        "restore-tiny-cpu-float32-4096-c512-restore.png",
        "restore-tiny-cpu-float32-4096-c512-ttft-256.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_one_ratio_and_no_suffix_still_draws(tmp_path: Path):
    pytest.importorskip("matplotlib")
    record = sample_record(suffix_tokens=0, ttft_s=None, bound_ttft_s=None)
    wrong = sample_record(suffix_tokens=0, ttft_s=None, bound_ttft_s=None, policy="cake", correct=False)
    files = draw_results([record, wrong], tmp_path)
    assert [file.name for file in files] == ["restore-tiny-cpu-float32-4096-c512-restore.png"]


def test_runs_that_were_all_wrong_are_not_drawn(tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_results([sample_record(correct=False)], tmp_path)


def test_policies_stand_in_one_order_with_ours_last():
    assert in_order(("cacheflow", "load", "novel", "recompute", "load")) == ["novel", "recompute", "load", "cacheflow"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'cacheflow-kv\[plots\]'"):
        draw_results([sample_record()], tmp_path)
