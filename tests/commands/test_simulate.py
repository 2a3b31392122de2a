from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cacheflow import cli
from cacheflow.bench.records.simulation import SimulationRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.commands.simulate_cluster import cluster_config, cluster_values, find_costs
from cacheflow.commands.simulate_report import comparable
from cacheflow.commands.simulate_workload import measure, restarted, shaped, trace_workload
from cacheflow.errors import ConfigError
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable
from cacheflow.plan.problem import LinkCost
from cacheflow.plan.stages import RankLayout
from cacheflow.profiling.profile import Profile, save_profile
from cacheflow.shapes.hardware import find_model

ROWS = [
    {"timestamp": 400 * n, "input_length": 512 * len(ids), "output_length": 5 + n, "hash_ids": ids}
    for n, ids in enumerate([[0, 1, 2], [0, 1, 2, 3], [0, 9], [0, 1, 2, 3, 4, 5], [0, 9, 10, 11], [20, 21]] * 3)
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(trace: Path, out: Path, *more: str) -> list[str]:
    return ["simulate", "--trace", str(trace), "--out", str(out), "--replicas", "2", "--kv-tokens", "8192", *more]


def test_every_policy_gets_a_record_a_row_and_a_line(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert cli.main(words(trace, out)) == 0
    text = capsys.readouterr().out
    records = read_records(out / "results.jsonl", SimulationRecord)
    names = ["vllm", "lmcache", "hicache", "cake", "cacheflow_v1", "cacheflow_v2", "cacheflow"]
    assert [each.policy for each in records] == names
    assert "cacheflow: ours, the vLLM plugin" in " ".join(text.split())
    assert "cacheflow_embedded" not in text
    for each in records:
        assert each.policy in text
        assert each.num_requests == len(ROWS)
        assert each.costs == "roofline"
        assert each.cluster["num_replicas"] == 2
        assert each.output_tokens == sum(row["output_length"] for row in ROWS)
        tokens = each.hit_tokens + each.loaded_tokens + each.recomputed_tokens + each.new_tokens
        assert tokens == pytest.approx(sum(row["input_length"] for row in ROWS))
        assert 0 < each.ttft_p50_s <= each.ttft_p90_s <= each.ttft_p99_s <= each.ttft_max_s
        assert each.ttft_percentiles_s["50.0"] == each.ttft_p50_s
    assert (out / "ttft-cdf.png").read_bytes().startswith(b"\x89PNG")


ALL = "vllm,lmcache,hicache,cake,cacheflow_v1,cacheflow_v2,cacheflow,cacheflow_embedded"


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_a_trace_without_reuse_says_so_and_gives_nobody_a_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "fresh.csv"
    rows = [f"2023-11-16 18:17:03.{n:03d}0000,{4000 - 37 * n if n % 3 else 9000},{5 + n}" for n in range(60)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    command = ["simulate", "--trace", str(path), "--replicas", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "plain")]) == 0
    said = one_line(capsys.readouterr().out)
    assert "reuse: none. No prompt of this workload begins with a full block of 512 tokens of an earlier one" in said
    assert "nothing can be restored, and no row differs at all" in said
    plain = read_records(tmp_path / "plain" / "results.jsonl", SimulationRecord)
    assert {each.reusable_tokens for each in plain} == {0}
    assert len(plain) == 7
    for each in plain:
        for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "ttlt_mean_s"):
            assert getattr(each, key) == pytest.approx(getattr(plain[0], key), rel=1e-9), each.policy
    assert cli.main([*command, str(tmp_path / "all"), "--policies", ALL]) == 0
    said = one_line(capsys.readouterr().out)
    assert "no row differs but cacheflow_embedded, which serves new prompts in another order" in said
    *others, embedded = read_records(tmp_path / "all" / "results.jsonl", SimulationRecord)
    assert embedded.policy == "cacheflow_embedded"
    assert embedded.ttft_mean_s < 0.99 * others[-1].ttft_mean_s


def test_the_share_of_reusable_tokens_is_printed(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By hand: six prompts share 0, 3, 1, 4, 2 and 0 blocks with those before; again, all but their last."""
    assert cli.main(words(trace, tmp_path / "out", "--policies", "vllm")) == 0
    # Of a prompt that ends with a block the last is computed again, because its last token gives the first answer.
    once, again = 0 + 3 + 1 + 4 + 2 + 0, 2 + 3 + 1 + 5 + 3 + 1
    tokens = 512 * (once + 2 * again)
    total = sum(row["input_length"] for row in ROWS)
    [record] = read_records(tmp_path / "out" / "results.jsonl", SimulationRecord)
    assert record.reusable_tokens == tokens
    assert f"reuse: {tokens / total:.1%} of the prompt tokens ({tokens:,} of {total:,})" in one_line(
        capsys.readouterr().out
    )


def test_the_embedded_engines_order_is_a_row_that_says_so(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("--policies", "cacheflow,cacheflow_embedded", "--objective", "p99_ttft")
    assert cli.main(words(trace, tmp_path / "out", *options)) == 0
    plugin, embedded = read_records(tmp_path / "out" / "results.jsonl", SimulationRecord)
    assert plugin.order == "restorations by objective, new tokens by arrival"
    assert embedded.order == "all work by objective, new prompts too"
    said = one_line(capsys.readouterr().out)
    for each in (plugin, embedded):
        assert f"order: {each.order}" in said
    assert "cacheflow_embedded: ours, the embedded engine" in said


def as_of_old(record: SimulationRecord) -> dict:
    """The record of a time when ``cacheflow`` ordered new prompts too, and nobody said so."""
    return {
        key: value for key, value in json.loads(record.to_json()).items() if key not in ("order", "reusable_tokens")
    }


def test_records_of_old_are_named_as_what_they_were(trace: Path, tmp_path: Path):
    results = tmp_path / "out" / "results.jsonl"
    assert cli.main(words(trace, tmp_path / "out", "--policies", "vllm,cacheflow_embedded")) == 0
    old = [as_of_old(each) for each in read_records(results, SimulationRecord)]
    old[1]["policy"] = "cacheflow"
    results.write_text("".join(json.dumps(each) + "\n" for each in old))
    assert [each.policy for each in read_records(results, SimulationRecord)] == ["vllm", "cacheflow_embedded"]
    assert cli.main(words(trace, tmp_path / "out", "--policies", "cacheflow")) == 0
    assert "order" not in json.loads(results.read_text().splitlines()[1]), "what was written stays as it was"
    records = read_records(results, SimulationRecord)
    shown, num_others = comparable(records, records[-1])
    assert ([each.policy for each in shown], num_others) == (["vllm", "cacheflow_embedded", "cacheflow"], 0)
    assert shown[1].ttft_mean_s == old[1]["ttft_mean_s"]


def test_the_committed_records_read_and_tell_both_orders_apart():
    records = read_records(Path(__file__).parents[2] / "benchmarks" / "simulated" / "results.jsonl", SimulationRecord)
    settings = {each.requests_fingerprint: comparable(records, each)[0] for each in records}
    assert len(settings) == 3
    for same in settings.values():
        by_name = {each.policy: each for each in same}
        assert set(by_name) == set(ALL.split(","))
        plugin, embedded = by_name["cacheflow"], by_name["cacheflow_embedded"]
        assert (plugin.order, bool(embedded.order)) == ("restorations by objective, new tokens by arrival", True)
        assert embedded.ttft_mean_s < plugin.ttft_mean_s < by_name["cake"].ttft_mean_s


def test_the_same_seed_gives_the_same_records(tmp_path: Path):
    options = ["--workload", "swe-bench", "--sessions", "3", "--replicas", "2", "--limit", "25", "--seed", "4"]
    for name in ("a", "b"):
        command = ["simulate", *options, "--policies", "cake,cacheflow", "--out", str(tmp_path / name)]
        assert cli.main(command) == 0
    first, second = (read_records(tmp_path / name / "results.jsonl", SimulationRecord) for name in ("a", "b"))
    assert [each.wall_s > 0 for each in [*first, *second]] == [True] * 4
    first, second = ([msgspec.structs.replace(each, wall_s=0.0) for each in records] for records in (first, second))
    assert first == second
    assert first[0].seed == 4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--policies", "cake,best"], "--policies: policy 'best' is not known; known are vllm, lmcache"),
        (["--policies", ","], "--policies is empty; known: vllm"),
        (["--objective", "best"], "--objective: objective 'best' is not known; known are mean_ttft"),
        (["--model", "GPT-9"], "unknown model 'GPT-9'; known: Llama-3.1-8B"),
        (["--gpu", "H9000"], "unknown gpu 'H9000'; known: L40S"),
        (["--bandwidth-gbps", "0"], "--bandwidth-gbps is 0, must be above 0"),
        (["--kv-tokens", "2048"], "a replica holds 2,048"),
        (["--replicas", "0"], "--replicas is 0"),
        (["--rate-scale", "0"], "--rate-scale is 0.0"),
        (["--limit", "0"], "--limit is 0"),
        (["--max-tokens", "100"], "has no request left"),
        (["--slo-ttft-s", "0"], "--slo-ttft-s is 0.0"),
        (["--max-cells", "1"], "--max-cells is 1"),
        (["--session-rate", "0"], "--session-rate is 0.0, must be between"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--bandwidth-gbps", "inf"], "--bandwidth-gbps must be finite and below"),
        (["--costs", "published"], "--costs published needs --measured"),
        (["--costs", "nowhere.json"], "profile nowhere.json cannot be read"),
        (["--cluster", "nowhere.toml"], "--cluster nowhere.toml cannot be read"),
    ],
)
def test_errors_at_the_door(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more, reason):
    assert cli.main(words(trace, tmp_path / "out", *more)) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ('{"timestamp": 5}\n', "no known trace format"),
        (json.dumps(ROWS[1]) + "\n" + json.dumps(ROWS[0]) + "\n", "not to go backwards"),
    ],
)
def test_a_bad_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert cli.main(words(path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl" in error
    assert reason in error


def test_a_cluster_file_is_read_and_options_override_it(tmp_path: Path):
    path = tmp_path / "cluster.toml"
    path.write_text('num_replicas = 4\nbandwidth_gbps = 40\ngpu = "A100"\nhost_gb = 1.31072\nrouter = "round_robin"\n')
    values = cluster_values(path, {"bandwidth_gbps": 80.0})
    config = cluster_config(values, find_model("Llama-3.1-8B"), slo_ttft_s=2.0)
    assert (config.num_replicas, config.router, values.gpu) == (4, "round_robin", "A100")
    assert config.nic_bytes_per_s == 1e10
    assert config.host_tokens == 10_000
    assert config.host_bytes_per_s == 32e9
    # 72 GB of use, 16.06 GB of weights, 131,072 bytes a token.
    assert config.kv_tokens == pytest.approx((72e9 - 16.06e9) / 131_072, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"replicas": 4}', "with the keys num_replicas"),
        ('{"num_replicas": "4"}', "num_replicas is '4', must be a number"),
        ('{"gpu": 4}', "gpu is 4, must be a name"),
        ("[]", "must be one table"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"store_gb": Infinity}', "store_gb must be finite"),
        ('{"host_gb": NaN}', "host_gb must be finite"),
    ],
)
def test_a_malformed_cluster_file_is_named(tmp_path: Path, text, reason):
    path = tmp_path / "cluster.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        cluster_values(path, {})


def test_a_model_that_no_gpu_holds_is_refused():
    values = cluster_values(None, {"model": "Llama-3.1-70B"})
    with pytest.raises(ConfigError, match=r"the weights of Llama-3.1-70B take 141 GB, H100 has 80 GB"):
        cluster_config(values, find_model("Llama-3.1-70B"), slo_ttft_s=2.0)


def test_a_model_too_large_for_one_gpu_is_shared_by_several(tmp_path: Path):
    path = tmp_path / "cluster.json"
    path.write_text(
        '{"model": "Llama-3.1-70B", "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "link_per_rank": false}'
    )
    config = cluster_config(cluster_values(path, {}), find_model("Llama-3.1-70B"), slo_ttft_s=2.0)
    assert config.layout == RankLayout(pipeline_parallel_size=2, tensor_parallel_size=2, link_per_rank=False)
    # 4 x 72 GB less 141 GB of weights, at 328 kB a token.
    assert config.kv_tokens == pytest.approx(448e3, rel=0.03)
    assert config.replica_spec().store_link.bytes_per_s == pytest.approx(10e9 / 8 / 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"link_per_rank": 1}', "link_per_rank is 1, must be true or false"),
        ('{"tensor_parallel_size": true}', "tensor_parallel_size is True, must be a number"),
        ('{"tensor_parallel_size": 3}', "cannot be shared by tensor_parallel_size 3"),
        ('{"pipeline_parallel_size": 1.5}', "pipeline_parallel_size is 1.5, must be a whole number"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "cluster.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        cluster_config(cluster_values(path, {}), find_model("Llama-3.1-8B"), slo_ttft_s=2.0)


def test_a_repeated_trace_goes_on_with_prefixes_of_its_own(trace: Path):
    once = list(trace_workload(trace, format="auto", block_tokens=512, repeat=1).read())
    twice = list(trace_workload(trace, format="auto", block_tokens=512, repeat=2).read())
    assert [each.request_id for each in twice] == list(range(2 * len(ROWS)))
    gaps = [b.arrival_s - a.arrival_s for a, b in pairwise(twice)]
    assert min(gaps) > 0
    first, second = ({b for each in part for b in each.block_ids} for part in (twice[: len(ROWS)], twice[len(ROWS) :]))
    assert not first & second
    assert len(first) == len(second) == len({b for each in once for b in each.block_ids})


def test_scaling_shortens_time_and_cuts_apply_after_it(trace: Path):
    base = trace_workload(trace, format="auto", block_tokens=512, repeat=1)

    def ids(**changes):
        options = {"limit": None, "duration_s": None, "rate_scale": 1.0, "seed": 0, "max_tokens": None} | changes
        return [each.request_id for each in shaped(base, **options).read()]

    assert ids(duration_s=2.0) == [0, 1, 2, 3, 4, 5]
    assert ids(duration_s=2.0, rate_scale=2.0) == list(range(11))
    assert ids(limit=3) == [0, 1, 2]
    assert ids(max_tokens=1024) == [2, 5, 8, 11, 14, 17]


def test_sessions_of_a_trace_start_at_another_rate(trace: Path):
    base = trace_workload(trace, format="auto", block_tokens=512, repeat=1)
    slow, again = (list(restarted(base, rate_per_s=0.01, seed=3).read()) for _ in range(2))
    assert slow == again
    assert len(slow) == len(ROWS)
    assert slow[-1].arrival_s > 20 * 0.4 * len(ROWS)


def test_a_turn_after_one_that_was_left_out_follows_the_one_before(tmp_path: Path):
    path = tmp_path / "saved.jsonl"
    rows = [
        {"request_id": n, "arrival_s": n, "input_tokens": tokens, "output_tokens": 1, "block_tokens": 512,
         "block_ids": list(range(n * 10, n * 10 + -(-tokens // 512))), "session_id": "a",
         "after": n - 1 if n else None, "delay_s": 0.5 if n else 0.0}
        for n, tokens in enumerate((100, 5000, 6000, 200))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = trace_workload(path, format="cacheflow", block_tokens=512, repeat=1)
    left = list(shaped(base, limit=None, duration_s=None, rate_scale=1.0, seed=0, max_tokens=1000).read())
    assert [(each.request_id, each.after) for each in left] == [(0, None), (3, 0)]


def test_a_workload_is_measured_before_anything_runs(trace: Path):
    values = cluster_values(None, {"kv_tokens": 8192})
    shape = find_model("Llama-3.1-8B")
    config = cluster_config(values, shape, slo_ttft_s=2.0)
    costs = find_costs("roofline", values, shape, measured=None, extrapolate=False)
    size = measure(trace_workload(trace, format="auto", block_tokens=512, repeat=1), config, costs)
    assert size.num_requests == len(ROWS)
    assert size.input_tokens == sum(row["input_length"] for row in ROWS)
    assert size.reusable_share == size.reusable_tokens / size.input_tokens


def test_published_costs_are_named_and_refused_beyond_their_range(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "measured"
    folder.mkdir()
    stem = folder / "llmservingsim_CARD_meta_Llama-3.1-8B_bf16_tp1"
    attention = [f"{c},{p},0,0,{c * (p + c) / 1e4 + 5}" for c in (16, 512, 1024) for p in (0, 512, 1024)]
    attention += [f"0,0,{n},{k},{n * k / 100 + 5}" for n in (1, 64) for k in (16, 4096)]
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    stem.with_name(stem.name + "_attention.csv").write_text("\n".join([header, *attention]) + "\n")
    parts = ("layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
    dense = [f"{part},{tokens},{10 + tokens}" for part in parts for tokens in (1, 1024)]
    stem.with_name(stem.name + "_dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]) + "\n")
    options = ["--costs", "published", "--measured", str(folder), "--gpu", "CARD", "--policies", "cacheflow"]
    assert cli.main(words(trace, tmp_path / "out", *options)) == 2
    assert "the longest prompt has 3,072 tokens, for which published:CARD/Llama-3.1-8B" in capsys.readouterr().err
    assert cli.main(words(trace, tmp_path / "out", *options, "--max-tokens", "1536")) == 0
    assert cli.main(words(trace, tmp_path / "out", *options, "--extrapolate")) == 0
    sources = [each.costs for each in read_records(tmp_path / "out" / "results.jsonl", SimulationRecord)]
    assert sources == ["published:CARD/Llama-3.1-8B", "published:CARD/Llama-3.1-8B+extrapolated"]
    assert cli.main(words(trace, tmp_path / "out", *options[:-4], "--gpu", "OTHER")) == 2
    assert "no measurements of gpu 'OTHER'; known: CARD" in capsys.readouterr().err


def test_a_calibrated_profile_prices_a_simulation(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chunks, offsets = (16, 512), (0, 4096)
    seconds_QP = np.array([[1e-5 * q + 1e-9 * q * p for p in offsets] for q in chunks])
    identity = CostIdentity(
        model="Llama-3.1-8B", fingerprint="f", num_layers=32, device_type="cpu", device="box", dtype="bfloat16",
        num_threads=1, attention="sdpa",
    )  # fmt: skip
    grid = CostGrid(chunk_tokens=chunks, offsets=offsets, full_QP=seconds_QP, kv_only_QP=seconds_QP * 0.1)
    table = CostTable(identity=identity, layer_kinds=("full",) * 32, kinds={"full": grid}, head_s=0.001)
    profile = Profile(
        costs=table, link=LinkCost(bytes_per_s=1e9), chunk_tokens=512, crossover_tokens=0, break_even_tokens=None,
        big_pass_s={},
    )  # fmt: skip
    path = tmp_path / "profile.json"
    save_profile(profile, path)
    options = ["--costs", str(path), "--policies", "vllm"]
    assert cli.main(words(trace, tmp_path / "out", *options)) == 0
    [only] = read_records(tmp_path / "out" / "results.jsonl", SimulationRecord)
    assert (only.costs, only.gpu) == (f"measured:{path}", "box")
    # The first prompt of all, 1,536 tokens: three chunks through 32 layers, and the head.
    alone_s = 32 * sum(1e-5 * 512 + 1e-9 * 512 * offset for offset in (0, 512, 1024)) + 0.001
    assert only.ttft_max_s >= alone_s
    assert cli.main(words(trace, tmp_path / "out", *options, "--model", "Qwen3-8B")) == 2
    assert "costs of 32 layers, Qwen3-8B has 36" in capsys.readouterr().err


def test_a_simulated_model_is_a_hugging_face_folder_too(trace: Path, tmp_path: Path):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000,
    }  # fmt: skip
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert cli.main(words(trace, out, "--model", str(folder), "--policies", "cacheflow")) == 0
    (record,) = read_records(out / "results.jsonl", SimulationRecord)
    assert record.model == "tiny"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Two long chats by turns, of which GPU memory holds one."""
    rows = [
        {
            "timestamp": 2000 * n,
            "input_length": 512 * 41,
            "output_length": 4,
            "hash_ids": [*range(lo, lo + 40), 1000 + n],
        }
        for n, lo in enumerate([0, 100] * 4)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simulated_hybrid(chats: Path, folder: Path, model: str, layout: dict[str, object]) -> tuple[int, Path]:
    """Exit code and folder."""
    cluster, out = folder / "cluster.json", folder / f"out-{len(list(folder.iterdir()))}"
    cluster.write_text(json.dumps(layout | {"num_replicas": 1, "kv_tokens": 24_576}))
    command = ["simulate", "--trace", chats, "--out", out, "--cluster", cluster, "--model", model]
    return cli.main([str(word) for word in (*command, "--policies", "vllm,cake,cacheflow")]), out


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ("Nemotron-3-Nano-30B-A3B", ({"tensor_parallel_size": 2},)),
        ("Qwen3.6-27B", ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {
            "pipeline_parallel_size": 4, "tensor_parallel_size": 2, "link_per_rank": False,
        })),
        ("Qwen3.6-35B-A3B", ({"pipeline_parallel_size": 2},)),
    ],
)  # fmt: skip
def test_hybrids_are_restored_on_one_gpu_and_on_several(
    chats: Path, tmp_path: Path, model: str, layouts: tuple[dict[str, object], ...]
):
    alone = 0.0
    for layout in ({}, *layouts):
        code, out = simulated_hybrid(chats, tmp_path, model, layout)
        assert code == 0
        found = {each.policy: each for each in read_records(out / "results.jsonl", SimulationRecord)}
        ours, own = found["cacheflow"], found["vllm"]
        assert ours.loaded_tokens > own.loaded_tokens == 0
        assert ours.hit_tokens + ours.loaded_tokens + ours.recomputed_tokens == pytest.approx(6 * 40 * 512)
        assert ours.hit_tokens < 6 * 40 * 512 / 2
        assert ours.ttft_mean_s < own.ttft_mean_s
        alone = alone or ours.ttft_mean_s
        assert layout == {} or ours.ttft_mean_s < alone  # each of several GPUs has less to restore


@pytest.mark.parametrize(
    ("model", "layout", "reason"),
    [
        ("Nemotron-3-Nano-30B-A3B", {"pipeline_parallel_size": 2}, "would begin within its rows"),
        ("Nemotron-3-Nano-30B-A3B", {"tensor_parallel_size": 16}, "8 groups of heads of the recurrent layers"),
        ("Qwen3.6-27B", {"pipeline_parallel_size": 3}, "at layers 0, 21, 43, within a row of 4"),
    ],
)
def test_layouts_that_a_hybrid_does_not_allow_are_refused_before_anything_is_simulated(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, layout: dict[str, object], reason: str
):
    code, out = simulated_hybrid(chats, tmp_path, model, layout)
    assert code == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()
