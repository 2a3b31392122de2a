"""``bench figures``: options that contradict each other, folders that hold something else or that others write to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from cacheflow.bench.figures import command
from cacheflow.bench.figures.command import read_figures, write_figures
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.cli import main
from support.batch_records import batch_record

RECORD = FigureRecord(
    suite="figure-6", series="cacheflow", policy="cacheflow", model="Qwen3-8B", gpu="H100",
    cost_source="roofline", link_bytes_per_s=1.25e9, chunk_tokens=512, num_layers=36,
    num_tokens=6144.0, suffix_tokens=256.0, load_compute_ratio=4.0, workload="alone", ttft_s=0.15, restore_s=0.14,
    bound_ttft_s=0.148, bound_restore_s=0.14, compute_busy=1.0, io_busy=0.9,
)  # fmt: skip


class Stub:
    """A figure whose records are made by a test."""

    number, title = 6, "six"

    def __init__(self, suite: str, make) -> None:
        self.suite, self._make = suite, make

    def records(self, fast: bool) -> Iterator[FigureRecord]:
        return self._make()


@pytest.fixture
def simulate(tmp_path: Path):
    """Simulates one figure with these records into the folder."""
    from rich.console import Console

    def run(suite: str, make) -> None:
        command.simulate_figures([Stub(suite, make)], tmp_path / "results.jsonl", fast=True, console=Console())

    return run


def test_drawing_is_no_simulating(tmp_path, capsys):
    write_figures(tmp_path / "r.jsonl", [RECORD])
    words = ["bench", "figures", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "r.jsonl"), "--fast"]
    assert main(words) == 2
    assert "--fast is of simulating, --results draws records that are there: drop one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_records_that_another_run_writes_meanwhile_are_kept(simulate, tmp_path):
    other = replace(RECORD, suite="figure-9")

    def meanwhile() -> Iterator[FigureRecord]:
        simulate("figure-9", lambda: iter([other]))
        yield RECORD

    simulate("figure-6", meanwhile)
    assert read_figures(tmp_path / "results.jsonl") == [other, RECORD]


def test_a_half_written_line_is_cut_off_before_anything_is_simulated(simulate, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    write_figures(path, [replace(RECORD, suite="figure-9")])
    whole = path.read_text()
    path.write_text(whole + whole[:50])

    def look() -> Iterator[FigureRecord]:
        assert path.read_text() == whole
        yield RECORD

    simulate("figure-6", look)
    assert "the last line was only half written" in capsys.readouterr().out.replace("\n", " ")
    assert len(read_figures(path)) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (batch_record().to_json(), "holds no records of figures alone, but of batch"),
        ("[]", "line 1: malformed record: Expected `object`, got `array`"),
        ('{"suite": "figure-6"}', "line 1: malformed record: Object missing required field `series`"),
        ("9" * 5000, "line 1: "),
    ],
    ids=["another benchmark's", "list", "half", "digits"],
)
def test_a_folder_with_other_records_is_refused_before_anything_is_simulated(tmp_path, capsys, line, reason):
    (tmp_path / "results.jsonl").write_text(line + "\n")
    assert main(["bench", "figures", "--out", str(tmp_path), "--only", "14"]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "FigureRecord" not in error
    assert (tmp_path / "results.jsonl").read_text() == line + "\n"


def test_a_folder_that_nothing_can_be_written_into(capsys):
    assert main(["bench", "figures", "--out", "/proc/self", "--only", "14"]) == 2
    assert "--out /proc/self cannot be used" in capsys.readouterr().err
