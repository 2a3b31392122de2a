"""The handshake that vLLM 0.33 repeats after it has slept, made by the same calls."""

import pickle

import numpy as np
import pytest

CHUNK = 256
LENGTH = 4 * CHUNK + 37


def again(core):
    """As ``EngineCore.wake_up`` does it in 0.33; what workers answer crosses processes."""
    content = {}
    for of_worker in core.model_executor.get_kv_connector_handshake_metadata():
        content |= pickle.loads(pickle.dumps(of_worker))
    core.scheduler.get_kv_connector().set_xfer_handshake_metadata_pp_aware(content)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("handshake"), "qwen3")
    options = {"throttle_bytes_per_s": 1e9, "policy": "cake"}
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options=options) as made:
        yield made


@pytest.fixture
def _measured_once(monkeypatch):
    """A second self-test or calibration would overwrite KV blocks and cost seconds."""
    from cacheflow.vllm import starting

    def never(*_):
        raise AssertionError("the engine was tested and measured a second time")

    monkeypatch.setattr(starting, "find_engine", never)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("_measured_once")
def test_requests_before_between_and_after(engine):
    """A restoration under way goes on, a request that waits stays known, what was learned of the link stays."""
    from support.connector_engine import random_tokens

    prompts = [random_tokens(LENGTH + n, seed=60 + n) for n in range(3)]
    own = [engine.saved(prompt) for prompt in prompts]
    engine.balance_link(LENGTH)
    engine.side.counts.take()
    free_blocks = engine.free_blocks
    first = engine.submit(prompts[0])
    engine.run(until=lambda: engine.side.has_work)
    waiting = engine.submit(prompts[1])
    rates = engine.side.decider.rates
    again(engine.core)
    assert engine.side.has_work
    assert all(engine.side.knows(name) for name in engine.scheduler.requests)
    assert engine.side.decider.rates is rates
    engine.run()
    again(engine.core)
    again(engine.core)
    last = engine.submit(prompts[2])
    engine.run()
    for name, expected in zip((first, waiting, last), own, strict=True):
        answer = engine.answers[name]
        assert (answer.record["outcome"], answer.record["end"]) == ("done", 4 * CHUNK)
        assert answer.tokens == expected.tokens
        assert np.array_equal(answer.kv, expected.kv)
    engine.evict()
    assert engine.free_blocks == free_blocks


@pytest.mark.vllm
@pytest.mark.slow
def test_it_says_that_no_other_connector_serves_the_engine(engine):
    """So that what vLLM does not say of a preempted request is known: nobody else loads for it."""
    of_workers = engine.core.model_executor.get_kv_connector_handshake_metadata()
    assert [each.alone for of_worker in of_workers for each in of_worker.values()] == [True]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("_measured_once")
def test_counts_are_neither_lost_nor_doubled(engine):
    """What was counted before the repeated handshake is reported once."""
    from support.connector_engine import random_tokens

    prompt = random_tokens(LENGTH, seed=70)
    engine.saved(prompt)
    engine.balance_link(LENGTH)
    reported = []
    make = engine.scheduler.make_stats

    def noting(*args, **kwargs):
        stats = kwargs.get("kv_connector_stats", args[1] if len(args) > 1 else None)
        if stats is not None:
            reported.append(stats.to_dict())
        return make(*args, **kwargs)

    engine.scheduler.make_stats = noting
    engine.submit(prompt)
    engine.run(until=lambda: engine.side.has_work)
    again(engine.core)
    engine.run()
    again(engine.core)
    engine.ask(random_tokens(40, seed=71))
    engine.scheduler.make_stats = make
    assert sum(each.get("restorations", {}).get("done", 0) for each in reported) == 1
    tokens = [each["tokens"] for each in reported if "tokens" in each]
    assert sum(each.get("recomputed", 0) + each.get("loaded", 0) for each in tokens) == 4 * CHUNK


@pytest.mark.vllm
def test_the_connector_takes_facts_once():
    """Equal facts from another process: a known request, its decision and a restoration under way outlive them."""
    from cacheflow.vllm.connector import CacheFlowConnector, CacheFlowHandshake
    from cacheflow.vllm.starting import Starting
    from support.scheduler_cases import CHUNK as SHORT
    from support.scheduler_cases import Case, Worker
    from support.side_start import SideStart

    case = Case()
    handshakes = {(0, 0): CacheFlowHandshake(*case.facts_by_rank)}
    connector = CacheFlowConnector.__new__(CacheFlowConnector)
    connector.begin(Starting(options=case.options, store=case.store, vllm_config=None, kv_cache_config=None))
    connector.set_xfer_handshake_metadata_pp_aware(handshakes)
    connector.scheduler_side.close()
    connector.begin(SideStart(case.side))  # the same, with a clock of the test's
    connector.set_xfer_handshake_metadata_pp_aware(handshakes)
    worker = Worker(case)
    prompt = case.saved_prompt(4 * SHORT + 10, 4)
    case.arrive("a", prompt)
    assert case.begin("a") == 4 * SHORT
    worker.carry_out(case.step())
    case.arrive("b", prompt[: 2 * SHORT + 5])
    connector.set_xfer_handshake_metadata_pp_aware(pickle.loads(pickle.dumps(handshakes)))
    assert connector.scheduler_side is case.side
    assert case.side.knows("b")
    assert case.side.has_work
    worker.run()
    assert worker.finished == [0]
    assert case.matched("b") == 2 * SHORT
    assert case.side.counts.restorations == {"done": 1}
