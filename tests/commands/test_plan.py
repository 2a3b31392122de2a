import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cacheflow import cli
from cacheflow.commands.plan import predict
from cacheflow.plan.stages import RankLayout
from cacheflow.shapes.hardware import find_gpu, find_model

GOOD = {"--model": "Llama-3.1-8B", "--gpu": "H100", "--bandwidth-gbps": "40", "--tokens": "8192", "--suffix": "256"}


def words(**changes: str) -> list[str]:
    options = GOOD | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    return ["plan", *(word for pair in options.items() for word in pair)]


def test_every_policy_stands_against_the_bound(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words()) == 0
    text = capsys.readouterr().out
    for name in ("recompute", "load", "layerwise_load", "cake", "cacheflow_v1", "cacheflow_v2", "cacheflow"):
        assert re.search(rf"^ ?{name} ", text, re.MULTILINE), name
    assert "lower bound" in text
    assert "Llama-3.1-8B on H100, link 40 Gbit/s: 8,192 cached + 256 new tokens" in text
    assert re.search(r"Guard: (hybrid|recompute|load): \S", text)
    assert "not measured" in text
    assert sum(line.startswith("layer ") for line in text.splitlines()) == 16


def test_one_chunk_without_suffix(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(tokens="100", suffix="0")) == 0
    assert "100 cached + 0 new tokens" in capsys.readouterr().out


def test_a_policy_without_a_guard_says_so(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(policy="cake")) == 0
    assert "cake has no guard." in capsys.readouterr().out


def test_the_plan_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert cli.main(words(out=str(tmp_path / "plans"))) == 0
    assert (tmp_path / "plans" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "Picture: " in capsys.readouterr().out


def test_without_matplotlib_the_numbers_stand_and_the_picture_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("cacheflow.commands.plan.find_spec", lambda name: None)
    assert cli.main(words(out=str(tmp_path))) == 0
    assert "pip install 'cacheflow-kv[plots]'" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bandwidth_gbps": "0"}, "--bandwidth-gbps is 0.0, must be above 0"),
        ({"bandwidth_gbps": "-1"}, "must be above 0"),
        ({"bandwidth_gbps": "nan"}, "must be above 0 and finite"),
        ({"bandwidth_gbps": "inf"}, "must be above 0 and finite"),
        ({"bandwidth_gbps": "1e-320"}, "must be at least 1e-06"),
        ({"suffix": "9" * 400}, "--suffix must be at most 1,000,000,000, it has 400 digits"),
        ({"tokens": "-5"}, "--tokens is -5, must be at least 1"),
        ({"tokens": "0"}, "--tokens is 0, must be at least 1"),
        ({"suffix": "-1"}, "--suffix is -1, must be at least 0"),
        ({"chunk": "0"}, "--chunk is 0, must be at least 1"),
        ({"chunk": "1"}, "give a larger --chunk"),
        ({"tokens": "1000000"}, "KV cache of 1,000,256 tokens takes 131 GB"),
        ({"model": "GPT-2"}, "unknown model 'GPT-2'; known: Llama-3.1-8B"),
        ({"model": "DeepSeek-V3"}, "not supported yet: it caches a compressed latent"),
        ({"gpu": "TPU"}, "unknown gpu 'TPU'; known: L40S"),
        ({"policy": "magic"}, "recompute, load, layerwise_load, cake"),
        ({"stored_bits": "0"}, "--stored-bits is 0.0, must be above 0"),
        ({"stored_bits": "32"}, "--stored-bits is 32, must be at most the 16 of bfloat16"),
        ({"stored_bits": "8", "pipeline_parallel_size": "2"}, "boundary and running states stay as they are"),
        ({"out": "/proc/nowhere"}, "--out /proc/nowhere cannot be written"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_code_2(changes: dict[str, str], reason: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(**changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("cacheflow: error: ")
    assert error.count("\n") == 1
    assert reason in error


def test_words_that_are_no_numbers_are_one_line_and_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words(tokens="many"))
    assert capsys.readouterr().err == "cacheflow plan: error: argument --tokens: invalid int value: 'many'\n"


def test_the_host_link_caps_the_bandwidth():
    report = predict(
        find_model("Qwen3-8B"), find_gpu("A100"), bandwidth_gbps=10_000, grid_tokens=(2048, 64, 512), chosen="load"
    )
    assert report.problem.link.bytes_per_s == 32e9
    assert "link 256 Gbit/s" in report.title


@pytest.mark.parametrize("gbps", [10.0, 80.0])
@pytest.mark.parametrize("tokens", [2048, 32768])
def test_no_policy_is_predicted_below_the_bound_and_ours_never_behind(gbps: float, tokens: int):
    report = predict(
        find_model("Qwen3-8B"),
        find_gpu("A100"),
        bandwidth_gbps=gbps,
        grid_tokens=(tokens, 512, 512),
        chosen="cacheflow",
    )
    ours = report.shown
    for rehearsal in report.rehearsals:
        assert rehearsal.restore_s >= report.bound.restore_s * (1 - 1e-9), rehearsal.plan.policy
        assert rehearsal.ttft_s >= report.bound.ttft_s * (1 - 1e-9), rehearsal.plan.policy
        assert ours.ttft_s <= 1.02 * rehearsal.ttft_s + 0.005, rehearsal.plan.policy


@pytest.mark.parametrize("bits", [8.0, 3.0])
def test_stored_bits_are_a_faster_link(bits: float, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(bandwidth_gbps="4", stored_bits=f"{bits:g}")) == 0
    stored = capsys.readouterr().out
    assert cli.main(words(bandwidth_gbps=repr(4 * 16 / bits))) == 0
    faster = capsys.readouterr().out
    said = [line for line in stored.splitlines() if line not in faster.splitlines()]
    assert said == [
        f"KV in {bits:g} of 16 bits: a link of 4 Gbit/s delivers {64 / bits:.4g}. Decoding takes no time here, and "
        "what is restored is not exact"
    ]


def test_plan_needs_neither_torch_nor_matplotlib():
    code = (
        f"import sys; from cacheflow import cli; cli.main({words()!r}); "
        "print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"


def test_stages_are_shown_in_every_way_and_the_sooner_one_by_stage(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(pipeline_parallel_size="3", tensor_parallel_size="2")) == 0
    text = capsys.readouterr().out
    assert "Llama-3.1-8B on 3 x 2 H100, link 40 Gbit/s each: 8,192 cached + 256 new tokens" in text
    for way in ("recompute", "load", "stage by stage", "handed over", "stored states"):
        assert re.search(rf"^ ?{way} ", text, re.MULTILINE), way
    assert re.search(r"GPU axis: (pays|does not pay here): ", text)
    # 32 layers over 3 stages, as vLLM cuts them.
    for stage, layers in enumerate(("0-10", "11-21", "22-31")):
        assert re.search(rf"^ ?{stage} +{layers} ", text, re.MULTILINE), layers


def test_ways_that_take_the_same_time_are_no_gain(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(pipeline_parallel_size="2", policy="load")) == 0
    assert "GPU axis: makes no difference here: " in capsys.readouterr().out


def test_tensor_parallel_ranks_share_compute_and_bytes():
    one, two = (
        predict(
            find_model("Llama-3.1-8B"), find_gpu("H100"), bandwidth_gbps=40, grid_tokens=(8192, 256, 512),
            chosen="cacheflow", layout=RankLayout(tensor_parallel_size=size),
        )
        for size in (1, 2)
    )  # fmt: skip
    assert two.bound.restore_s == pytest.approx(one.bound.restore_s / 2)
    assert two.shown.ttft_s == pytest.approx(one.shown.ttft_s / 2, rel=0.02)


def test_a_shared_link_is_named_and_slower(capsys: pytest.CaptureFixture[str]):
    assert cli.main([*words(tensor_parallel_size="2"), "--shared-link"]) == 0
    assert "1 x 2 H100, link 40 Gbit/s shared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pipeline_parallel_size": "33"}, "32 layers cannot be split into 33"),
        ({"pipeline_parallel_size": "0"}, "pipeline_parallel_size is 0"),
        ({"tensor_parallel_size": "3"}, "cannot be shared by tensor_parallel_size 3"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(changes, reason, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(**changes)) == 2
    assert reason in capsys.readouterr().err


def test_stages_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert cli.main(words(pipeline_parallel_size="2", suffix="0", out=str(tmp_path))) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "Picture: " in capsys.readouterr().out


def test_a_model_folder_is_planned_as_its_configuration_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "my-llama-8-B"
    folder.mkdir()
    shape = find_model("Llama-3.1-8B")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": shape.intermediate_size, "vocab_size": shape.vocab_size, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(words()) == 0
    known = capsys.readouterr().out
    assert cli.main(words(model=str(folder))) == 0
    assert capsys.readouterr().out == known.replace("Llama-3.1-8B", "my-llama-8-B")
    (folder / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 512}))
    assert cli.main(words(model=str(folder))) == 2
    assert f"model file {folder}/config.json: not supported: the model keeps a compressed" in capsys.readouterr().err


def test_a_hybrid_is_planned_by_rows_with_its_checkpoint(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(model="Qwen3.6-35B-A3B", tokens="4096", suffix="0", chunk="1024", bandwidth_gbps="10")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "takes 64.4 MB, as much as keys and values of 3,144 tokens; a row recomputed to the end needs none." in text
    assert "layer 36 " in text
    assert "layer 37 " not in text
    assert re.search(r"Guard: hybrid: \S", text)
    assert cli.main(words(model="Qwen3.6-27B", pipeline_parallel_size="4", tensor_parallel_size="2")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "16-31" in text
    assert "The checkpoint" in text
    assert cli.main(words(model="Qwen3.6-35B-A3B", pipeline_parallel_size="4")) == 2
    assert "within a row of 4" in capsys.readouterr().err


NEMOTRON = {"model": "Nemotron-3-Nano-30B-A3B", "tokens": "32768", "chunk": "2048"}


def loaded_mb(text: str) -> float:
    """Of loading everything, on one rank."""
    [found] = re.findall(r"^ ?load .* (\S+) MB", text, re.MULTILINE)
    return float(found)


def test_rows_that_differ_in_length_are_named_by_their_first_layer(capsys: pytest.CaptureFixture[str]):
    assert cli.main(words(**NEMOTRON)) == 0
    text = capsys.readouterr().out
    assert "Rows of 7 or 17 layers" in text
    assert "takes 49.1 MB, as much as keys and values of 7,989 tokens" in " ".join(text.split())
    assert re.findall(r"^layer +(\d+) ", text, re.MULTILINE) == ["35", "28", "21", "14", "7", "0"]
    assert loaded_mb(text) == pytest.approx(32768 * 6144 / 1e6 + 49.1, abs=0.1)


@pytest.mark.parametrize(("size", "kv_parts"), [(2, 2), (4, 2), (8, 2)])
def test_ranks_share_running_states_by_groups_and_two_heads_at_most_by_two(
    size: int, kv_parts: int, capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*words(**NEMOTRON, tensor_parallel_size=str(size)), "--shared-link"]) == 0
    text = capsys.readouterr().out
    assert f"on 1 x {size} H100, link 40 Gbit/s shared" in text
    assert loaded_mb(text) == pytest.approx(32768 * 6144 / 1e6 / kv_parts + 49.1 / size, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (NEMOTRON | {"pipeline_parallel_size": "2"}, "would begin within its rows, which differ in length"),
        (NEMOTRON | {"tensor_parallel_size": "3"}, "32 query heads and 2 key/value heads of Nemotron-3-Nano-30B-A3B"),
        (NEMOTRON | {"tensor_parallel_size": "16"}, "8 groups of heads of the recurrent layers"),
        ({"model": "Qwen3.6-27B", "pipeline_parallel_size": "3"}, "at layers 0, 21, 43, within a row of 4"),
        ({"model": "Qwen3.6-27B", "pipeline_parallel_size": "65"}, "64 layers cannot be split into 65"),
        ({"model": "Qwen3.6-35B-A3B", "tensor_parallel_size": "32"}, "cannot be shared by tensor_parallel_size 32"),
    ],
)
def test_what_the_layers_of_a_hybrid_do_not_allow_is_refused(
    changes: dict[str, str], reason: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(words(**changes)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert reason in printed.err
