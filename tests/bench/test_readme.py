import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest
from msgspec.structs import asdict

from cacheflow import cli
from cacheflow.bench import readme
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.records.stores import StoreReadRecord
from cacheflow.bench.records.suites import append_record
from cacheflow.bench.records.vllm import VllmRecord
from cacheflow.errors import ConfigError
from support.sample_records import sample_record, sample_sweep

TEXT = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nMore.\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    results, text = tmp_path / "results.jsonl", tmp_path / "README.md"
    for record in sample_sweep():
        append_record(results, record)
    text.write_text(TEXT)
    return results, text


def run(results: Path, text: Path, *options: str) -> int:
    parser = ArgumentParser()
    readme.add_arguments(parser)
    return readme.run(parser.parse_args(["--results", str(results), "--readme", str(text), *options]))


def block(results: Path, **values) -> str:
    return readme.results_block(readme.ReadmeFlags(results=results, **values))


def test_the_block_is_replaced_and_the_rest_is_kept(files: tuple[Path, Path]):
    assert run(*files) == 0
    text = files[1].read_text()
    assert text.startswith(f"# Title\n\n{readme.BEGIN}\n| load time")
    assert text.endswith(f"{readme.END}\n\nMore.\n")
    assert "old" not in text
    assert "cacheflow bench readme --results" in text


def test_filling_in_again_changes_nothing(files: tuple[Path, Path]):
    run(*files)
    before = files[1].read_text()
    run(*files)
    assert files[1].read_text() == before
    assert run(*files, "--check") == 0


def test_check_fails_on_a_table_out_of_date_and_writes_nothing(files: tuple[Path, Path]):
    with pytest.raises(ConfigError, match="out of date"):
        run(*files, "--check")
    assert files[1].read_text() == TEXT


def test_perturbed_runs_and_other_lengths_stay_out(files: tuple[Path, Path]):
    append_record(files[0], sample_record(perturbation={"cost_error": 2.0}, policy="spoiled"))
    append_record(files[0], sample_record(num_tokens=512, policy="short"))
    shown = block(files[0])
    assert "spoiled" not in shown
    assert "short" not in shown


def test_time_to_first_token_is_preferred_to_restoration_alone(files: tuple[Path, Path]):
    append_record(files[0], sample_record(suffix_tokens=0, ttft_s=None, bound_ttft_s=None, policy="alone"))
    assert "alone" not in block(files[0])


def test_the_picture_comes_from_the_same_runs(files: tuple[Path, Path], tmp_path: Path):
    pytest.importorskip("matplotlib")
    append_record(files[0], sample_record(num_tokens=512, policy="short"))
    figure = tmp_path / "images" / "over-bound.png"
    assert run(*files, "--figure", str(figure)) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_few_policies_are_shown_in_the_order_asked_for(files: tuple[Path, Path]):
    (first, *_, last) = dict.fromkeys(record.policy for record in sample_sweep())
    shown = block(files[0], policies=(last, first))
    rows = [line.split("|")[1].strip(" *") for line in shown.splitlines() if line.startswith("|")][2:]
    assert rows == [last, first, "lower bound"]
    assert f"--policies {last},{first} --results" in shown
    with pytest.raises(ConfigError, match="no run of nothing: drop it"):
        block(files[0], policies=(first, "nothing"))


def test_the_link_to_the_records_is_seen_from_the_file_that_is_filled(files: tuple[Path, Path]):
    shown = block(files[0], readme=files[0].parent / "docs" / "page.md")
    assert "](../results.jsonl)" in shown
    assert f"--readme {(files[0].parent / 'docs' / 'page.md').as_posix()}`" in shown


@pytest.mark.parametrize(("name", "count"), [("README.md", 1), ("benchmarks/README.md", 5), ("docs/stores.md", 4)])
def test_tables_that_are_shown_are_those_of_the_records(name: str, count: int, monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    commands = re.findall(r"by `cacheflow (bench readme [^`]*)`", (root / name).read_text())
    assert len(commands) == count
    for command in commands:
        assert cli.main([*shlex.split(command), "--check"]) == 0


def test_two_studies_in_one_file_are_refused(files: tuple[Path, Path]):
    append_record(files[0], sample_record(dtype="bfloat16"))
    with pytest.raises(ConfigError, match="several studies"):
        run(*files)


def test_stores_have_a_table_of_their_own(files: tuple[Path, Path]):
    values = {
        "way": "cacheflow", "object_bytes": 1 << 22, "num_objects": 32, "reads_in_flight": 3, "link_bytes_per_s": None,
        "repeat": 0, "read_bytes": 1 << 30, "read_s": 0.5, "correct": True, "environment": {"cpu": "test processor"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no table of suite 'stores': there is no record"):
        block(files[0], suite="stores")
    for store in ("memory", "file"):
        append_record(files[0], StoreReadRecord(store=store, **values))
    begin, end = readme.markers_of("stores")
    files[1].write_text(f"{TEXT}{begin}\n{end}\n")
    assert run(*files, "--suite", "stores") == 0
    text = files[1].read_text()
    assert text.startswith(TEXT), "the other table is left alone"
    assert "| memory | 4 MiB | 2.15 GB/s |" in text
    assert "| file | 4 MiB | 2.15 GB/s |" in text
    assert run(*files, "--suite", "stores", "--check") == 0
    with pytest.raises(ConfigError, match="stores and codecs have a table alone"):
        run(*files, "--suite", "stores", "--figure", str(files[0].parent / "figure.png"))


def test_restorations_over_several_stores_are_a_row_each(files: tuple[Path, Path]):
    results, text = files[0].parent / "stores.jsonl", files[1]
    for store, ratio, restore_s in (("s3", 0.2, 2.0), ("memory", 0.05, 1.0)):
        for policy, factor in (("load", 1.1), ("cacheflow", 1.0)):
            ttft_s = restore_s * factor
            append_record(
                results, sample_record(store=store, load_compute_ratio=ratio, policy=policy, ttft_s=ttft_s)
            )  # fmt: skip
    shown = block(results, by="store")
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert rows[0] == "| store | load time / compute time | load | cacheflow | *lower bound* |"
    assert rows[2].startswith("| memory | 0.05 | 1.10 s (0.96×) | **1.00 s (0.87×)")
    assert rows[3].startswith("| s3 | 0.2 |")
    assert "bench readme --by store --results" in shown
    begin, end = readme.markers_of("restore", "restore-stores")
    text.write_text(f"{begin}\n{end}\n")
    assert run(results, text, "--by", "store", "--table", "restore-stores") == 0
    assert run(results, text, "--by", "store", "--table", "restore-stores", "--check") == 0
    append_record(results, sample_record(store="s3", load_compute_ratio=4.0))
    with pytest.raises(ConfigError, match="several links to one store, s3"):
        block(results, by="store")


def test_missing_runs_and_markers_are_named(files: tuple[Path, Path]):
    with pytest.raises(ConfigError, match="no clean run of suite 'other'"):
        run(*files, "--suite", "other")
    files[1].write_text("no markers")
    with pytest.raises(ConfigError, match="results:begin"):
        run(*files)


def test_runs_inside_vllm_have_a_table_of_their_own(files: tuple[Path, Path]):
    values = asdict(sample_record(policy="cacheflow", compute_busy=None, io_busy=None)) | {"suite": "vllm"}
    del values["guard"]
    record = VllmRecord(**values, cached_tokens=512, equal_tokens=16, compared_tokens=16)
    append_record(files[0], record)
    begin, end = readme.markers_of("vllm")
    files[1].write_text(f"{TEXT}{begin}\n{end}\n")
    assert run(*files, "--suite", "vllm") == 0
    text = files[1].read_text()
    assert text.startswith(TEXT), "the other table is left alone"
    assert "**cacheflow**" in text.partition(begin)[2]
    assert f"cacheflow bench readme --suite vllm --results {files[0].as_posix()}" in text
    assert run(*files, "--suite", "vllm", "--check") == 0


def test_several_ranks_have_a_table_of_their_own_of_the_longest_prefix(tmp_path: Path):
    results, text = tmp_path / "results.jsonl", tmp_path / "README.md"
    for tokens, restore_s in ((1024, 3.0), (2048, 2.0)):
        for stages in (1, 2):
            values = asdict(sample_record(policy="cacheflow", num_tokens=tokens, suffix_tokens=37, suite="ranks"))
            del values["guard"]
            append_record(
                results,
                RanksRecord(
                    **{**values, "restore_s": restore_s / stages, "bound_restore_s": 0.8, "load_compute_ratio": 1.0},
                    pipeline_parallel_size=stages, tensor_parallel_size=1, gpu_axis=True, recompute_s=4.0,
                    equal_tokens=32, compared_tokens=32,
                ),
            )  # fmt: skip
    begin, end = readme.markers_of("ranks")
    text.write_text(f"{TEXT}{begin}\n{end}\n")
    assert run(results, text, "--suite", "ranks") == 0
    filled = text.read_text()
    assert filled.startswith(TEXT)
    assert "| 1 rank | 2.00 s (2.50×) |" in filled
    assert "| PP 2 | 1.00 s (1.25×), **2.00×** |" in filled
    assert "2,048 cached and 37 new tokens" in filled
    assert run(results, text, "--suite", "ranks", "--num-tokens", "1024") == 0
    assert "1,024 cached and 37 new tokens" in text.read_text()
    with pytest.raises(ConfigError, match="no clean run of suite 'ranks'"):
        run(results, text, "--suite", "ranks", "--num-tokens", "7")
