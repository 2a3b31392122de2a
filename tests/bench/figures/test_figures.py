from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from msgspec.structs import replace

from cacheflow.bench.figures.command import read_figures
from cacheflow.bench.figures.drawing import draw_figures
from cacheflow.bench.figures.registry import FIGURES, find_figures
from cacheflow.bench.figures.runs import ALONE
from cacheflow.bench.records.figure import FigureRecord
from cacheflow.cli import main
from cacheflow.errors import ConfigError

NUMBERS = tuple(FIGURES)
QUICK = (3, 6, 9, 14)
EVERY = [number if number in QUICK else pytest.param(number, marks=pytest.mark.long) for number in NUMBERS]
RIVALS = {contender.name for contender in ALONE}


@cache
def reduced(number: int) -> tuple[FigureRecord, ...]:
    return tuple(FIGURES[number].records(True))


def test_the_papers_figures_and_ours_are_there():
    assert sorted(NUMBERS) == list(range(3, 16))
    assert all(bool(FIGURES[number].published) == (number <= 10 or number == 15) for number in NUMBERS)


@pytest.mark.slow
@pytest.mark.parametrize("number", EVERY)
def test_every_setting_of_a_figure_has_every_series(number: int):
    by_setting: dict[tuple, Counter] = {}
    for record in reduced(number):
        assert record.suite == f"figure-{number}"
        assert record.cost_source == "roofline"
        by_setting.setdefault((record.num_stages, *record.case), Counter())[record.series] += 1
    for num_stages in {record.num_stages for record in reduced(number)}:
        found = [series for setting, series in by_setting.items() if setting[0] == num_stages]
        assert found[1:] == found[:-1]
        if num_stages == 1 and number not in (3, 12):
            assert found[0].keys() >= RIVALS


@pytest.mark.slow
@pytest.mark.parametrize("number", EVERY)
def test_records_hold_times_above_their_bounds_and_shares(number: int):
    # A record refuses what breaks them when it is made; here it is that they are there at all.
    for record in reduced(number):
        assert record.ttft_s > 0
        assert record.bound_ttft_s > 0
        if record.num_stages == 1:
            assert record.compute_busy is not None
            assert record.io_busy is not None
            assert max(record.compute_busy, record.io_busy) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [6, pytest.param(10, marks=pytest.mark.long), pytest.param(13, marks=pytest.mark.long)]
)
def test_simulating_again_gives_the_same_records(number: int):
    assert tuple(FIGURES[number].records(True)) == reduced(number)


@pytest.mark.slow
def test_ours_is_never_far_behind_where_rivals_are_compared():
    cells: dict[tuple, dict[str, float]] = {}
    for record in reduced(14):
        cells.setdefault((record.num_tokens, record.suffix_tokens, record.link_bytes_per_s), {})[record.series] = (
            record.ttft_s
        )
    for times_s in cells.values():
        assert times_s["cacheflow"] <= min(times_s.values()) * 1.05 + 0.02


@pytest.mark.slow
@pytest.mark.long
def test_pictures_are_drawn_from_the_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    records = [FigureRecord.from_json(record.to_json()) for number in NUMBERS for record in reduced(number)]

    def refuse(*args: object) -> None:
        raise AssertionError("drawing simulates")

    monkeypatch.setattr("cacheflow.bench.figures.runs.simulate", refuse)
    files = draw_figures(records, tmp_path)
    assert [file.name for file in files] == [f"figure-{number}.png" for number in NUMBERS]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


@pytest.mark.slow
def test_a_losing_cell_is_marked(tmp_path: Path):
    pytest.importorskip("matplotlib")
    behind = [
        replace(record, ttft_s=record.ttft_s * 2 + 1) if record.series == "cacheflow" else record
        for record in reduced(14)
    ]
    (better,) = draw_figures(reduced(14), tmp_path / "as-it-is")
    (worse,) = draw_figures(behind, tmp_path / "behind")
    assert better.read_bytes() != worse.read_bytes()


@pytest.mark.parametrize("numbers", [[2], [3, 16], [0]])
def test_an_unknown_figure_is_refused_with_the_list(numbers: list[int]):
    with pytest.raises(ConfigError, match="known are 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"):
        find_figures(numbers)


@pytest.mark.slow
def test_the_command_simulates_writes_and_draws_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert main(["bench", "figures", "--out", str(tmp_path), "--only", "9,6", "--fast"]) == 0
    records = read_figures(tmp_path / "results.jsonl")
    assert list(dict.fromkeys(record.suite for record in records)) == ["figure-6", "figure-9"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["figure-6.png", "figure-9.png"]
    assert "over best" in capsys.readouterr().out

    again = tmp_path / "again"
    drawn = ["bench", "figures", "--out", str(again), "--only", "6", "--results", str(tmp_path / "results.jsonl")]
    assert main(drawn) == 0
    assert sorted(path.name for path in again.iterdir()) == ["figure-6.png"]
    assert (again / "figure-6.png").read_bytes() == (tmp_path / "figure-6.png").read_bytes()


def test_the_command_refuses_an_unknown_figure_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "figures", "--out", str(tmp_path / "out"), "--only", "2"]) == 2
    assert "there is no figure 2; known are 3, 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_figure_in_the_same_folder_leaves_the_first_ones_records(tmp_path: Path):
    for number in ("3", "6", "3"):
        assert main(["bench", "figures", "--out", str(tmp_path), "--only", number, "--fast"]) == 0
    records = read_figures(tmp_path / "results.jsonl")
    assert {record.suite for record in records} == {"figure-3", "figure-6"}
    assert len({record.to_json() for record in records}) == len(records)
    assert (
        main(
            [
                "bench",
                "figures",
                "--out",
                str(tmp_path / "x"),
                "--only",
                "8",
                "--results",
                str(tmp_path / "results.jsonl"),
            ]
        )
        == 2
    )
