"""A study on a tiny model: every run is checked, and a wrong one is found out."""

import math
from dataclasses import replace

import msgspec
import pytest

from cacheflow.errors import ConfigError, StoreError
from cacheflow.policies.registry import RESTORE_POLICIES, make_policy
from cacheflow.stores.url import file_url
from support.patience import PATIENT

pytestmark = pytest.mark.torch

NUM_TOKENS, SUFFIX, CHUNK = 118, 20, 32


@pytest.fixture(autouse=True)
def torch_threads():
    from support.embedded_cases import one_torch_thread

    with one_torch_thread() as usual:
        yield usual


def new_link(model, *urls):
    from cacheflow.bench.restore.link import StoreStudyLink
    from cacheflow.stores.keys import Namespace

    namespace = Namespace(weights_fingerprint=model.fingerprint, dtype=model.shape.dtype, chunk_tokens=CHUNK)
    return StoreStudyLink(namespace, urls=urls or ("memory",))


def new_study(family="llama", dtype="float32", link=None, **options):
    from cacheflow.bench.restore.study import Study, StudyOptions
    from support.embedded_cases import random_tokens, tiny

    model = tiny(family, dtype)
    values = {
        "num_tokens": NUM_TOKENS,
        "suffix_tokens": SUFFIX,
        "chunk_tokens": CHUNK,
        "cost_repeats": 1,
        "executor": PATIENT,
        **options,
    }
    tokens = random_tokens(NUM_TOKENS + SUFFIX + 5)
    return Study(model, tokens, options=StudyOptions(**values), link=link or new_link(model))


def test_a_link_delivers_more_than_it_carries_with_a_codec():
    from support.embedded_cases import tiny

    study = new_study(link=new_link(tiny("llama", "float32"), "memory?codec=int8"))
    study.prepare()
    assert 2.5e6 < study.link_bytes_per_s(1e6) < 4e6  # float32 in eight bits, and scales of short chunks
    assert study.store == "memory+int8"
    study.close()


@pytest.fixture
def study():
    study = new_study()
    study.prepare()
    yield study
    study.close()


@pytest.mark.parametrize("with_suffix", [False, True])
@pytest.mark.parametrize("name", list(RESTORE_POLICIES))
def test_every_policy_is_exact(study, name, with_suffix):
    run = study.run(make_policy(name), with_suffix=with_suffix, bytes_per_s=study.bytes_per_s(1.0))
    assert run.correct
    assert (run.restored.logits is not None) == with_suffix
    report = run.restored.report
    assert report.recomputed_cells + report.loaded_cells == 4 * 3
    assert report.loaded_bytes + report.wasted_bytes <= NUM_TOKENS * study.model.shape.kv_bytes_per_token


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3_moe", "bfloat16"), ("mistral", "bfloat16"), ("qwen2", "float32")]
)
@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_other_models_and_blocks_are_exact(family, dtype, layers_per_block):
    study = new_study(family, dtype, layers_per_block=layers_per_block)
    study.prepare()
    for name in ("layerwise_load", "cake", "cacheflow"):
        assert study.run(make_policy(name), with_suffix=True, bytes_per_s=study.bytes_per_s(1.0)).correct
    study.close()


def test_files_and_pinned_memory_are_exact(tmp_path):
    from cacheflow.bench.restore.link import PinnedStudyLink
    from support.embedded_cases import tiny

    model = tiny("llama", "float32")
    for link in (
        new_link(model, file_url(tmp_path / "store")),
        new_link(model, file_url(tmp_path / "store")),
        new_link(model, "memory?capacity=100kB", file_url(tmp_path / "tiers")),
        PinnedStudyLink(),
    ):
        study = new_study(link=link)
        study.prepare()
        for name in ("load", "cacheflow"):
            assert study.run(make_policy(name), with_suffix=True, bytes_per_s=study.bytes_per_s(1.0)).correct
            assert study.run(make_policy(name), with_suffix=False, bytes_per_s=math.inf).correct
        assert math.isfinite(study.link_bytes_per_s(math.inf))
        study.close()
    assert list((tmp_path / "store").rglob("*_kv_*"))


@pytest.mark.parametrize("spoiled", ["flipped", "not placed", "another cell's"])
@pytest.mark.parametrize("with_suffix", [False, True])
def test_a_wrong_restoration_is_found_out(study, monkeypatch, spoiled, with_suffix):
    """Bytes spoiled after they were verified: nothing but the comparison with the reference can notice."""
    from cacheflow.engine.transfer_port import StoreTransferPort

    place, placed = StoreTransferPort.place, []

    def spoil(port, ticket):
        placed.append(ticket.staging.array[: ticket.num_bytes].copy())
        if spoiled == "flipped" and len(placed) == 5:
            ticket.staging.array[3] ^= 1
        if spoiled == "another cell's" and len(placed) == 2:
            ticket.staging.array[: ticket.num_bytes] = placed[0]
        if spoiled == "not placed" and len(placed) == 5:
            port.cancel(ticket)
        else:
            place(port, ticket)

    monkeypatch.setattr(StoreTransferPort, "place", spoil)
    run = study.run(make_policy("load"), with_suffix=with_suffix, bytes_per_s=study.bytes_per_s(0.1))
    assert not run.kv_equal
    assert not run.correct
    assert len(placed) == 12
    recompute = study.run(make_policy("recompute"), with_suffix=with_suffix, bytes_per_s=study.bytes_per_s(1.0))
    assert recompute.correct


def test_wrong_logits_are_found_out(study, monkeypatch):
    from cacheflow.engine.runner import LayerRunner

    logits = LayerRunner.logits
    monkeypatch.setattr(LayerRunner, "logits", lambda runner, hidden: logits(runner, hidden).neg())
    run = study.run(make_policy("load"), with_suffix=True, bytes_per_s=1e9)
    assert run.kv_equal
    assert not run.logits_equal
    assert not run.token_equal
    assert not run.correct


def test_wrong_costs_and_a_falling_link_cost_time_only(study):
    from cacheflow.bench.restore.link import LinkDrop
    from cacheflow.bench.restore.study import Wrong

    bytes_per_s = study.bytes_per_s(1.0)
    for wrong in (
        Wrong(cost_error=2.0),
        Wrong(cost_error=0.5),
        Wrong(bandwidth_error=2.0),
        Wrong(bandwidth_error=0.5),
        Wrong(drop=LinkDrop(factor=0.25, after_bytes=10_000)),
    ):
        for with_suffix in (False, True):
            run = study.run(make_policy("cacheflow"), with_suffix=with_suffix, bytes_per_s=bytes_per_s, wrong=wrong)
            assert run.correct, wrong


def test_a_drop_that_was_not_reached_does_not_strike_the_next_run():
    """Recompute moves no bytes: its drop is still ahead when it ends."""
    from cacheflow.bench.restore.link import LinkDrop
    from cacheflow.bench.restore.study import Wrong
    from cacheflow.plan.grid import Tile
    from cacheflow.types import LoadOutcome
    from support.embedded_cases import tiny

    link = new_link(tiny())
    study = new_study(link=link)
    study.prepare()
    wrong = Wrong(drop=LinkDrop(factor=1e-9, after_bytes=20_000))  # a byte a second: no read would end in time
    study.run(make_policy("recompute"), with_suffix=False, bytes_per_s=1e9, wrong=wrong)
    port = link.open(study.runner.new_kv(NUM_TOKENS), bytes_per_s=1e9, drop=None)
    for cell in Tile(0, 4, 0, 3).cells():
        ticket = port.start(cell, deadline_s=60.0)
        assert port.wait(ticket, timeout_s=60.0) is LoadOutcome.OK
        port.place(ticket)
    study.close()


def test_a_pinned_link_cannot_drop():
    from cacheflow.bench.restore.link import LinkDrop, PinnedStudyLink

    link = PinnedStudyLink()
    study = new_study(link=link)
    kv = study.runner.new_kv(NUM_TOKENS)
    with pytest.raises(StoreError, match="needs a saved prefix"):
        link.open(kv, bytes_per_s=1e9, drop=None)
    study.prepare()
    with pytest.raises(StoreError, match="keeps its bandwidth"):
        link.open(kv, bytes_per_s=1e9, drop=LinkDrop(factor=0.5, after_bytes=1))
    study.close()


def test_nothing_is_read_before_it_was_saved():
    from support.embedded_cases import tiny

    link = new_link(tiny())
    with pytest.raises(StoreError, match="nothing was saved yet"):
        link.open(new_study(link=link).runner.new_kv(NUM_TOKENS), bytes_per_s=1e9, drop=None)


def test_a_prefix_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    import shutil

    from cacheflow.stores.file import FileStore
    from support.embedded_cases import tiny

    write = FileStore.write_record

    def lose_the_disk(store, *args, **options):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        (tmp_path / "store").write_text("no folder can be made here")
        return write(store, *args, **options)

    monkeypatch.setattr(FileStore, "write_record", lose_the_disk)
    study = new_study(link=new_link(tiny("llama", "float32"), file_url(tmp_path / "store")))
    with pytest.raises(StoreError, match="12 of 12 cells could not be saved"):
        study.prepare()
    study.close()


@pytest.mark.parametrize("with_suffix", [False, True])
def test_the_problem_is_what_was_measured(study, with_suffix):
    problem = study.problem(with_suffix=with_suffix, bytes_per_s=study.bytes_per_s(2.0))
    assert problem.load_s == pytest.approx(2.0 * study.recompute_s())
    assert problem.compute_KB.sum() == pytest.approx(study.recompute_s())
    assert problem.load_bytes_KB.sum() == NUM_TOKENS * study.model.shape.kv_bytes_per_token
    assert (problem.kv_only_KB <= problem.compute_KB).all()
    assert (problem.suffix_s > 0) == with_suffix
    drifted = study.problem(with_suffix=with_suffix, bytes_per_s=1e6, drift=3.0)
    assert drifted.recompute_s == pytest.approx(3.0 * problem.recompute_s)
    assert drifted.suffix_s == pytest.approx(3.0 * problem.suffix_s)
    assert 0 < study.least_restore_s(study.bytes_per_s(2.0)) < study.recompute_s()


def test_preparing_reports_every_measurement():
    study, steps = new_study(cost_repeats=2), []
    study.prepare(lambda: steps.append(1))
    assert len(steps) == study.num_cost_steps == 2 * 5
    study.close()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"suffix_tokens": 0}, "suffix_tokens is 0"),
        ({"chunk_tokens": -1}, "chunk_tokens is -1"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"cost_repeats": 0}, "cost_repeats is 0"),
        ({"num_tokens": 500}, "the prompt has 143 tokens"),
        ({"num_tokens": 5000}, "the model allows 2048"),
    ],
)
def test_a_study_out_of_range_is_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        new_study(**bad)


# Rounds: from runs to records

ENVIRONMENT = {"cpu": "test", "torch": "0"}


def new_round(study, **changes):
    from cacheflow.bench.restore.rounds import Round

    values = {
        "ratio": 1.0,
        "with_suffix": True,
        "repeat": 0,
        "policies": tuple(RESTORE_POLICIES),
        "bytes_per_s": study.bytes_per_s(1.0),
        **changes,
    }
    return Round(**values)


def run_round(study, round_):
    from cacheflow.bench.restore import rounds

    names = []
    runs = rounds.run_round(study, round_, suite="restore", environment=ENVIRONMENT, on_run=names.append)
    return runs, names


@pytest.mark.parametrize("with_suffix", [False, True])
def test_a_round_puts_every_policy_on_record(study, with_suffix):
    from cacheflow.bench.records.restore import RestoreRecord

    round_ = new_round(study, with_suffix=with_suffix, perturbation={"cost_error": 2.0})
    runs, names = run_round(study, round_)
    assert names == list(RESTORE_POLICIES) == [run.record.policy for run in runs]
    for run in runs:
        record = run.record
        assert record.correct is True
        assert record.timed
        assert RestoreRecord.from_json(record.to_json()) == record
        assert (record.num_tokens, record.chunk_tokens, record.num_layers) == (NUM_TOKENS, CHUNK, 3)
        assert record.suffix_tokens == (SUFFIX if with_suffix else 0)
        assert (record.ttft_s is not None) == (record.bound_ttft_s is not None) == with_suffix
        assert record.objective == ("ttft" if with_suffix else "restore")
        assert record.restore_s >= run.report.restore_s
        assert record.bound_restore_s == run.bound.restore_s > 0
        assert record.recomputed_cells + record.loaded_cells == 12
        assert record.link_bytes_per_s == round_.bytes_per_s
        assert record.environment == ENVIRONMENT
        assert record.perturbation == {"cost_error": 2.0}
        assert (record.model, record.dtype, record.device) == ("tiny-llama", "float32", "cpu")
        assert (record.guard is not None) == (record.policy == "cacheflow")
        assert 0 <= record.compute_busy <= 1
        assert 0 <= record.io_busy <= 1


def test_the_order_of_the_policies_rotates_with_the_repeat(study):
    policies = ("recompute", "load", "cake")
    runs, names = run_round(study, new_round(study, policies=policies, repeat=1))
    assert names == ["load", "cake", "recompute"]
    assert [run.record.policy for run in runs] == list(policies)


def test_a_wrong_run_is_recorded_as_wrong(study, monkeypatch):
    from cacheflow.engine.transfer_port import StoreTransferPort

    place = StoreTransferPort.place

    def flip(port, ticket):
        ticket.staging.array[0] ^= 1
        place(port, ticket)

    monkeypatch.setattr(StoreTransferPort, "place", flip)
    runs, _ = run_round(study, new_round(study, policies=("recompute", "load")))
    assert [run.record.correct for run in runs] == [True, False]
    assert not runs[1].record.timed


def test_an_unlimited_link_is_on_record_without_a_bandwidth(study):
    runs, _ = run_round(study, new_round(study, bytes_per_s=math.inf, policies=("load", "cacheflow")))
    assert all(run.record.correct for run in runs)
    assert {run.record.link_bytes_per_s for run in runs} == {None}


def test_a_round_is_done_when_every_policy_of_it_is_on_record(study):
    from cacheflow.bench.restore.rounds import is_done, ratio_on_record

    round_ = new_round(study, policies=("recompute", "load"))
    records = [run.record for run in run_round(study, round_)[0]]

    def done(round_, records):
        return is_done(round_, study, records, suite="restore")

    assert done(round_, records)
    assert done(replace(round_, policies=("load",)), records)
    assert not done(round_, records[:1])
    for changes in (
        {"repeat": 1},
        {"ratio": 2.0},
        {"with_suffix": False},
        {"policies": ("recompute", "load", "cake")},
        {"perturbation": {"cost_error": 2.0}},
    ):
        assert not done(replace(round_, **changes), records), changes
    for changes in (
        {"suite": "perturbed"},
        {"model": "other"},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
        {"num_tokens": 64},
        {"chunk_tokens": 16},
    ):
        others = [msgspec.structs.replace(record, **changes) for record in records]
        assert not done(round_, others), changes
        link = round_.bytes_per_s
        assert ratio_on_record(study, others, suite="restore", bytes_per_s=link) is None, changes
        assert ratio_on_record(study, [*others, *records], suite="restore", bytes_per_s=link) == 1.0
    assert ratio_on_record(study, records, suite="restore", bytes_per_s=math.inf) is None


def test_a_pinned_prefix_is_a_link_too():
    """On the CPU its copies are numpy's, and what it carries at most shows in a load: there is no copy to measure."""
    from cacheflow.bench.restore.link import PinnedStudyLink

    study = new_study(link=PinnedStudyLink())
    study.prepare()
    assert study.store == "pinned"
    assert math.isfinite(study.link_bytes_per_s(math.inf))
    for name in ("load", "cacheflow"):
        assert study.run(make_policy(name), with_suffix=True, bytes_per_s=math.inf).correct
    study.close()


def hybrid_study(**options):
    from cacheflow.bench.restore.study import Study, StudyOptions
    from support.embedded_cases import random_tokens, tiny

    model, values = tiny("qwen3_5_text", "bfloat16"), {"executor": PATIENT, "cost_repeats": 1, **options}
    options = StudyOptions(num_tokens=320, suffix_tokens=40, chunk_tokens=64, layers_per_block=4, **values)
    return Study(model, random_tokens(360), options=options, link=new_link(model))


@pytest.mark.parametrize("with_suffix", [False, True])
def test_every_policy_restores_a_hybrid_exactly(with_suffix):
    study = hybrid_study()
    study.prepare()
    shape = study.model.shape
    assert study.prefix_bytes == 320 * shape.kv_bytes_per_token + shape.checkpoint_bytes
    problem = study.problem(with_suffix=with_suffix, bytes_per_s=1e9)
    assert problem.load_bytes_KB.sum() == study.prefix_bytes
    assert problem.recurrent_B.all()
    for name in RESTORE_POLICIES:
        for ratio in (0.5, 2.0):
            assert study.run(make_policy(name), with_suffix=with_suffix, bytes_per_s=study.bytes_per_s(ratio)).correct
    study.close()


@pytest.mark.parametrize("spoiled", ["none", "noise"])
@pytest.mark.parametrize("with_suffix", [False, True])
def test_a_wrong_checkpoint_is_found_out(monkeypatch, spoiled, with_suffix):
    from cacheflow.engine.running_states import RunningStates

    study = hybrid_study()
    study.prepare()
    place = RunningStates.write_payload

    def spoil(states, payload, layers):
        if spoiled == "noise":
            place(states, payload, layers)
        for layer in range(*layers):
            if study.model.shape.is_recurrent(layer):
                states.delta(layer).mul_(0.95) if spoiled == "noise" else states.delta(layer).zero_()

    monkeypatch.setattr(RunningStates, "write_payload", spoil)
    run = study.run(make_policy("load"), with_suffix=with_suffix, bytes_per_s=study.bytes_per_s(0.1))
    assert not run.kv_equal
    assert run.logits_equal is not with_suffix
    study.close()
