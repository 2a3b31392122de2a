"""What bad input gets: a clear error at the door, from the library and on the command line, and nothing lost."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cacheflow.errors import (
    CacheFlowError,
    ConfigError,
    ProfileError,
    PromptError,
    StoreError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from cacheflow.plan.problem import LinkCost
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.stores.memory import MemoryStore
from support.bad_input import CAPACITY, PLAN, bench, torch_test

# An unsupported family


@pytest.fixture
def foreign_folder(tmp_path):
    """A model whose family the engine would silently get wrong."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


@torch_test
def test_an_unsupported_family(foreign_folder, tmp_path, refused, one_thread):
    from cacheflow.embedded import Engine
    from support.embedded_cases import cost_table, tiny

    names = "allowed: llama, mistral, qwen2, qwen3, qwen3_moe"
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        costs = cost_table(tiny("llama", "float32"))
        with pytest.raises(UnsupportedModelError, match=f"model_type gpt2 is not supported; {names}"):
            Engine.open(foreign_folder, store=store, costs=costs, link=LinkCost(bytes_per_s=1e9))
    for argv in (
        ("calibrate", foreign_folder),
        bench(foreign_folder, tmp_path / "out"),
        ("demo", "--model", foreign_folder, "--out", tmp_path / "out"),
    ):
        error = refused(*argv)
        assert "model_type gpt2 is not supported" in error
        assert names in error


@torch_test
@pytest.mark.parametrize("config", ["", "{", "[]", '{"model_type": "nothing-of-the-kind"}', "{}"], ids=repr)
def test_a_folder_that_holds_no_model(tmp_path, refused, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    assert str(tmp_path) in refused("calibrate", tmp_path)


# A profile of another model or device


@torch_test
@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "other"), ("fingerprint", "0" * 64), ("device", "Another processor"), ("num_threads", 63)],
)
def test_a_profile_of_something_else(model_folder, tmp_path, one_thread, field, value):
    from cacheflow.embedded import Engine
    from cacheflow.engine.model import load_model
    from cacheflow.profiling.profile import Profile, load_profile, save_profile
    from support.embedded_cases import cost_table

    costs = cost_table(load_model(model_folder, dtype="float32"))
    link = LinkCost(bytes_per_s=1e9)
    other = replace(costs, identity=replace(costs.identity, **{field: value}))
    profile = Profile(
        costs=other, link=link, chunk_tokens=32, crossover_tokens=0, break_even_tokens=None, big_pass_s={}
    )
    save_profile(profile, tmp_path / "p.json")
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        loaded = load_profile(tmp_path / "p.json")
        with pytest.raises(ProfileError, match=f"measured with {field} .*{value}.*calibrate again"):
            Engine.open(model_folder, store=store, costs=loaded.costs, link=loaded.link)


@torch_test
def test_a_profile_of_a_gpu_on_a_machine_without_one(model_folder, one_thread):
    import torch

    from cacheflow.embedded import Engine
    from support.embedded_cases import cost_table, tiny

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    costs = cost_table(tiny("llama", "bfloat16"))
    costs = replace(costs, identity=replace(costs.identity, device_type="cuda", device="NVIDIA H200"))
    with (
        MemoryStore(capacity_bytes=CAPACITY) as store,
        pytest.raises(ProfileError, match="measured on NVIDIA H200; this machine has no CUDA device"),
    ):
        Engine.open(model_folder, store=store, costs=costs, link=LinkCost(bytes_per_s=1e9))


@torch_test
def test_a_gpu_where_there_is_none(model_folder, tmp_path, refused):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for argv in (("calibrate", model_folder, "--device", "cuda"), bench(model_folder, tmp_path, "--device", "cuda")):
        assert "--device cuda: this machine has no CUDA device" in refused(*argv)


# An unknown policy


def lists_them_all(message):
    return all(name in message for name in RESTORE_POLICIES)


def test_an_unknown_policy():
    with pytest.raises(UnknownPolicyError, match="policy 'magic' is not known") as raised:
        make_policy("magic")
    assert lists_them_all(str(raised.value))


@torch_test
def test_an_unknown_policy_for_an_engine():
    from cacheflow.embedded import EngineOptions

    with pytest.raises(UnknownPolicyError, match="policy 'magic' is not known") as raised:
        EngineOptions(policy="magic")
    assert lists_them_all(str(raised.value))


@pytest.mark.parametrize(
    "argv",
    [
        (*PLAN, "--tokens", "4096", "--bandwidth-gbps", "10", "--policy", "magic"),
        ("demo", "--policy", "magic"),
        ("bench", "restore", "--out", "out", "--policies", "load,magic"),
    ],
    ids=["plan", "demo", "bench"],
)
def test_an_unknown_policy_on_the_command_line(argv, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(*argv)
    assert "policy 'magic' is not known" in error
    assert lists_them_all(error)
    assert list(tmp_path.iterdir()) == []


# Options of an engine


@torch_test
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0, must be a whole number of at least 1"),
        ({"layers_per_block": -1}, "layers_per_block is -1, must be a whole number of at least 1"),
        ({"lookup_deadline_s": 0.0}, "lookup_deadline_s is 0.0"),
        ({"lookup_deadline_s": float("nan")}, "lookup_deadline_s is nan"),
        ({"save_deadline_s": 0}, "save_deadline_s is 0"),
    ],
)
def test_engine_options_out_of_range(bad, message):
    from cacheflow.embedded import EngineOptions

    with pytest.raises(ConfigError, match=message):
        EngineOptions(**bad)


@torch_test
def test_a_crossover_below_zero_is_refused_when_the_engine_is_made(one_thread):
    from support.embedded_cases import make_engine, tiny

    with MemoryStore(capacity_bytes=CAPACITY) as store, pytest.raises(ConfigError, match="crossover_tokens is -1"):
        make_engine(tiny("llama", "float32"), store, policy="cacheflow_v1", crossover_tokens=-1)


def test_every_error_is_one_of_ours():
    for error in (ConfigError, ProfileError, PromptError, StoreError, UnknownPolicyError, UnsupportedModelError):
        assert issubclass(error, CacheFlowError)


def test_a_process_ends_with_code_2_one_line_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "cacheflow.cli", *PLAN, "--tokens", "4096", "--bandwidth-gbps", "0"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "cacheflow: error: --bandwidth-gbps is 0.0, must be above 0 and finite\n"
