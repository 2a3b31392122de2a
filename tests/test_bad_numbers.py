"""Bandwidths that never deliver and prompts that cannot be served: refused from the library and on the command line."""

import pytest

from cacheflow.errors import (
    ConfigError,
    PromptError,
)
from cacheflow.plan.problem import LinkCost
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from support.bad_input import CAPACITY, PLAN, bench, torch_test

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
