"""One folder for what is kept, whoever keeps it."""

from cacheflow.cache_root import cache_root
from cacheflow.profiling.profile import profile_path
from cacheflow.vllm.options import ServingOptions


def test_it_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("CACHEFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "cacheflow"


def test_profiles_of_both_engines_lie_in_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path))
    assert ServingOptions().profile_path == tmp_path / "profiles"
    assert profile_path(device="cpu", model="m", dtype="bfloat16").is_relative_to(tmp_path / "profiles")
