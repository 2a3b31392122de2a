"""The study inside vLLM on a GPU, rehearsed: the same command with a tiny shape on the CPU. Runs only where vLLM is."""

import importlib.util
import json
from pathlib import Path

import pytest

from cacheflow.bench.records.suites import read_records
from cacheflow.bench.records.vllm import VllmRecord
from cacheflow.bench.vllm.policies import MODES
from cacheflow.cli import main

_SPEC = importlib.util.find_spec("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(_SPEC is None or _SPEC.origin is None, reason="needs vLLM, not a folder of that name"),
]

SHAPE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64,
    "num_hidden_layers": 8, "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 8192,
}  # fmt: skip
FAST, SLOW = 4.0, 0.02
"""Gbit/s: 8 MiB of a prefix in 17 ms, far less than they take to compute, and in 3.4 s, far more."""


def test_the_study_inside_vllm_is_rehearsed_and_taken_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shape, out = tmp_path / "tiny.json", tmp_path / "out"
    shape.write_text(json.dumps(SHAPE))

    def run(*options: str) -> tuple[int, list[VllmRecord], str]:
        words = ["bench", "vllm", "--out", str(out), "--shape", str(shape), "--tokens", "1024", "--suffix", "37",
                 "--chunk", "256", *options]  # fmt: skip
        code = main(words)
        return code, read_records(out / "results.jsonl", VllmRecord), capsys.readouterr().out

    code, records, shown = run("--gbps", f"{FAST},{SLOW}", "--repeats", "1", "--time-limit-s", "900")
    assert code == 0
    assert [(record.link_bytes_per_s, record.policy) for record in records] == [
        (gbps * 1e9 / 8, policy) for gbps in (FAST, SLOW) for policy in MODES
    ]
    assert all(record.correct for record in records)
    assert all(record.equal_tokens == record.compared_tokens == 32 for record in records)
    restored = {(record.link_bytes_per_s, record.policy): record.cached_tokens for record in records}
    assert all(restored[gbps * 1e9 / 8, "vllm"] == 0 for gbps in (FAST, SLOW))
    assert all(restored[gbps * 1e9 / 8, "load"] == 1024 for gbps in (FAST, SLOW))
    choices = [record.guard.choice for record in records if record.guard is not None]
    assert len(choices) == 2
    assert choices[0] in ("load", "hybrid")
    assert choices[1] in ("recompute", "hybrid")
    assert all(record.guard.reason for record in records if record.guard is not None)
    assert shown.rindex("the guard chose") < shown.rindex("records in")
    assert sum(1 for each in out.rglob("*") if each.is_file()) <= 8

    (out / "results.jsonl").write_text("".join(record.to_json() + "\n" for record in records[:3]))
    code, again, shown = run("--gbps", f"{FAST},{SLOW}", "--repeats", "1", "--time-limit-s", "30")
    assert code == 0
    assert again == records[:3]
    assert f"{SLOW:g} Gbit/s is left out from here on" in shown
    assert "stopped at the time limit of 30 s; run the same command again to go on" in shown
