"""``bench ranks`` without servers: splits, what becomes of an answer, records, and what tables show of them."""

import dataclasses
import io
from contextlib import contextmanager, nullcontext

import msgspec
import pytest
from rich.console import Console

from cacheflow.bench.ranks import command as ranks_command
from cacheflow.bench.ranks.report import draw_ranks, gain, ranks_tables
from cacheflow.bench.ranks.study import RanksOptions, RankSplit, RanksStudy, cores_of, splits_of
from cacheflow.bench.records.ranks import RanksRecord
from cacheflow.bench.records.suites import append_record, read_records
from cacheflow.bench.results_file import only_run
from cacheflow.bench.vllm.client import Completion
from cacheflow.bench.vllm.costs import PrefixSize
from cacheflow.bench.vllm.counts import EngineCounts
from cacheflow.bench.vllm.server import ServerOptions, server_command, server_environment
from cacheflow.bench.vllm.workload import BenchModel
from cacheflow.cli import main
from cacheflow.errors import ConfigError
from cacheflow.model_shape import ModelShape

SHAPE = ModelShape(
    name="toy", num_layers=6, hidden_size=8, num_q_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=8,
    vocab_size=50,
)  # fmt: skip


def record(split=None, **changes):
    split = split or RankSplit(1, 1)
    values = {
        "suite": "ranks", "policy": "cacheflow", "model": "toy", "device": "cpu", "dtype": "bfloat16",
        "num_tokens": 1024, "suffix_tokens": 8, "chunk_tokens": 512, "num_layers": 6, "link_bytes_per_s": 1e6,
        "load_compute_ratio": 1.0, "repeat": 0, "restore_s": 2.0, "ttft_s": 2.2, "bound_restore_s": 1.6,
        "bound_ttft_s": None, "compute_busy": None, "io_busy": None, "recomputed_cells": 6, "loaded_cells": 6,
        "wasted_bytes": 0, "correct": True, "environment": {}, "pipeline_parallel_size": split.pipeline,
        "tensor_parallel_size": split.tensor, "gpu_axis": split.gpu_axis, "recompute_s": 4.0, "equal_tokens": 32,
        "compared_tokens": 32,
    }  # fmt: skip
    return RanksRecord(**{**values, **changes})


def server_options(tmp_path, **changes):
    values = {
        "python": tmp_path / "python", "model_dir": tmp_path, "dtype": "bfloat16", "chunk_tokens": 512,
        "max_tokens": 2048, "kv_cache_gib": 1, "compiled": False, "log_dir": tmp_path,
    }  # fmt: skip
    return ServerOptions(**{**values, **changes})


def study(tmp_path):
    options = RanksOptions(
        server=server_options(tmp_path), store_root=tmp_path,
        size=PrefixSize(num_tokens=1024, suffix_tokens=8, chunk_tokens=512), repeats=1, environment={"cpu": "x"},
    )  # fmt: skip
    return RanksStudy(BenchModel(tmp_path, SHAPE, 4096), list(range(2000)), options, prefill_s=2.0)


def answer(tokens):
    return Completion(tokens=tokens, arrivals_s=(0.5,) * len(tokens), sent_s=0.0, first_logprobs={}, cached_tokens=1024)


def test_one_rank_comes_first_and_stages_come_with_and_without_the_axis():
    one, axis, in_order, tensor = splits_of([2, 1], (1, 2))
    assert one == RankSplit(1, 1)
    assert (axis, in_order) == (RankSplit(2, 1), RankSplit(2, 1, gpu_axis=False))
    assert tensor == RankSplit(1, 2)
    assert len({split.name for split in splits_of((1, 2, 4), (1, 2, 4))}) == 7
    assert RankSplit(2, 2).num_ranks == 4


def test_each_rank_has_a_core_and_the_server_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert [cores_of(count) for count in (1, 2, 4)] == ["3", "3|5", "3|5|3|5"]
    options = server_options(tmp_path, pipeline_parallel_size=2, tensor_parallel_size=4, omp_bind="3|5")
    command = server_command(options, port=1, transfer=None)
    assert command[command.index("--pipeline-parallel-size") + 1] == "2"
    assert command[command.index("--tensor-parallel-size") + 1] == "4"
    assert server_environment(options)["VLLM_CPU_OMP_THREADS_BIND"] == "3|5"
    assert "--pipeline-parallel-size" not in server_command(server_options(tmp_path), port=1, transfer=None)


def test_the_link_is_the_same_for_every_split_and_the_axis_is_an_option(tmp_path):
    whole = 1024 * SHAPE.kv_bytes_per_token
    assert study(tmp_path).bytes_per_s(0.5) == pytest.approx(whole / (0.5 * 2.0))
    options = [study(tmp_path).transfer(split, 5.0)["kv_connector_extra_config"] for split in splits_of((2,), (1,))]
    assert [each["boundary_states"] for each in options] == [True, True, False]
    assert {each["throttle_bytes_per_s"] for each in options} == {5.0}
    assert len({each["store_path"] for each in options}) == 3


def test_one_round_measures_one_rank_on_the_prompt_it_has(tmp_path, monkeypatch):
    """Three times, whatever the number of prompts; what a request costs besides is taken off, the first thrown away."""
    asked = study(tmp_path)
    lengths = []

    class Client:
        def evict(self):
            lengths.append(0)

        def complete(self, tokens, *, max_tokens, params):
            lengths.append(len(tokens))
            whole = 9.0 if lengths.count(len(tokens)) == 1 else 3.0
            took_s = 0.5 if len(tokens) == 8 else whole
            return Completion(tokens=(1,), arrivals_s=(took_s,), sent_s=0.0, first_logprobs={}, cached_tokens=0)

    class Servers:
        client = Client()

        def memory_bytes(self):
            return [5, 7, 6]

        @contextmanager
        def turn(self, name):
            assert name == RankSplit(1, 1).name
            yield self

    @contextmanager
    def fleet(self, splits, bytes_per_s):
        yield Servers()

    monkeypatch.setattr(RanksStudy, "_fleet", fleet)
    asked.prepare()
    assert asked.prefill_s == 2.5
    assert lengths == [0, 8, 0, 1032] * 3
    assert asked.memory_bytes == [7, 6, 5]


@pytest.mark.parametrize("together", [True, False])
def test_servers_are_kept_where_they_fit_in_memory_and_else_started_for_each_turn(tmp_path, monkeypatch, together):
    splits = [RankSplit(1, 1), RankSplit(1, 4)]
    asked = study(tmp_path)
    asked = dataclasses.replace(asked, options=dataclasses.replace(asked.options, repeats=2))
    happened = []

    @contextmanager
    def fleet(self, splits, bytes_per_s):
        names = [split.name for split in splits]
        happened.append(("start", *names))
        yield names
        happened.append(("end", *names))

    def save(self, fleet, split, repeats):
        assert split.name in fleet
        happened.append(("save", split.name, *repeats))

    def measure(self, fleet, split, *, repeat, ratio):
        assert split.name in fleet
        happened.append(("run", split.name, repeat))
        return record(split, repeat=repeat)

    for name, fake in (("_fleet", fleet), ("_save", save), ("_run", measure)):
        monkeypatch.setattr(RanksStudy, name, fake)
    told = []
    runs = list(asked.rounds(splits, ratio=1.0, together=together, on_step=told.append))
    one, four = (split.name for split in splits)
    order = [(one, 0), (four, 0), (four, 1), (one, 1)]
    assert [(run.tensor_parallel_size, run.repeat) for run in runs] == [(1, 0), (4, 0), (4, 1), (1, 1)]
    if together:
        assert happened == [
            ("start", one, four), ("save", one, 0, 1), ("save", four, 0, 1),
            *(("run", *turn) for turn in order), ("end", one, four),
        ]  # fmt: skip
    else:
        assert happened == [
            each
            for name, repeat in order
            for each in (("start", name), ("save", name, repeat), ("run", name, repeat), ("end", name))
        ]
    assert len(told) == (6 if together else 8)


def test_memory_of_all_servers_counts_each_rank_and_what_surrounds_it(tmp_path):
    asked = dataclasses.replace(study(tmp_path), memory_bytes=[50, 30, 20])
    assert asked.needed_bytes([RankSplit(1, 1)]) == pytest.approx(120)
    assert asked.needed_bytes([RankSplit(1, 1), RankSplit(4, 1)]) == pytest.approx(1.2 * (200 + 150))


@pytest.mark.parametrize(("tokens", "correct", "equal"), [((7, 8, 9), True, 3), ((7, 1, 9), False, 1)])
def test_a_record_holds_what_the_engine_counted_and_whether_tokens_are_equal(tmp_path, tokens, correct, equal):
    split, asked = RankSplit(2, 1), study(tmp_path)
    asked.references[split, 0] = answer((7, 8, 9))
    counts = EngineCounts(
        loaded_bytes=100, recomputed_tokens=256.0, loaded_tokens=768.0, restore_s=1.2, bound_ratio=1.5
    )
    made = asked.record(split, answer(tokens), counts, own_s=3.0, repeat=0, ratio=2.0)
    assert (made.correct, made.equal_tokens, made.timed) == (correct, equal, correct)
    assert (made.recomputed_cells, made.loaded_cells) == (3, 9)
    assert made.bound_restore_s == pytest.approx(0.8)
    assert made.over_bound == (pytest.approx(1.5) if correct else None)
    assert made.link_bytes_per_s == pytest.approx(asked.bytes_per_s(2.0))


def test_what_was_not_restored_has_no_time_of_restoration(tmp_path):
    asked = study(tmp_path)
    asked.references[RankSplit(1, 1), 0] = answer((7,))
    made = asked.record(RankSplit(1, 1), answer((7,)), EngineCounts(), own_s=3.0, repeat=0, ratio=1.0)
    assert made.restore_s is None
    assert "not restored" in made.note
    assert gain(made, [made]) is None


@pytest.mark.parametrize(
    "changes",
    [{"pipeline_parallel_size": 0}, {"gpu_axis": False}, {"equal_tokens": 3}, {"restore_s": -1.0}],
)
def test_impossible_records_are_refused(changes):
    with pytest.raises(ConfigError):
        record(**changes)


def records():
    in_order = RankSplit(2, 1, gpu_axis=False)
    return [
        record(), record(RankSplit(2, 1), restore_s=1.0, bound_restore_s=0.9), record(in_order, restore_s=1.6),
        record(repeat=1, restore_s=4.0), record(RankSplit(2, 1), repeat=1, restore_s=1.0, bound_restore_s=0.8),
        record(RankSplit(1, 2), restore_s=1.0, correct=False, equal_tokens=2),
    ]  # fmt: skip


def test_gains_compare_the_same_repeat_and_only_right_answers():
    runs = records()
    assert [gain(each, runs) for each in runs] == [1.0, 2.0, 1.25, 1.0, 4.0, None]


def test_tables_show_medians_and_no_time_of_a_wrong_split():
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(ranks_tables(records()))
    lines = {line.split("  ")[0].strip(): line for line in console.export_text().splitlines()}
    assert "3.00×" in lines["PP 2"]
    assert "1.18" in lines["PP 2"]
    assert "1.25×" in lines["PP 2 in order"]
    assert "1.00 s" not in lines["TP 2"]
    assert "no, 1 of 1" in lines["TP 2"]


def test_records_come_back_from_a_file_and_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.jsonl"
    for each in records():
        append_record(path, each)
    assert read_records(path, RanksRecord) == records()
    (drawn,) = draw_ranks(records(), tmp_path)
    assert drawn.name == "ranks-toy-1024.png"
    assert drawn.stat().st_size > 1000


def test_splits_have_names_for_people():
    splits = (RankSplit(1, 1), RankSplit(2, 1), RankSplit(2, 1, gpu_axis=False), RankSplit(2, 2))
    assert [record(split).split for split in splits] == ["1 rank", "PP 2", "PP 2 in order", "PP 2, TP 2"]
    assert msgspec.structs.replace(record(), tensor_parallel_size=4).split == "TP 4"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "1000"], "multiple of --chunk"),
        (["--pipeline-parallel-sizes", "0"], "--pipeline-parallel-sizes"),
        (["--ratios", "0"], "--ratios"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_bad_options_end_before_anything_starts(tmp_path, capsys, words, said):
    assert main(["bench", "ranks", "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pipeline-parallel-sizes", "25"], "24 layers cannot be split into 25 pipeline stages"),
        (["--tensor-parallel-sizes", "3"], "cannot be shared by tensor_parallel_size 3"),
    ],
)
def test_a_split_that_the_model_does_not_have_is_refused_before_a_server_starts(
    tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.setattr(ranks_command, "probe", lambda python: {"accelerator": ""})
    monkeypatch.setattr(ranks_command, "_study", lambda *_: pytest.fail("a server was started"))
    assert main(["bench", "ranks", "--out", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("num_cores", [1, 2])
def test_ranks_that_share_a_core_are_told_of(tmp_path, monkeypatch, capsys, num_cores):
    monkeypatch.setattr(ranks_command, "probe", lambda python: {"accelerator": ""})
    monkeypatch.setattr(ranks_command, "_study", lambda *_: None)
    monkeypatch.setattr(ranks_command.os, "sched_getaffinity", lambda _: set(range(num_cores)))
    append_record(tmp_path / "results.jsonl", record())
    assert main(["bench", "ranks", "--out", str(tmp_path)]) == 0
    assert ("2 ranks share 1 cores" in capsys.readouterr().out) == (num_cores == 1)


def test_advice_in_brackets_and_paths_with_brackets_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    def no_matplotlib(*_):
        raise ConfigError("figures need matplotlib: pip install 'cacheflow-kv[plots]'")

    out = tmp_path / "runs[a]"
    out.mkdir()
    append_record(out / "results.jsonl", record())
    monkeypatch.setattr(ranks_command, "draw_ranks", no_matplotlib)
    monkeypatch.setattr(ranks_command, "probe", lambda python: {"accelerator": ""})
    monkeypatch.setattr(ranks_command, "_study", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["bench", "ranks", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "pip install 'cacheflow-kv[plots]'" in printed
    assert "runs[a]/results.jsonl" in printed


@pytest.mark.parametrize("how", ["another run", "an unreadable record"])
def test_a_folder_that_cannot_be_gone_on_with_is_refused_before_a_server_starts(tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(ranks_command, "probe", lambda python: {"accelerator": ""})
    monkeypatch.setattr(ranks_command, "_study", lambda *_: pytest.fail("a server was started"))
    results = tmp_path / "results.jsonl"
    results.write_text(record().to_json() + "\n" + ("" if how == "another run" else '{"suite": "ranks"}\n'))
    with only_run(tmp_path) if how == "another run" else nullcontext():
        assert main(["bench", "ranks", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert ("is in use by another run" if how == "another run" else "line 2") in said


def test_a_record_that_was_half_written_is_cut_off_and_said_before_the_work(tmp_path, monkeypatch, capsys):
    results, whole = tmp_path / "results.jsonl", record().to_json() + "\n"
    seen = []
    monkeypatch.setattr(ranks_command, "probe", lambda python: {"accelerator": ""})
    monkeypatch.setattr(ranks_command, "_study", lambda *_: seen.append(results.read_text()))
    results.write_text(whole + whole[:40])
    assert main(["bench", "ranks", "--out", str(tmp_path)]) == 0
    assert seen == [whole]
    assert "results.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(("free_gib", "together"), [(7, False), (9, True)])
def test_memory_decides_whether_servers_are_kept_and_the_user_is_told(
    tmp_path, monkeypatch, capsys, free_gib, together
):
    def prepare(self):
        self.prefill_s, self.memory_bytes = 2.0, [(2 << 30) * 5 // 6, (1 << 30) * 5 // 6]

    def rounds(self, splits, *, ratio, together, on_step):
        kept.append(together)
        return [record(split, load_compute_ratio=ratio) for split in splits]

    kept = []
    monkeypatch.setattr(ranks_command, "probe", lambda python: {"accelerator": ""})
    monkeypatch.setattr(ranks_command, "available_memory", lambda: free_gib << 30)
    monkeypatch.setattr(RanksStudy, "prepare", prepare)
    monkeypatch.setattr(RanksStudy, "rounds", rounds)
    sizes = ["--pipeline-parallel-sizes", "1", "--tensor-parallel-sizes", "1,2"]
    assert main(["bench", "ranks", "--out", str(tmp_path), *sizes, "--ratios", "1,2"]) == 0
    assert kept == [together, together]
    # 2.5 GiB for the server of one rank, 4.2 for that of two, and the margin
    said = " ".join(capsys.readouterr().out.split())
    assert (f"all servers together take 8 GiB of memory, {free_gib} are free" in said) == (not together)
