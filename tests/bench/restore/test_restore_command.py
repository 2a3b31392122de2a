"""``cacheflow bench restore`` on a tiny model, through the command line."""

import json
from collections import Counter

import pytest

from cacheflow import cli
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.bench.summary import summarise
from cacheflow.policies.registry import RESTORE_POLICIES
from support.kv_like import codec_of
from support.store_kinds import ALL, url_of

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("torch_threads")]

TINY = ("--tokens", "96", "--chunk", "32", "--suffix", "16", "--dtype", "float32")
SHORT = (*TINY, "--repeats", "1", "--ratios", "1")
TWO = ("--policies", "recompute,load")


@pytest.fixture
def bench(model_folder, tmp_path, capsys):
    """Runs the command in one folder; the exit code, the records so far, and what was printed."""

    def run(*options, model=("--model", str(model_folder)), out=tmp_path / "out"):
        code = cli.main(["bench", "restore", "--out", str(out), *model, *options])
        results = out / "results.jsonl"
        return code, read_records(results, RestoreRecord) if results.exists() else [], capsys.readouterr().out

    return run


def runs_of(records):
    """How often each run is on record."""
    return Counter(
        (r.suite, r.policy, r.num_tokens, r.suffix_tokens, r.load_compute_ratio, r.repeat, str(r.perturbation))
        for r in records
    )


def test_every_policy_is_measured_and_shown(bench, tmp_path):
    code, records, shown = bench(*SHORT)
    assert code == 0
    assert Counter(record.policy for record in records) == dict.fromkeys(RESTORE_POLICIES, 2)
    for record in records:
        assert record.correct is True
        assert record.suite == "restore"
        assert record.model == "tiny-llama"
        assert record.num_tokens == 96
        assert record.suffix_tokens in (0, 16)
        assert record.load_compute_ratio == 1.0
        assert record.link_bytes_per_s > 0
        assert record.environment["num_threads"] == 1
    for name in RESTORE_POLICIES:
        assert shown.count(name) >= 2
    assert "NOT" not in shown
    timelines = json.loads((tmp_path / "out" / "timelines-96.json").read_text())
    assert len(timelines) > 0


def test_the_same_command_runs_nothing_again(bench):
    _, first, _ = bench(*SHORT, *TWO)
    code, second, shown = bench(*SHORT, *TWO)
    assert code == 0
    assert second == first
    assert "are not run again" in shown


def test_what_is_new_in_a_command_is_run_and_nothing_else(bench):
    _, first, _ = bench(*SHORT, *TWO)
    code, records, _ = bench(*TINY, "--repeats", "2", "--ratios", "1,2", *TWO)
    assert code == 0
    assert records[: len(first)] == first
    assert len(records) == 2 * 2 * 2 * 2  # policies, objectives, ratios, repeats
    assert set(runs_of(records).values()) == {1}
    assert all(record.correct for record in records)


def test_a_bandwidth_keeps_its_ratio_when_a_study_is_taken_up(bench, monkeypatch):
    """Costs measured again differ; the runs on record are the same runs all the same."""
    from cacheflow.bench.restore.study import Study

    gbps = ("--gbps", "0.01,inf")
    _, first, _ = bench(*TINY, "--repeats", "1", *gbps, *TWO)
    assert {record.link_bytes_per_s for record in first} == {1.25e6, None}
    recompute_s = Study.recompute_s
    monkeypatch.setattr(Study, "recompute_s", lambda study: 3.0 * recompute_s(study))
    code, records, _ = bench(*TINY, "--repeats", "2", *gbps, *TWO)
    assert code == 0
    assert records[: len(first)] == first
    assert len(records) == 2 * len(first)
    assert len(summarise(records)) == 2 * 2  # links, objectives: repeats fall together
    assert all(policy.num_runs == 2 for setting in summarise(records) for policy in setting.policies)


class StoppedClock:
    """``time`` for the command: the limit is over once the results file has a record."""

    def __init__(self, results):
        self.results = results

    def monotonic(self):
        return 1e6 if self.results.exists() else 0.0


def test_a_time_limit_stops_between_rounds_and_the_rest_comes_later(bench, tmp_path, monkeypatch):
    from cacheflow.bench import suite
    from cacheflow.bench.restore import command as opening

    lengths, opened = (*SHORT, "--tokens", "64,96", *TWO), []
    open_study = opening.open_study
    monkeypatch.setattr(opening, "open_study", lambda flags, length: opened.append(length) or open_study(flags, length))
    with monkeypatch.context() as patch:
        patch.setattr(suite, "time", StoppedClock(tmp_path / "out" / "results.jsonl"))
        code, first, shown = bench(*lengths, "--time-limit-s", "100")
    assert code == 0
    assert len(first) == 2  # one round
    assert opened == [64]  # the next length was not even prepared
    assert "stopped at the time limit of 100 s" in " ".join(shown.split())
    code, records, shown = bench(*lengths, "--time-limit-s", "1000")
    assert code == 0
    assert records[:2] == first
    assert len(records) == 2 * 2 * 2
    assert set(runs_of(records).values()) == {1}
    assert "stopped" not in shown


def test_stores_given_several_times_are_tiers(bench, tmp_path):
    tiers = ("--store", "memory?capacity=100kB", "--store", f"file://{tmp_path}/tiers")
    code, records, _ = bench(*SHORT, *tiers, "--policies", "load", "--objectives", "restore")
    assert code == 0
    assert [(record.store, record.correct) for record in records] == [("memory over file", True)]
    assert len(list((tmp_path / "tiers").rglob("*_kv_*"))) == 3 * 3


@pytest.mark.parametrize("kind", ALL)
def test_every_store_is_restored_from_as_fast_as_it_goes(bench, kind, request, tmp_path):
    url = url_of(kind, request, tmp_path / "store")
    policies = ("--policies", "recompute,load,cacheflow", "--objectives", "restore")
    code, records, shown = bench(*TINY, "--repeats", "1", "--gbps", "inf", "--store", url, *policies)
    assert code == 0
    assert [(r.policy, r.store, r.correct, r.link_bytes_per_s) for r in records] == [
        (policy, kind, True, None) for policy in ("recompute", "load", "cacheflow")
    ]
    assert all(record.bound_restore_s > 0 and record.load_compute_ratio > 0 for record in records)
    assert kind == "memory" or f"{kind} store" in " ".join(shown.split())


def test_how_fast_a_store_goes_is_found_by_loading_three_times(bench, monkeypatch):
    from cacheflow.bench.restore.study import Study

    ran, run = [], Study.run
    monkeypatch.setattr(Study, "run", lambda *args, **options: ran.append(args[1].name) or run(*args, **options))
    _, records, _ = bench(
        *TINY, "--repeats", "1", "--gbps", "inf", "--policies", "recompute", "--objectives", "restore"
    )
    assert ran == ["load", "load", "load", "recompute"]
    assert len(records) == 1


def test_a_lossless_codec_is_on_record(bench):
    codec_of("zstd")
    options = ("--store", "memory?codec=zstd", "--policies", "load,cacheflow", "--objectives", "restore")
    code, records, _ = bench(*SHORT, *options)
    assert code == 0
    assert {(record.store, record.correct) for record in records} == {("memory+zstd", True)}


def test_files_serve_as_the_store(bench, tmp_path):
    code, records, _ = bench(*SHORT, "--store", "file", "--policies", "load,cacheflow")
    assert code == 0
    assert all(record.correct for record in records)
    assert len(list((tmp_path / "out" / "store").rglob("*_kv_*"))) == 3 * 3
    elsewhere = ("--store", f"file://{tmp_path}/elsewhere")
    code, again, _ = bench(*TINY, "--ratios", "1", "--repeats", "2", *elsewhere, "--policies", "load,cacheflow")
    assert code == 0
    assert len(again) == 2 * len(records)
    assert len(list((tmp_path / "elsewhere").rglob("*_kv_*"))) == 3 * 3


def test_perturbed_runs_are_a_suite_of_their_own(bench):
    from cacheflow.bench.restore.command import PERTURBATIONS

    code, records, _ = bench(*SHORT, "--perturb", "--policies", "cacheflow")
    assert code == 0
    assert {record.suite for record in records} == {"perturbed"}
    assert all(record.correct for record in records)
    expected = {(policy, str(values)) for policy in ("recompute", "cacheflow") for values in PERTURBATIONS.values()}
    assert {(record.policy, str(dict(record.perturbation))) for record in records} == expected
    assert len(records) == 2 * len(expected)
    _, again, _ = bench(*SHORT, "--perturb", "--policies", "cacheflow")
    assert again == records


def test_blocks_of_two_layers_and_one_objective(bench):
    code, records, _ = bench(*SHORT, "--layers-per-block", "2", "--objectives", "ttft", "--policies", "cacheflow,cake")
    assert code == 0
    assert {record.suffix_tokens for record in records} == {16}
    assert {record.recomputed_cells + record.loaded_cells for record in records} == {3 * 2}
    assert all(record.correct for record in records)


def test_random_weights_of_a_users_shape(bench, tmp_path):
    shape = {
        "name": "my-own-tiny", "num_layers": 2, "hidden_size": 64, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "vocab_size": 300,
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(shape))
    code, records, _ = bench(*SHORT, *TWO, model=("--shape", str(tmp_path / "mine.json")))
    assert code == 0
    assert {(record.model, record.num_layers, record.dtype) for record in records} == {("my-own-tiny", 2, "float32")}
    assert all(record.correct for record in records)


def flipped(monkeypatch):
    """One bit of every loaded cell flips after it was verified."""
    from cacheflow.engine.transfer_port import StoreTransferPort

    place = StoreTransferPort.place

    def flip(port, ticket):
        ticket.staging.array[0] ^= 1
        place(port, ticket)

    monkeypatch.setattr(StoreTransferPort, "place", flip)


def row_of(shown, policy):
    """The cells of a policy's rows in the tables."""
    return [line.split() for line in shown.splitlines() if line.strip().startswith(policy + " ")]


def test_a_wrong_restoration_prints_no_time_and_exits_1(bench, monkeypatch):
    with monkeypatch.context() as patch:
        flipped(patch)
        code, records, shown = bench(*SHORT, *TWO)
    assert code == 1
    assert {record.policy: record.correct for record in records} == {"recompute": True, "load": False}
    assert len(row_of(shown, "recompute")) == 2
    for row in row_of(shown, "recompute"):
        assert {"ms", "s"} & set(row)
    assert len(row_of(shown, "load")) == 2
    for row in row_of(shown, "load"):
        assert not {"ms", "s"} & set(row)
    code, _, shown = bench(*SHORT, *TWO)  # nothing is run again: the wrong runs stay on record
    assert code == 1
    for row in row_of(shown, "load"):
        assert not {"ms", "s"} & set(row)


BAD = {
    "unknown policy": (("--policies", "load,magic"), "policy 'magic' is not known; known are recompute, load"),
    "no policy": (("--policies", ","), "--policies is empty; known: recompute, load"),
    "unknown objective": (
        ("--objectives", "speed"),
        "--objectives: objective 'speed' is not known; known are restore, ttft",
    ),
    "no objective": (("--objectives", ""), "--objectives is empty; known: restore, ttft"),
    "ratio of zero": (("--ratios", "1,0"), "--ratios .* must be above 0"),
    "negative ratio": (("--ratios", "-1"), "--ratios .* must be above 0"),
    "ratio nan": (("--ratios", "nan"), "--ratios .* must be above 0"),
    "ratio inf": (("--ratios", "inf"), "--ratios .* must be finite"),
    "bandwidth of zero": (("--gbps", "0"), "--gbps .* must be above 0"),
    "no tokens": (("--tokens", "0"), "--tokens .* must be above 0"),
    "negative tokens": (("--tokens", "-96"), "--tokens .* must be above 0"),
    "too many tokens": (("--tokens", "4000"), "4000 .* the model allows 2048"),
    "no suffix": (("--suffix", "0"), "--suffix is 0, must be at least 1"),
    "no chunk": (("--chunk", "0"), "--chunk is 0, must be at least 1"),
    "no repeat": (("--repeats", "0"), "--repeats is 0, must be at least 1"),
    "no layer in a block": (("--layers-per-block", "0"), "--layers-per-block is 0, must be at least 1"),
    "time limit of zero": (("--time-limit-s", "0"), "--time-limit-s is 0.0, must be above 0"),
    "negative time limit": (("--time-limit-s", "-1"), "--time-limit-s is -1.0, must be above 0"),
    "perturbed links in Gbit/s": (("--perturb", "--gbps", "1"), "--perturb needs the throttled store"),
    "unknown shape": (("--shape", "GPT-9"), "unknown model 'GPT-9'; known: Llama-3.1-8B"),
    "lossy store": (("--store", "memory?codec=int8"), "--store: with codec int8 restored KV is not the computed one"),
    "unknown store": (("--store", "tape"), "store is 'tape', must be a URL: memory, file:///folder"),
    "store with a password": (("--store", "file://me:hunter2@host/kv"), "the URL holds a password"),
    "no model": (("--model", "/nowhere/at/all"), "model '/nowhere/at/all'"),
    "a file": (("--model", __file__), "is a file; give a folder"),
    "weights that fit no machine": (("--shape", "Llama-3.1-70B"), "the weights of Llama-3.1-70B take 141 GB"),
    "half precision on the CPU": (("--dtype", "float16"), "dtype float16 is not supported; allowed: bfloat16, float32"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=list(BAD))
def test_bad_options_are_one_line_and_code_2(model_folder, tmp_path, capsys, options, message):
    import re

    model = () if {"--model", "--shape"} & set(options) else ("--model", str(model_folder))
    assert cli.main(["bench", "restore", "--out", str(tmp_path), *model, *SHORT, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("cacheflow: error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("options", [("--tokens", "x"), ("--ratios", "1;2"), ("--device", "tpu")])
def test_options_of_the_wrong_type_are_one_line_and_code_2(tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "restore", "--out", str(tmp_path), *options])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_cannot_be_is_one_line_and_code_2(model_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert cli.main(["bench", "restore", "--out", out, "--model", str(model_folder), *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--out {out} cannot be used" in error


def test_cuda_without_a_gpu_is_one_line_and_code_2(model_folder, tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    argv = ["bench", "restore", "--out", str(tmp_path), "--model", str(model_folder), *SHORT, "--device", "cuda"]
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == (
        "cacheflow: error: --device cuda: this machine has no CUDA device that torch can use\n"
    )


def test_a_results_file_with_a_damaged_line_is_named_and_left_alone(bench, tmp_path, capsys, model_folder):
    bench(*SHORT, *TWO)
    results = tmp_path / "out" / "results.jsonl"
    damaged = results.read_text() + '{"suite": "restore"\n'
    results.write_text(damaged)
    argv = ["bench", "restore", "--out", str(tmp_path / "out"), "--model", str(model_folder), *SHORT, *TWO]
    assert cli.main(argv) == 2
    assert "results.jsonl, line 5: not JSON" in capsys.readouterr().err
    assert results.read_text() == damaged


def test_a_hybrid_shape_of_random_weights_is_measured(bench, tmp_path):
    config = {
        "model_type": "qwen3_5_text", "head_dim": 16, "hidden_size": 64, "intermediate_size": 96,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_value_head_dim": 16, "num_attention_heads": 4, "num_hidden_layers": 8,
        "num_key_value_heads": 2, "vocab_size": 320,
    }  # fmt: skip
    path = tmp_path / "small-hybrid.json"
    path.write_text(json.dumps(config))
    options = ("--tokens", "192", "--chunk", "64", "--suffix", "16", "--repeats", "1", "--ratios", "1")
    code, records, shown = bench(*options, model=("--shape", str(path)))
    assert code == 0
    assert Counter(record.policy for record in records) == dict.fromkeys(RESTORE_POLICIES, 2)
    assert all(record.correct and record.layers_per_block == 4 for record in records)
    assert "4 layers a block" in shown


def test_what_a_hybrid_cannot_have_is_said_in_one_line(tmp_path, capsys):
    from support.embedded_cases import save_tiny

    folder = save_tiny(tmp_path / "hybrid", "qwen3_5_text")
    words = ["bench", "restore", "--out", str(tmp_path / "out"), "--model", str(folder), "--tokens", "128"]
    assert cli.main([*words, "--chunk", "96"]) == 2
    assert "chunk_tokens is 96, must be a multiple of 64" in capsys.readouterr().err
    assert cli.main([*words, "--chunk", "64", "--layers-per-block", "2"]) == 2
    assert "blocks of 2 layers, must be a multiple of 4" in capsys.readouterr().err
    assert cli.main(["bench", "batch", "--out", str(tmp_path / "out"), "--model", str(folder)]) == 2
    assert "serves no hybrid models" in capsys.readouterr().err
