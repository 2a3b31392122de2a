"""What bad input gets: a clear error at the door, from the library and on the command line, and nothing lost."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cacheflow import cli
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
from cacheflow.stores.file import FileStore
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore

CAPACITY = 1 << 24
torch_test = pytest.mark.torch


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with code 2 and one line on standard error; returns the line."""

    def run(*argv):
        capsys.readouterr()
        assert cli.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("cacheflow: error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        return error

    return run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from support.embedded_cases import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def one_thread():
    from support.embedded_cases import one_torch_thread

    with one_torch_thread():
        yield


def bench(model_folder, out, *options):
    return (
        "bench", "restore", "--model", model_folder, "--out", out, "--tokens", 64, "--chunk", 32, "--suffix", 8,
        "--repeats", 1, "--ratios", 1, "--policies", "load", *options,
    )  # fmt: skip


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


# A store that cannot be used


@pytest.fixture
def unwritable(tmp_path):
    """A place that no user, root included, can create a folder in."""
    (tmp_path / "file").write_text("kept")
    return tmp_path / "file" / "store"


def test_a_store_directory_that_is_not_writable(unwritable):
    with pytest.raises(StoreError, match=r"cannot be used.*choose a directory this process can create and write"):
        FileStore(unwritable, capacity_bytes=CAPACITY)
    assert unwritable.parent.read_text() == "kept"


@torch_test
def test_a_store_directory_that_is_not_writable_on_the_command_line(
    unwritable, model_folder, tmp_path, refused, one_thread
):
    quick = ("--chunk", 32, "--max-tokens", 64, "--repeats", 1, "--out", tmp_path / "p.json")
    assert f"store directory {unwritable} cannot be used" in refused("calibrate", model_folder, *quick,
                                                                     "--store", unwritable)  # fmt: skip
    assert not (tmp_path / "p.json").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store").write_text("kept")
    assert "cannot be used" in refused(*bench(model_folder, tmp_path / "out", "--store", "file"))
    assert (tmp_path / "out" / "store").read_text() == "kept"


MARKERS = {
    "another version": ('{"record_version": 99, "checksum": "XXH3_128"}', "records of version 99, this is version 1"),
    "no marker": ("something else entirely", "is not a store marker"),
    "half a marker": ('{"record_version": 1}', "is not a store marker"),
    "another checksum": ('{"record_version": 1, "checksum": "CRC32"}', "is not a store marker"),
}


@pytest.fixture
def old_store(tmp_path):
    """A directory with records of another version."""

    def make(root, marker):
        (root / "objects" / "ab").mkdir(parents=True)
        (root / "objects" / "ab" / "record").write_bytes(b"precious")
        (root / "cacheflow-store.json").write_text(marker)
        return root

    return make


def assert_untouched(root, marker):
    assert (root / "objects" / "ab" / "record").read_bytes() == b"precious"
    assert (root / "cacheflow-store.json").read_text() == marker


@pytest.mark.parametrize(("marker", "message"), MARKERS.values(), ids=list(MARKERS))
def test_a_store_directory_of_another_record_version(tmp_path, old_store, marker, message):
    root = old_store(tmp_path / "store", marker)
    with pytest.raises(StoreError, match=message) as raised:
        FileStore(root, capacity_bytes=CAPACITY)
    assert str(root) in str(raised.value)
    assert "use another directory" in str(raised.value)
    assert_untouched(root, marker)


@torch_test
def test_a_store_of_another_record_version_on_the_command_line(model_folder, tmp_path, old_store, refused, one_thread):
    marker, _ = MARKERS["another version"]
    root = old_store(tmp_path / "out" / "store", marker)
    quick = ("--chunk", 32, "--max-tokens", 64, "--repeats", 1, "--out", tmp_path / "p.json")
    assert "records of version 99" in refused("calibrate", model_folder, *quick, "--store", root)
    assert "records of version 99" in refused(*bench(model_folder, tmp_path / "out", "--store", "file"))
    assert_untouched(root, marker)
    assert not (tmp_path / "p.json").exists()
    assert not (tmp_path / "out" / "results.jsonl").exists()


# A bandwidth of zero


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0, float("nan")])
def test_a_bandwidth_that_never_delivers(bytes_per_s):
    with pytest.raises(ConfigError, match=r"bytes_per_s is .*, must be above 0"):
        LinkCost(bytes_per_s=bytes_per_s)
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        with pytest.raises(ConfigError, match=r"bytes_per_s is .*, must be above 0"):
            ThrottledStore(store, bytes_per_s)
        throttled = ThrottledStore(store, 1e6)
        with pytest.raises(ConfigError, match=r"bytes_per_s is .*, must be above 0"):
            throttled.set_bandwidth(bytes_per_s)
        assert throttled.bytes_per_s == 1e6


PLAN = ("plan", "--model", "Llama-3.1-8B", "--gpu", "H100")


@pytest.mark.parametrize("gbps", ["0", "-10", "nan", "inf"])
def test_a_bandwidth_that_never_delivers_in_a_plan(gbps, refused):
    error = refused(*PLAN, "--tokens", 4096, "--bandwidth-gbps", gbps)
    assert "--bandwidth-gbps is" in error
    assert "must be above 0" in error


@torch_test
@pytest.mark.parametrize("gbps", ["0", "-10", "nan"])
def test_a_bandwidth_that_never_delivers_on_the_command_line(model_folder, tmp_path, gbps, refused):
    error = refused("calibrate", model_folder, "--bandwidth-gbps", gbps, "--out", tmp_path / "p.json")
    assert "--bandwidth-gbps is" in error
    assert not (tmp_path / "p.json").exists()
    assert "must be above 0" in refused(*bench(model_folder, tmp_path, "--gbps", gbps))


# A negative or too long prompt


@torch_test
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, -1], "0 or more .* got -1 to 5"),
        ([7, 320], "7 to 320; the vocabulary is 0 to 319"),
        ([1] * 5000, "5000 tokens plus 4 new ones exceeds the model's 2048"),
        ([], "0 new prompt tokens"),
    ],
    ids=["negative", "outside the vocabulary", "too long", "empty"],
)
def test_a_prompt_that_cannot_be_served(tokens, message, one_thread):
    from support.embedded_cases import make_engine, random_tokens, tiny

    with MemoryStore(capacity_bytes=CAPACITY) as store:
        session = make_engine(tiny("llama", "float32"), store).session()
        with pytest.raises(PromptError, match=message):
            session.generate(tokens, max_new_tokens=4)
        assert session.tokens == []
        assert store.stats().num_objects == 0
        assert len(session.generate(random_tokens(40), max_new_tokens=4).tokens) == 4


@pytest.mark.parametrize(
    ("tokens", "message"), [(-1, "--tokens is -1, must be at least 1"), (10**7, "the KV cache of 10,000,512 tokens")]
)
def test_a_prompt_that_cannot_be_planned(tokens, message, refused):
    assert message in refused(*PLAN, "--bandwidth-gbps", 10, "--chunk", 8192, "--tokens", tokens)


@torch_test
@pytest.mark.parametrize(
    ("tokens", "message"), [("-64", "must be above 0"), ("2041", "= 2049: .* the model allows 2048")]
)
def test_a_prompt_that_cannot_be_measured(model_folder, tmp_path, tokens, message, refused):
    import re

    assert re.search(message, refused(*bench(model_folder, tmp_path, "--tokens", tokens)))
    assert not (tmp_path / "results.jsonl").exists()


@torch_test
def test_a_calibration_longer_than_the_model(model_folder, tmp_path, refused):
    error = refused("calibrate", model_folder, "--chunk", 4096, "--out", tmp_path / "p.json")
    assert "chunk_tokens 4096 exceeds the model's 2048 tokens" in error


@torch_test
def test_a_profile_that_could_not_be_written_is_known_before_anything_is_measured(
    model_folder, tmp_path, unwritable, refused, monkeypatch
):
    from cacheflow.profiling.calibrate import Calibration

    monkeypatch.setattr(Calibration, "run", lambda *_: pytest.fail("measured before the door was checked"))
    for place in (unwritable / "p.json", tmp_path):
        assert f"profile {place} cannot be written" in refused("calibrate", model_folder, "--out", place)


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
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
        ({"layers_per_block": -1}, "layers_per_block -1"),
        ({"lookup_deadline_s": 0.0}, "lookup_deadline_s is 0.0"),
        ({"lookup_deadline_s": float("nan")}, "lookup_deadline_s is nan"),
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
    assert done.stderr == "cacheflow: error: --bandwidth-gbps is 0, must be above 0 and finite\n"
