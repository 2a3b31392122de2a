"""Profiles: round trips, damage, and costs of something else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cacheflow.errors import ProfileError

pytestmark = pytest.mark.torch


@pytest.fixture
def profile():
    from cacheflow.plan.costs import GoldenPoint
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.profile import Profile
    from support.embedded_cases import cost_table, tiny

    costs = cost_table(tiny("qwen2", "bfloat16", windowed=True))
    golden = tuple(
        GoldenPoint(kind=kind, chunk_tokens=40, offset=700, kv_only=False, expected_s=grid.full_s(40, 700))
        for kind, grid in costs.kinds.items()
    )
    return Profile(
        costs=replace(costs, golden=golden),
        link=LinkCost(bytes_per_s=1.5e8, latency_s=2e-4),
        chunk_tokens=64,
        crossover_tokens=96,
        break_even_tokens=None,
        big_pass_s={512: 0.5, 1024: 1.25},
    )


@pytest.fixture
def path(tmp_path, profile):
    from cacheflow.profiling.profile import save_profile

    path = tmp_path / "profiles" / "cpu" / "tiny.json"
    save_profile(profile, path)
    return path


def load(path):
    from cacheflow.profiling.profile import load_profile

    return load_profile(path)


def test_a_profile_comes_back_as_it_was(profile, path):
    back = load(path)
    assert back.to_json() == profile.to_json()
    assert back.costs.identity == profile.costs.identity
    assert back.link == profile.link
    assert back.big_pass_s == profile.big_pass_s
    assert back.break_even_tokens is None
    for kind, grid in profile.costs.kinds.items():
        assert back.costs.kinds[kind].full_s(33, 1000) == grid.full_s(33, 1000)
        assert back.costs.kinds[kind].kv_only_s(1, 0) == grid.kv_only_s(1, 0)
    assert [each.name for each in path.parent.iterdir()] == ["tiny.json"]


def test_a_profile_of_before_says_nothing_of_the_machine(path, caplog):
    values = json.loads(path.read_text())
    del values["busy"]
    path.write_text(json.dumps(values))
    assert load(path).busy == ""
    assert caplog.text == ""


def test_saving_again_replaces(profile, path):
    from cacheflow.profiling.profile import save_profile

    save_profile(replace(profile, break_even_tokens=320), path)
    assert load(path).break_even_tokens == 320


def damaged(values, keys, new):
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    if new is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = new
    return json.dumps(values)


SLIDING = ("costs", "kinds", "sliding_attention")
DAMAGES = {
    "a cost a percent off misses its golden point": ((*SLIDING, "full_s", 1, 1), 1.3e-3, "golden point"),
    "a golden point off": (("costs", "golden", 0, "expected_s"), 1e-3, "golden point"),
    "a golden point out of range": (("costs", "golden", 0, "offset"), 9999, "outside the measured"),
    "a golden point of no kind": (("costs", "golden", 0, "kind"), "other", "unknown kind 'other'"),
    "a kind is missing": (SLIDING, None, "no costs for layer kinds"),
    "a cost is negative": ((*SLIDING, "full_s", 0, 0), -1.0, "not positive and finite"),
    "a cost is no number": ((*SLIDING, "full_s", 0, 0), "x", "malformed"),
    "a cost without end": (
        (*SLIDING, "full_s", 0, 0),
        float("inf"),
        r"sliding_attention.full_s\[0\]\[0\] must be finite",
    ),
    "a cost of 400 digits": ((*SLIDING, "full_s", 0, 0), 10**400, r"full_s\[0\]\[0\] must be finite and below 1e\+12"),
    "a chunk without end": ((*SLIDING, "chunk_tokens", 0), float("inf"), r"chunk_tokens\[0\] must be finite"),
    "an offset of 400 digits": ((*SLIDING, "offsets", 1), 10**400, r"offsets\[1\] must be finite"),
    "a device that is no text": (
        ("costs", "identity", "device"),
        float("nan"),
        "identity.device is nan, must be a text",
    ),
    "a crossover without end": (("crossover_tokens",), float("inf"), "crossover_tokens must be finite"),
    "a row is short": ((*SLIDING, "full_s", 0), [1e-3], "cost grid"),
    "an axis descends": ((*SLIDING, "offsets"), [0, 5, 1], "must ascend"),
    "a layer too many": (("costs", "layer_kinds"), ["full_attention"] * 4, "4 layer kinds for 3 layers"),
    "the head costs less than nothing": (("costs", "head_s"), -1.0, "head_s is -1.0"),
    "the link never delivers": (("link", "bytes_per_s"), 0.0, "bytes_per_s is 0.0"),
    "the link is no number": (("link", "bytes_per_s"), "fast", "malformed"),
    "an unknown link field": (("link", "colour"), "red", "malformed"),
    "another profile version": (("format_version",), 2, "format_version is 2"),
    "another table version": (("costs", "format_version"), 0, "format_version is 0"),
    "no version": (("format_version",), None, "malformed"),
    "no identity": (("costs", "identity"), None, "malformed"),
    "half an identity": (("costs", "identity", "dtype"), None, "malformed"),
    "no crossover": (("crossover_tokens",), None, "malformed"),
    "a busy that is no text": (("busy",), 7, "busy is 7, must be a text"),
    "a big pass of no length": (("big_pass_s",), {"x": 1.0}, "malformed"),
}


@pytest.mark.parametrize(("keys", "new", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_profile_is_refused_by_name(path, keys, new, message):
    path.write_text(damaged(json.loads(path.read_text()), keys, new))
    with pytest.raises(ProfileError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe\x00",
        b'{"format_version": 1}',
        pytest.param(b"[" * 99_999, id="deep"),
    ],
    ids=repr,
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"malformed|cannot be read") as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_a_device_is_no_profile(tmp_path):
    with pytest.raises(ProfileError, match="larger than 16,777,216 bytes"):
        load(Path("/dev/zero"))


def test_half_a_profile_is_refused(path):
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ProfileError, match="malformed"):
        load(path)


def test_a_missing_profile_says_how_to_make_one(tmp_path):
    with pytest.raises(ProfileError, match="cacheflow calibrate"):
        load(tmp_path / "none.json")


def test_a_folder_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, profile):
    from cacheflow.profiling.profile import save_profile

    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be written"):
        save_profile(profile, tmp_path / "file" / "p.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ProfileError, match="cannot be written"):
        save_profile(profile, tmp_path / "folder.json")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.json"]


def test_the_usual_place_is_by_device_and_model(monkeypatch, tmp_path):
    from cacheflow.profiling.profile import profile_path

    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path))
    place = profile_path(device="AMD EPYC (2/2)", model="../x", dtype="bfloat16")
    assert place.relative_to(tmp_path).parts == ("profiles", "AMD-EPYC-2-2", "..-x-bfloat16.json")


OTHERS = {
    "model": "other",
    "fingerprint": "f" * 64,
    "device_type": "cuda",
    "device": "Some other processor",
    "dtype": "float32",
    "num_threads": 64,
    "attention": "sdpa",
}


@pytest.mark.parametrize(("field", "value"), OTHERS.items(), ids=list(OTHERS))
def test_an_engine_refuses_a_profile_of_something_else(profile, field, value):
    from cacheflow.embedded import Engine, EngineOptions
    from cacheflow.stores.memory import MemoryStore
    from support.embedded_cases import tiny

    model = tiny("qwen2", "bfloat16", windowed=True)
    options = EngineOptions(chunk_tokens=32, self_test=False)
    identity = replace(profile.costs.identity, **{field: value})
    with MemoryStore(capacity_bytes=1 << 20) as store:
        Engine(model, store=store, costs=profile.costs, link=profile.link, options=options)
        with pytest.raises(ProfileError, match=rf"measured with {field} .*{value}.*: calibrate again"):
            Engine(model, store=store, costs=replace(profile.costs, identity=identity), link=profile.link)


def test_an_engine_refuses_real_others(profile, torch_threads):
    import torch

    from cacheflow.embedded import Engine
    from cacheflow.stores.memory import MemoryStore
    from support.embedded_cases import tiny

    with MemoryStore(capacity_bytes=1 << 20) as store:
        for model, what in (
            (tiny("qwen2", "float32", windowed=True), "dtype|fingerprint"),
            (tiny("qwen2", "bfloat16", windowed=True, seed=1), "fingerprint"),
            (tiny("llama", "bfloat16"), "model"),
        ):
            with pytest.raises(ProfileError, match=f"measured with ({what})"):
                Engine(model, store=store, costs=profile.costs, link=profile.link)
        model = tiny("qwen2", "bfloat16", windowed=True)
        torch.set_num_threads(2)
        with pytest.raises(ProfileError, match="num_threads 1, this is 2"):
            Engine(model, store=store, costs=profile.costs, link=profile.link)
