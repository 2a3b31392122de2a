"""Calibration of a tiny model, through the classes and through the command line."""

from dataclasses import replace

import pytest

from cacheflow import cli
from cacheflow.errors import ConfigError

pytestmark = pytest.mark.torch


@pytest.fixture
def options():
    from cacheflow.profiling.calibrate import CalibrationOptions

    return CalibrationOptions(chunk_tokens=32, max_tokens=512, repeats=1, suffix_tokens=16)


@pytest.fixture
def model():
    from support.embedded_cases import tiny

    return tiny("qwen2", "bfloat16", windowed=True)


def test_a_calibration_measures_every_kind_of_layer(model, options):
    from cacheflow.engine.identity import model_identity
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.calibrate import Calibration, kinds_of_layers
    from cacheflow.profiling.profile import Profile

    steps: dict[str, list[tuple[int, int]]] = {}
    calibration = Calibration(
        model, options, lambda what, done, total: steps.setdefault(what, []).append((done, total))
    )
    profile = calibration.run(LinkCost(bytes_per_s=1e8))
    costs = profile.costs
    assert costs.identity == model_identity(model)
    assert costs.layer_kinds == kinds_of_layers(model) == ("full_attention", "sliding_attention", "sliding_attention")
    assert set(costs.kinds) == {"full_attention", "sliding_attention"}
    for grid in costs.kinds.values():
        assert grid.chunk_tokens == (1, 4, 16, 32)
        assert grid.offsets == (0, 512)
        assert (grid.kv_only_QP <= grid.full_QP).all()
    assert len(costs.golden) == 4 * len(costs.kinds)
    assert costs.head_s > 0
    assert costs.call_overhead_s > 0
    assert list(profile.big_pass_s) == [512]
    assert profile.crossover_tokens % 8 == 0
    assert Profile.from_json(profile.to_json()).to_json() == profile.to_json()
    for what, seen in steps.items():
        total = len(seen)
        assert seen == [(done, total) for done in range(1, total + 1)], what
    assert len(steps) == 3  # two kinds of layers, and the big pass


@pytest.mark.parametrize("chunk_tokens", [1, 15])
def test_chunks_shorter_than_the_lengths_that_are_always_measured(model, options, chunk_tokens):
    from cacheflow.profiling.calibrate import Calibration

    costs = Calibration(model, replace(options, chunk_tokens=chunk_tokens, max_tokens=64)).measure_costs()
    assert {grid.chunk_tokens[-1] for grid in costs.kinds.values()} == {16}


def test_a_session_runs_on_a_calibrated_profile(options):
    """And live rates take over from a link that the profile knows nothing of."""
    from cacheflow.embedded import Engine, EngineOptions
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.calibrate import Calibration
    from cacheflow.stores.memory import MemoryStore
    from support.embedded_cases import PATIENT, answer, assert_same, never_evicted, sampling_of, tiny, turns

    model = tiny("llama", "bfloat16")
    profile = Calibration(model, options).run(LinkCost(bytes_per_s=1e8))
    engine_options = EngineOptions(
        chunk_tokens=32, crossover_tokens=profile.crossover_tokens, executor=PATIENT, self_test=False
    )
    with MemoryStore(capacity_bytes=1 << 24) as store:
        engine = Engine(model, store=store, costs=profile.costs, link=profile.link, options=engine_options)
        session = engine.session()
        for turn, tokens in enumerate(turns()):
            session.evict()
            assert_same(answer(session, tokens, sampling=sampling_of(turn)), never_evicted(model)[turn])
        rates = engine.restorer.rates
        assert (rates.bytes_per_s, rates.compute_factor) != (1e8, 1.0)


def calibration_with(model, options, cell_s):
    """A calibration whose costs are given instead of measured."""
    from cacheflow.profiling.calibrate import Calibration
    from support.embedded_cases import cost_table

    class Given(Calibration):
        def measure_costs(self):
            return cost_table(self.model, cell_s=cell_s)

    return Given(model, options)


def test_break_even_and_crossover_follow_from_costs_and_link(model, options):
    from cacheflow.plan.problem import LinkCost

    calibration = calibration_with(model, options, cell_s=0.01)
    chunk_s = 3 * 0.01
    chunk_bytes = 32 * model.shape.kv_bytes_per_token
    fast = calibration.run(LinkCost(bytes_per_s=1e12))
    even = calibration.run(LinkCost(bytes_per_s=chunk_bytes / chunk_s))
    hopeless = calibration.run(LinkCost(bytes_per_s=1.0))
    assert fast.break_even_tokens == 8  # the shortest length asked for
    assert hopeless.break_even_tokens is None
    assert even.break_even_tokens is not None
    assert even.break_even_tokens >= fast.break_even_tokens
    late = calibration.run(LinkCost(bytes_per_s=1e12, latency_s=0.1))
    assert late.break_even_tokens > fast.break_even_tokens
    lengths = range(8, 512 - 16 + 1, 8)
    for profile in (fast, even, hopeless, late):
        assert profile.crossover_tokens == 0 or profile.crossover_tokens in lengths
    # one chunk cannot be split by tokens, but by layers
    assert even.crossover_tokens >= 32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"suffix_tokens": -1}, "suffix_tokens is -1"),
        ({"max_tokens": 100}, "max_tokens 100 is below chunk_tokens 512"),
    ],
)
def test_options_out_of_range_are_refused(bad, message):
    from cacheflow.profiling.calibrate import CalibrationOptions

    with pytest.raises(ConfigError, match=message):
        CalibrationOptions(**bad)


QUICK = ("--dtype", "float32", "--chunk", "32", "--max-tokens", "64", "--repeats", "1")


def test_calibrate_writes_a_profile_and_says_what_is_in_it(model_folder, tmp_path, capsys):
    from cacheflow.engine.identity import model_identity
    from cacheflow.engine.model import load_model
    from cacheflow.profiling.profile import load_profile

    path = tmp_path / "deep" / "profile.json"
    assert cli.main(["calibrate", str(model_folder), *QUICK, "--out", str(path)]) == 0
    profile = load_profile(path)
    assert profile.costs.identity == model_identity(load_model(model_folder, dtype="float32"))
    assert profile.costs.identity.model == "tiny-llama"
    assert profile.chunk_tokens == 32
    out = " ".join(capsys.readouterr().out.split())
    for words in ("crossover length L_delta", "break-even prefix", "call overhead", "link:", "latency"):
        assert words in out
    assert f"{profile.crossover_tokens} tokens (layer-wise" in out
    assert out.count("chunks by offset") == 1  # one progress bar a kind of layer, not one a step
    assert "profile.json" in out.replace(" ", "")


def test_calibrate_measures_the_store_asked_for_and_leaves_it_empty(model_folder, tmp_path):
    from cacheflow.profiling.profile import load_profile

    path, root = tmp_path / "p.json", tmp_path / "store"
    argv = ["calibrate", str(model_folder), *QUICK, "--out", str(path), "--store", str(root)]
    assert cli.main([*argv, "--bandwidth-gbps", "0.08"]) == 0
    assert load_profile(path).link.bytes_per_s <= 1.03 * 1e7
    assert list(root.rglob("*_kv_*")) == []


def test_calibrate_without_out_writes_to_the_cache(model_folder, tmp_path, monkeypatch):
    from cacheflow.profiling.profile import load_profile

    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "cache"))
    assert cli.main(["calibrate", str(model_folder), *QUICK]) == 0
    (path,) = (tmp_path / "cache" / "profiles").rglob("*.json")
    assert path.name == "tiny-llama-float32.json"
    assert load_profile(path).costs.identity.dtype == "float32"
