import pytest
from rich.console import Console

from cacheflow.bench.summary import console_tables, summarise, sweep_caption, sweep_markdown
from cacheflow.bench.table import BREAKS, LOSES, print_whole, seconds, text_table
from support.sample_records import sample_record, sample_sweep


def render(records) -> str:
    console = Console(width=110, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(console_tables(summarise(records)))
    return capture.get()


def test_every_policy_and_the_bound_stand_in_the_table():
    text = render(sample_sweep())
    assert "lower bound" in text
    assert text.count("cake") == 3
    assert "load/compute 0.5" in text
    assert LOSES not in text


def test_a_loss_is_flagged_and_explained():
    assert f"1.01{LOSES}" in render([sample_record(ttft_s=1.01), sample_record(policy="cake", ttft_s=1.0)])
    text = render([sample_record(ttft_s=1.5), sample_record(policy="cake", ttft_s=1.0)])
    assert f"1.50{BREAKS}" in text
    assert "by more than 2 % + 5 ms" in text


def test_a_rivals_loss_is_no_flag():
    text = render([sample_record(ttft_s=1.0), sample_record(policy="cake", ttft_s=2.0)])
    assert LOSES not in text
    assert BREAKS not in text


def test_the_time_of_a_wrong_run_is_never_printed():
    wrong = [sample_record(ttft_s=0.777, restore_s=0.666, correct=False), sample_record(policy="cake")]
    for text in (render(wrong), sweep_markdown(summarise(wrong))):
        assert "wrong" in text
        assert "777" not in text
        assert "666" not in text


def test_markdown_has_a_column_a_ratio_and_the_bound_last():
    lines = sweep_markdown(summarise(sample_sweep())).splitlines()
    assert lines[0] == "| load time / compute time | 0.5 | 1 | 2 |"
    assert lines[-2].startswith("| **cacheflow** | **1.80 s (1.57×)**")
    assert lines[-1] == "| *lower bound* | *1.15 s* | *1.15 s* | *1.15 s* |"
    assert len({line.count("|") for line in lines}) == 1


def test_markdown_needs_settings_that_differ_in_the_ratio_alone():
    with pytest.raises(ValueError, match="one setting for each"):
        sweep_markdown([])
    with pytest.raises(ValueError, match="one setting for each"):
        sweep_markdown(summarise([sample_record(), sample_record(num_tokens=8192)]))


def test_the_caption_says_what_where_and_how_often():
    records = sample_sweep()
    caption = sweep_caption(summarise(records), records[0].environment)
    assert "Time to first token, median of 3 alternating runs" in caption
    assert "test processor (2 threads), torch 2.13.0" in caption
    assert "4,096 cached and 256 new tokens" in caption


@pytest.mark.parametrize(
    ("time_s", "text"),
    [(0.00123, "1.23 ms"), (0.089, "89.0 ms"), (0.4321, "432 ms"), (0.9996, "1.00 s"), (12.34, "12.3 s")],
)
def test_durations_have_three_digits(time_s: float, text: str):
    assert seconds(time_s) == text


def test_a_table_that_is_wider_than_the_terminal_loses_no_cell(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    heads = [f"column {number} of many" for number in range(6)]
    print_whole(text_table("wide", heads, [([head.upper() for head in heads], None)]))
    shown = capsys.readouterr().out
    assert all(head in shown and head.upper() in shown for head in heads)
