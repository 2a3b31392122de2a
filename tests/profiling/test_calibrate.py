"""Calibration of a tiny model, through the classes and through the command line."""

from dataclasses import replace

import numpy as np
import pytest

from cacheflow import cli
from cacheflow.errors import ConfigError, ProfileError
from cacheflow.stores.opening import open_store
from support.patience import PATIENT
from support.store_kinds import SHARED, left_behind, url_of
from support.store_objects import put

pytestmark = pytest.mark.torch


class Ticks:
    """A clock that goes on by a tick whenever it is asked, so that every measurement takes one."""

    def __init__(self, tick_s=lambda calls: 0.01):
        self.now_s, self.calls, self._tick_s = 0.0, 0, tick_s

    def __call__(self):
        self.now_s += self._tick_s(self.calls)
        self.calls += 1
        return self.now_s


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
    clock = Ticks()
    calibration = Calibration(
        model,
        options,
        lambda what, done, total: steps.setdefault(what, []).append((done, total)),
        clock=clock,
        cpu_clock=clock,
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
    from support.embedded_cases import answer, assert_same, never_evicted, sampling_of, tiny, turns

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
        ({"time_limit_s": 0.0}, "time_limit_s is 0.0, must be above 0"),
        ({"suffix_tokens": -1}, "suffix_tokens is -1"),
        ({"max_tokens": 100}, "max_tokens 100 is below chunk_tokens 512"),
    ],
)
def test_options_out_of_range_are_refused(bad, message):
    from cacheflow.profiling.calibrate import CalibrationOptions

    with pytest.raises(ConfigError, match=message):
        CalibrationOptions(**bad)


TINY = ("--dtype", "float32", "--chunk", "32", "--max-tokens", "64")
QUICK = (*TINY, "--repeats", "1", "--accept-noise")
"""For tests on the real clock: what they measure lasts microseconds, and the machine may be as busy as it likes."""


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


def calibrate(words, *, clock, cpu_share=1.0):
    """The command on a clock of the test's; its exit code as ``cli.main`` gives it, or the error it raises."""
    import argparse

    from cacheflow.commands import calibrate as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, words))), clock=clock, cpu_clock=lambda: clock.now_s * cpu_share)


def one_line(text):
    return " ".join(text.split())


BUSY = r"the machine was busy: the same 8 chunks took .* in their fastest rounds and .* in their slowest, 5.00 times"


def spell(calls):
    """Five times as slow when the first round is over."""
    return 0.01 if calls < 60 else 0.05


def test_a_quiet_machine_gives_a_profile_and_no_complaint(model_folder, tmp_path, capsys, caplog):
    from cacheflow.profiling.profile import load_profile

    path = tmp_path / "p.json"
    assert calibrate([model_folder, *TINY, "--out", path], clock=Ticks()) == 0
    assert load_profile(path).busy == ""
    assert "busy" not in capsys.readouterr().out + caplog.text


def test_a_busy_machine_gives_no_profile_and_keeps_the_one_there_was(model_folder, tmp_path, capsys):
    path = tmp_path / "p.json"
    calibrate([model_folder, *TINY, "--out", path], clock=Ticks())
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=BUSY) as raised:
        calibrate([model_folder, *TINY, "--out", path], clock=Ticks(spell))
    assert f"No profile was written, {path} is as before" in str(raised.value)
    assert path.read_bytes() == before
    assert ": no time" not in capsys.readouterr().out


def test_who_accepts_noise_gets_a_profile_that_says_so(model_folder, tmp_path, capsys, caplog):
    import re

    from cacheflow.profiling.profile import load_profile

    path = tmp_path / "p.json"
    assert calibrate([model_folder, *TINY, "--out", path, "--accept-noise"], clock=Ticks(spell)) == 0
    assert "The profile says so, and so will what loads it" in one_line(capsys.readouterr().out)
    profile = load_profile(path)
    assert re.match(BUSY, profile.busy)
    assert f"profile {path} is not to be relied on (the machine was busy: the same" in caplog.text
    assert profile.big_pass_s == {}
    for grid in profile.costs.kinds.values():
        assert (np.diff(grid.full_QP, axis=0) >= 0).all()
        assert (np.diff(grid.full_QP, axis=1) >= 0).all()


def test_a_process_that_is_starved_evenly_gets_no_profile(model_folder, tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ProfileError, match=r"busy: this process got 0\.30 of a processor"):
        calibrate([model_folder, *TINY, "--out", path], clock=Ticks(), cpu_share=0.3)
    assert not path.exists()


def test_what_the_time_limit_leaves_out_is_named_and_refused_later(model_folder, tmp_path, capsys):
    """Every call of the clock is a second, a measurement six: there is time for two of four offsets, each twice."""
    from cacheflow.errors import CostRangeError
    from cacheflow.profiling.profile import load_profile

    path, words = tmp_path / "p.json", ["--dtype", "float32", "--chunk", "32", "--max-tokens", "2048"]
    clock = Ticks(lambda calls: 1.0)
    code = calibrate([model_folder, *words, "--time-limit-s", "150", "--out", path], clock=clock)
    assert (code, clock.now_s < 190) == (0, True)
    said = one_line(capsys.readouterr().out)
    assert "left out, within 150 s: full_attention layers after 1,024, 2,048 tokens: no time; costs end at 512" in said
    assert "left out, within 150 s: big passes of 512, 1,024, 2,048 tokens: no time" in said
    profile = load_profile(path)
    assert profile.costs.kinds["full_attention"].offsets == (0, 512)
    with pytest.raises(CostRangeError, match=r"offset 600 is outside the measured 0\.\.512"):
        profile.costs.kinds["full_attention"].full_s(32, 600)
    assert profile.break_even_tokens is None or profile.break_even_tokens <= 512


def test_a_time_limit_that_allows_no_profile_stops_and_says_what_was_measured(model_folder, tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ConfigError, match=r"the time limit of .* s allows no profile: \d of 16 measurements of full"):
        calibrate([model_folder, *TINY, "--time-limit-s", "20", "--out", path], clock=Ticks(lambda calls: 1.0))
    assert not path.exists()


def test_without_time_to_repeat_nobody_says_the_machine_was_quiet(model_folder, tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(
        ProfileError, match=r"cannot be told: in the time given \d of 8 chunks were timed more than once"
    ):
        calibrate([model_folder, *TINY, "--time-limit-s", "80", "--out", path], clock=Ticks(lambda calls: 1.0))
    assert not path.exists()


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_a_time_limit_is_a_number_of_seconds(model_folder, tmp_path, capsys, limit):
    argv = ["calibrate", str(model_folder), *TINY, "--out", str(tmp_path / "p.json"), f"--time-limit-s={limit}"]
    assert cli.main(argv) == 2
    assert "--time-limit-s is" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SHARED)
def test_calibrate_measures_the_store_asked_for_and_leaves_it_as_it_was(model_folder, tmp_path, request, kind):
    from cacheflow.profiling.profile import load_profile

    path, url = tmp_path / "p.json", url_of(kind, request, tmp_path / "store")
    with open_store(left_behind(url), capacity_bytes=1 << 24) as store:
        put(store, 1)
    argv = ["calibrate", str(model_folder), *QUICK, "--out", str(path), "--store", url]
    assert cli.main([*argv, "--bandwidth-gbps", "0.08"]) == 0
    assert load_profile(path).link.bytes_per_s <= 1.03 * 1e7
    with open_store(url, capacity_bytes=1 << 24) as store:
        assert store.stats().num_objects == 1


def test_calibrate_measures_each_tier(model_folder, tmp_path, request, capsys):
    from cacheflow.profiling.profile import load_profile

    path, url = tmp_path / "p.json", url_of("file", request, tmp_path / "store")
    argv = ["calibrate", str(model_folder), *QUICK, "--out", str(path), "--store", "memory", "--store", url]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "tier memory: " in out
    assert f"tier {url}: " in out.replace("\n", "")
    assert load_profile(path).link.bytes_per_s > 0
    with open_store(url, capacity_bytes=1 << 24) as store:
        assert store.stats().num_objects == 0


def test_calibrate_takes_no_folder_but_a_url(model_folder, refused):
    assert "store is '/kv', must be a URL: memory, file:///folder" in refused(
        "calibrate", model_folder, "--store", "/kv"
    )


def test_calibrate_without_out_writes_to_the_cache(model_folder, tmp_path, monkeypatch):
    from cacheflow.profiling.profile import load_profile

    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "cache"))
    assert cli.main(["calibrate", str(model_folder), *QUICK]) == 0
    (path,) = (tmp_path / "cache" / "profiles").rglob("*.json")
    assert path.name == "tiny-llama-float32.json"
    assert load_profile(path).costs.identity.dtype == "float32"


def test_a_hybrids_layers_are_measured_by_kind_and_priced_by_row(options):
    from cacheflow.plan.costs import build_problem
    from cacheflow.plan.grid import Grid
    from cacheflow.plan.problem import LinkCost
    from cacheflow.profiling.calibrate import Calibration
    from cacheflow.sim.costs import measured_costs
    from support.embedded_cases import tiny

    model, link = tiny("qwen3_5_text", "bfloat16"), LinkCost(bytes_per_s=1e8)
    profile = Calibration(model, replace(options, chunk_tokens=64)).run(link)
    costs = profile.costs
    assert costs.layer_kinds == ("linear_attention", "linear_attention", "linear_attention", "full_attention") * 2
    grid = Grid.regular(num_tokens=256, chunk_tokens=64, num_blocks=2, suffix_tokens=16)
    problem = build_problem(costs, grid, model.shape, link=link, layers_per_block=4)
    linear, full = costs.kinds["linear_attention"], costs.kinds["full_attention"]
    assert problem.compute_KB[1, 0] == pytest.approx(3 * linear.full_s(64, 64) + full.full_s(64, 64))
    assert problem.kv_only_KB[1, 0] == pytest.approx(3 * linear.full_s(64, 64) + full.kv_only_s(64, 64))
    assert problem.load_bytes_KB[-1, 0] - problem.load_bytes_KB[0, 0] == model.shape.row_state_bytes
    same = measured_costs(costs, model.shape, path="x", chunk_tokens=64).problem(grid, link=link)
    for name in ("compute_KB", "kv_only_KB", "load_bytes_KB", "suffix_B", "recurrent_B"):
        assert np.allclose(getattr(same, name), getattr(problem, name)), name
    with pytest.raises(ConfigError, match="blocks of 1 layers, must be a multiple of 4"):
        build_problem(costs, Grid.regular(num_tokens=64, chunk_tokens=64, num_blocks=8), model.shape, link=link)
