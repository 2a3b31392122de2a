"""The study on a GPU, rehearsed: the same parts along the same way, tiny and on the CPU."""

import json

import pytest

from cacheflow import cli
from cacheflow.bench.records.base import BenchRecord
from cacheflow.bench.records.gpu import GpuRecord
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.policies.registry import RESTORE_POLICIES

pytestmark = pytest.mark.torch

SHAPE = {
    "model_type": "llama", "head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_hidden_layers": 8, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = ("--tokens", "512", "--short-tokens", "128", "--long-tokens", "1024", "--suffix", "16", "--chunk", "64")


@pytest.fixture
def rehearse(tmp_path, capsys):
    (tmp_path / "tiny.json").write_text(json.dumps(SHAPE))

    def run(*options):
        out = tmp_path / "out"
        words = ["bench", "gpu", "--device", "cpu", "--shape", tmp_path / "tiny.json", "--out", out, *SMALL, *options]
        code = cli.main([str(word) for word in words])
        results = out / "results.jsonl"
        records = read_records(results, BenchRecord) if results.exists() else []
        return code, records, capsys.readouterr().out

    return run


def done(records):
    return [record.part for record in records if isinstance(record, GpuRecord) and record.name == "done"]


@pytest.mark.long
def test_the_whole_study_is_rehearsed_and_taken_up(rehearse, tmp_path):
    options = ("--pace", "1000", "--repeats", "1", "--cost-repeats", "1", "--time-limit-s", "900")
    code, records, shown = rehearse(*options, "--parts", "0,1,2,3")
    assert code == 0
    assert done(records) == [0, 1, 2, 3]
    code, records, shown = rehearse(*options)
    assert code == 0
    assert done(records) == [0, 1, 2, 3, 4, 5, 6, 8]
    restored = [record for record in records if isinstance(record, RestoreRecord)]
    assert all(record.correct for record in restored)
    main = [record for record in restored if (record.num_tokens, record.chunk_tokens) == (512, 64)]
    assert {record.policy for record in main} == set(RESTORE_POLICIES)
    assert {record.store for record in restored} == {"pinned", "memory"}
    assert {record.num_tokens for record in restored} == {128, 512, 1024}
    assert all({"launch_over_wall", "attention"} <= set(record.environment) for record in restored)
    assert "measured, part by part" in shown
    assert shown.index("measured, part by part") < shown.index("records in")
    assert sum(1 for each in (tmp_path / "out").rglob("*") if each.is_file()) <= 8
    code, again, _ = rehearse(*options)
    assert (code, again) == (0, records)


def test_stores_in_memory_are_compared_with_a_plain_copy(rehearse):
    code, records, shown = rehearse("--pace", "1000", "--parts", "6", "--cost-repeats", "1")
    assert code == 0
    assert done(records) == [6]
    found = [record for record in records if isinstance(record, GpuRecord) and record.name != "done"]
    assert [record.name for record in found] == ["memory", "memory, every read verified", "shared memory"]
    for record in found:
        assert record.correct
        assert record.values["lent_share"] == 1.0
        assert record.values["of_copy"] == record.values["bytes_per_s"] / record.values["copy_bytes_per_s"]
    assert "of_copy" in shown


def test_a_part_without_its_time_is_left_out_and_said(rehearse):
    code, records, shown = rehearse("--time-limit-s", "41", "--pace", "1", "--parts", "1,8")
    assert code == 0
    assert records == []
    assert "part 1 is left out: it needs 42 s" in shown
    assert "part 8 is left out: it needs 100 s" in shown
    assert "stopped at the time limit of 41 s; run the same command again to go on" in shown


def test_what_is_found_is_on_record_with_its_name(rehearse):
    code, records, shown = rehearse("--pace", "1000", "--parts", "0")
    assert code == 0
    [ceilings, end] = records
    assert (ceilings.part, ceilings.name, end.name) == (0, "ceilings", "done")
    assert all(value > 0 for value in ceilings.values.values())
    assert set(ceilings.values) == {
        "product_flops_per_s", "memory_bytes_per_s", "upload_bytes_per_s", "download_bytes_per_s", "pinning_s_per_gib"
    }  # fmt: skip
    assert "upload_bytes_per_s" in shown
    assert rehearse("--pace", "1000", "--parts", "0")[1] == records


def test_wrong_bits_end_the_study(rehearse, monkeypatch):
    from cacheflow.bench.gpu import exactness
    from cacheflow.errors import SelfTestError

    def broken(model):
        raise SelfTestError(f"{model.name} is not reproduced")

    monkeypatch.setattr(exactness, "self_test", broken)
    monkeypatch.setattr(exactness, "RESTORE_POLICIES", ("load",))
    code, records, shown = rehearse("--pace", "1000", "--parts", "1,2")
    assert code == 1
    assert done(records) == []
    assert {record.part for record in records} == {1}
    assert "the study ends here" in shown


def test_a_part_that_fails_is_said_and_the_others_have_their_time(rehearse, monkeypatch):
    from cacheflow.bench.gpu import costs

    def full(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(costs, "CostMeter", full)
    options = ("--pace", "1000", "--parts", "2,0")
    code, records, shown = rehearse(*options)
    assert code == 0
    assert done(records) == [0]
    [failed] = [record for record in records if record.name == "failed"]
    assert (failed.part, failed.values) == (2, {"error": "RuntimeError: out of memory"})
    assert "part 2 failed: RuntimeError: out of memory" in shown
    assert "measured, part by part" in shown
    monkeypatch.undo()
    assert done(rehearse(*options)[1]) == [0, 2]


def test_parts_that_are_none(refused, tmp_path):
    said = refused("bench", "gpu", "--out", tmp_path, "--device", "cpu", "--parts", "0,7")
    assert "--parts 7: known are 0,1,2,3,4,5,6,8" in said
