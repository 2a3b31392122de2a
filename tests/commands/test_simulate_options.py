"""``cacheflow simulate``: options that contradict each other, files that hold nonsense, folders with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cacheflow import cli
from cacheflow.bench.records.simulation import SimulationRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.commands.simulate_report import comparable

ROW = {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [1, 2]}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(ROW | {"timestamp": 100 * n}) + "\n" for n in range(4)))
    return path


@pytest.fixture
def simulate(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command on the trace, or on what the options name; the exit code and everything printed."""

    def run(*options: object, trace: Path | None = trace) -> tuple[int, str]:
        source = [] if trace is None else ["--trace", str(trace)]
        words = ["simulate", *source, "--out", str(tmp_path / "out"), "--replicas", "1", "--policies", "cake"]
        code = cli.main([*words, *map(str, options)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_trace_of_these_tests_can_be_simulated(simulate):
    assert simulate()[0] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--sessions", 5), "--sessions says nothing without --workload; a trace has its own: drop --sessions"),
        (("--measured", "."), "--measured says nothing without --costs published: drop --measured"),
        (("--extrapolate",), "--extrapolate says nothing without --costs published: drop --extrapolate"),
        (("--objective", "p99_ttft"), "--objective says nothing without cacheflow or cacheflow_embedded among"),
        (("--workload", "swe-bench", "--format", "mooncake"), "--format says nothing without --trace: drop --format"),
        (("--workload", "swe-bench", "--repeat", 2), "--repeat says nothing without --trace"),
    ],
)
def test_options_that_contradict_each_other(simulate, tmp_path, options, reason):
    code, said = simulate(*options, **({"trace": None} if "--workload" in options else {}))
    assert code == 2
    assert reason in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--replicas", 10**400), "--replicas must be finite and below 1e+15"),
        (("--replicas", 10**9), "--replicas is 1e+09, must be a whole number of at least 1 and at most 100,000"),
        (("--kv-tokens", 0), "--kv-tokens is 0, must be a whole number"),
        (("--bandwidth-gbps", "nan"), "--bandwidth-gbps must be finite"),
        (("--bandwidth-gbps", "1e-300"), "--bandwidth-gbps is 1e-300, must be above 0, and at least 1e-06"),
        (("--rate-scale", "1e-300"), "--rate-scale is 1e-300, must be between 1e-06 and 1e+06"),
        (("--session-rate", "nan"), "--session-rate is nan"),
        (("--duration-s", "nan"), "--duration-s is nan"),
        (("--slo-ttft-s", "inf"), "--slo-ttft-s is inf"),
        (("--max-cells", -1), "--max-cells is -1"),
        (("--format", "best"), "--format: trace format 'best' is not known; known are auto, cacheflow"),
        (("--workload", "best"), "--workload: workload 'best' is not known; known are lmsys-chat"),
        (("--workload", "swe-bench", "--sessions", 0), "--sessions is 0"),
        (("--workload", "coding-agent", "--max-tokens", 100), "--max-tokens is 100, must be above the 17217 tokens"),
    ],
)
def test_errors_name_what_the_user_wrote(simulate, tmp_path, options, reason):
    code, said = simulate(*options, **({"trace": None} if "--workload" in options else {}))
    assert code == 2
    assert reason in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_replicas": 0}, "num_replicas is 0, must be a whole number"),
        ({"max_num_seqs": 1.5}, "max_num_seqs is 1.5, must be a whole number"),
        ({"block_tokens": 10**12}, "block_tokens is 1e+12, must be a whole number of at least 1 and at most 1,000,000"),
        ({"latency_s": -1}, "latency_s is -1, must be 0 or more"),
        ({"store_gb": -1}, "store_gb is -1, must be 0 or more"),
        ({"store_gbps": 10**400}, "store_gbps must be finite"),
        ({"store_gbps": 0}, "store_gbps is 0, must be above 0"),
        ({"recompute_budget_s": 0}, "recompute_budget_s is 0, must be above 0"),
        ({"host_gbps": None}, "host_gbps is None, must be a number"),
        ({"router": "best"}, "router: router 'best' is not known; known are affinity"),
        ({"gpu": []}, "gpu is [], must be a name"),
    ],
)
def test_errors_of_a_cluster_file_name_the_file_and_its_key(simulate, tmp_path, values, reason):
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(values))
    code, said = simulate("--cluster", path)
    assert code == 2
    assert f"--cluster {path}" in said.replace("\n", " ")
    assert reason in said


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster"])
def test_a_cluster_file_is_json_or_toml(simulate, tmp_path, name):
    (tmp_path / name).write_text("{}")
    code, said = simulate("--cluster", tmp_path / name)
    assert code == 2
    assert "must be a .json or a .toml file" in said


def test_the_host_link_of_a_gpu_file_is_that_of_the_file(tmp_path):
    from cacheflow.commands.simulate_cluster import cluster_config, cluster_values
    from cacheflow.shapes.hardware import find_model

    gpu = {"name": "X", "memory_bytes": 80e9, "memory_bytes_per_s": 3e12, "dense_flops_per_s": 9e14}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(gpu | {"pcie_bytes_per_s": 123e9}))
    config = cluster_config(cluster_values(None, {"gpu": str(path)}), find_model("Qwen3-8B"), slo_ttft_s=2.0)
    assert config.host_bytes_per_s == pytest.approx(123e9)


def last_setting(records: list) -> tuple:
    return comparable(records, records[-1])


def setting_of(record: SimulationRecord) -> dict:
    keys = ("format", "limit", "duration_s", "repeat", "max_tokens", "num_sessions", "session_rate_per_s")
    return {key: value for key in keys if (value := getattr(record, key)) is not None}


def test_records_hold_what_shaped_the_workload(simulate, tmp_path):
    shaping = {"format": "mooncake", "limit": 3, "duration_s": 9.0, "repeat": 2, "max_tokens": 900,
               "session_rate_per_s": 5.0}  # fmt: skip
    assert simulate("--format", "mooncake", "--limit", 3, "--duration-s", 9, "--repeat", 2, "--max-tokens", 900,
                    "--session-rate", 5)[0] == 0  # fmt: skip
    assert simulate("--workload", "swe-bench", "--sessions", 2, "--limit", 5, trace=None)[0] == 0
    first, second = read_records(tmp_path / "out" / "results.jsonl", SimulationRecord)
    assert setting_of(first) == shaping
    assert setting_of(second) == {"num_sessions": 2, "limit": 5}


@pytest.mark.parametrize("other", [("--limit", 3), ("--repeat", 2), ("--max-tokens", 800), ("--kv-tokens", 9000)])
def test_the_picture_shows_one_setting(simulate, tmp_path, other):
    pytest.importorskip("matplotlib")
    results = tmp_path / "out" / "results.jsonl"
    assert "other settings" not in simulate()[1]
    assert "other settings" not in simulate("--policies", "vllm")[1]
    code, said = simulate("--policies", "lmcache", *other)
    assert code == 0
    assert "without 2 records of other settings" in said.replace("\n", " ")
    shown, num_others = last_setting(read_records(results, SimulationRecord))
    assert ([each.policy for each in shown], num_others) == (["lmcache"], 2)
    simulate("--policies", "lmcache")
    shown, num_others = last_setting(read_records(results, SimulationRecord))
    assert ([each.policy for each in shown], num_others) == (["cake", "vllm", "lmcache"], 1)


def test_another_trace_of_the_same_name_is_another_setting(simulate, trace, tmp_path):
    simulate()
    trace.write_text(trace.read_text().replace('"output_length": 3', '"output_length": 4'))
    simulate("--policies", "vllm")
    shown, num_others = last_setting(read_records(tmp_path / "out" / "results.jsonl", SimulationRecord))
    assert ([each.policy for each in shown], num_others) == (["vllm"], 1)


def test_another_gpu_file_of_the_same_name_is_another_setting(simulate, tmp_path):
    gpu = {"name": "X", "memory_bytes": 80e9, "memory_bytes_per_s": 3e12, "dense_flops_per_s": 9e14,
           "pcie_bytes_per_s": 64e9}  # fmt: skip
    path = tmp_path / "x.json"
    for flops in (9e14, 8e14):
        path.write_text(json.dumps(gpu | {"dense_flops_per_s": flops}))
        assert simulate("--gpu", path)[0] == 0
    _, num_others = last_setting(read_records(tmp_path / "out" / "results.jsonl", SimulationRecord))
    assert num_others == 1


def test_the_objective_is_no_setting_of_those_that_have_none(simulate, tmp_path):
    simulate()
    simulate("--policies", "cacheflow", "--objective", "makespan")
    shown, num_others = last_setting(read_records(tmp_path / "out" / "results.jsonl", SimulationRecord))
    assert ([each.policy for each in shown], num_others) == (["cake", "cacheflow"], 0)


def test_a_half_written_record_is_found_before_anything_is_simulated(simulate, tmp_path, monkeypatch):
    from cacheflow.commands import simulate as simulate_command

    simulate()
    results = tmp_path / "out" / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole + whole[: len(whole) // 2])
    order = []
    real = simulate_command.simulate

    def watched(*args, **options):
        order.append(results.read_text())
        return real(*args, **options)

    monkeypatch.setattr(simulate_command, "simulate", watched)
    code, said = simulate("--policies", "vllm")
    assert code == 0
    assert order == [whole]
    assert "the last line was only half written" in said
    assert [each.policy for each in read_records(results, SimulationRecord)] == ["cake", "vllm"]


def test_a_damaged_record_is_named_before_anything_is_simulated(simulate, tmp_path, monkeypatch):
    from cacheflow.commands import simulate as simulate_command

    simulate()
    results = tmp_path / "out" / "results.jsonl"
    results.write_text(results.read_text() + '{"suite": "simulate"}\n')
    monkeypatch.setattr(simulate_command, "simulate", lambda *args, **options: pytest.fail("simulated"))
    code, said = simulate()
    assert code == 2
    assert "results.jsonl, line 2: malformed record: Object missing required field `policy`" in said


def test_a_folder_that_nothing_can_be_written_into_is_refused_before_anything_is_simulated(simulate, monkeypatch):
    from cacheflow.commands import simulate as simulate_command

    monkeypatch.setattr(simulate_command, "simulate", lambda *args, **options: pytest.fail("simulated"))
    code, said = simulate("--out", "/proc/self")  # not for root either
    assert code == 2
    assert "--out /proc/self cannot be used" in said


def test_an_interrupted_simulation_keeps_what_is_done(simulate, tmp_path, monkeypatch):
    from cacheflow.commands import simulate as simulate_command

    real, calls = simulate_command.simulate, []

    def interrupted(*args, **options):
        calls.append(options["policy"].name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(simulate_command, "simulate", interrupted)
    code, said = simulate("--policies", "cake,vllm,lmcache")
    assert code == 130
    assert "interrupted" in said
    assert [each.policy for each in read_records(tmp_path / "out" / "results.jsonl", SimulationRecord)] == ["cake"]


def test_a_run_draws_its_own_setting_whoever_else_wrote_last(simulate, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from cacheflow.bench.results_file import append_line
    from cacheflow.commands import simulate as simulate_command

    assert simulate("--limit", 2)[0] == 0
    results = tmp_path / "out" / "results.jsonl"
    other, drawn, real = results.read_text(), [], simulate_command.append_record

    def append_and_be_overtaken(path, record):
        real(path, record)
        append_line(path, other.strip())

    monkeypatch.setattr(simulate_command, "append_record", append_and_be_overtaken)
    monkeypatch.setattr(simulate_command, "draw_ttft_cdf", lambda records, path: drawn.append(records))
    assert simulate("--limit", 3)[0] == 0
    assert [[each.limit for each in records] for records in drawn] == [[3]]
