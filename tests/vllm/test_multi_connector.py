"""CacheFlow as a child of vLLM's MultiConnector, beside connectors with loads, saves and a handshake of their own."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 256
LENGTH = 4 * CHUNK + 37
OPTIONS = {"throttle_bytes_per_s": 1e9, "policy": "cake"}
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "PacedHostOffloadingSpec",
        "spec_module_path": "cacheflow.bench.vllm.rivals.offloading_spec",
        "cpu_bytes_to_use": 1 << 28,
    },
}
KEEPING = {
    "kv_connector": "KeepingConnector",
    "kv_connector_module_path": "support.keeping_connector",
    "kv_role": "kv_both",
}


def multi(*children, policy="recompute"):
    config = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": policy}
    return {**config, "kv_connector_extra_config": {"connectors": list(children)}}


def child(transfer, **changes):
    """CacheFlow's configuration as a child's, whose failure policy vLLM never reads."""
    return {key: value for key, value in {**transfer, **changes}.items() if key != "kv_load_failure_policy" and value}


def own_name(transfer):
    return child(transfer, kv_connector="OwnConnector", kv_connector_module_path="support.keeping_connector")


ARRANGEMENTS = {
    "ours-offloading": lambda ours: multi(child(ours, kv_connector_module_path=None), OFFLOADING),
    "offloading-ours": lambda ours: multi(OFFLOADING, child(ours)),
    "ours-keeping": lambda ours: multi(own_name(ours), KEEPING),
    "keeping-ours": lambda ours: multi(KEEPING, child(ours)),
}


def prompt_of(seed=1, length=LENGTH):
    from support.connector_engine import random_tokens

    return random_tokens(length, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _single_process_vllm):
    from support.vllm_models import write_model

    return write_model(tmp_path_factory.mktemp("multi"), "qwen3")


@pytest.fixture(scope="module")
def alone(folder):
    """What vLLM answers without any connector."""
    from support.connector_engine import serving_engine

    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK) as plain:
        return plain.ask(prompt_of())


@pytest.fixture(scope="module", params=ARRANGEMENTS)
def setting(request, folder, alone):
    """The arrangement's name, an engine, and what vLLM answers without any connector."""
    from support.connector_engine import serving_engine
    from support.keeping_connector import KEPT

    KEPT.handshakes.clear()
    with serving_engine(
        folder, dtype="float32", chunk_tokens=CHUNK, options=OPTIONS, around=ARRANGEMENTS[request.param],
        disable_log_stats=False,
    ) as engine:  # fmt: skip
        yield request.param, engine, alone


@pytest.fixture(autouse=True)
def _nothing_kept():
    from support.keeping_connector import KEPT

    KEPT.clear()


def forget_sibling(engine):
    """Empty the cache of the connector beside ours."""
    from support.keeping_connector import KEPT

    KEPT.clear()
    for each in engine.scheduler.connector.sub_connectors:
        if each is not engine.connector:
            each.reset_cache()


def test_restored_beside_another(setting):
    """Saved, evicted, restored by ours: first in line, or because the other has forgotten it."""
    _, engine, own = setting
    forget_sibling(engine)
    first = engine.saved(prompt_of())
    assert first.tokens == own.tokens
    assert np.array_equal(first.kv, own.kv)
    forget_sibling(engine)
    engine.balance_link(LENGTH)
    again = engine.ask(prompt_of())
    assert again.record["outcome"] == "done"
    assert (again.record["start"], again.record["end"]) == (0, 4 * CHUNK)
    assert again.record["loaded_cells"] > 0
    assert again.record["recomputed_cells"] > 0
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)


def test_the_first_in_line_serves_and_the_reason_says_so(setting):
    name, engine, own = setting
    forget_sibling(engine)
    engine.saved(prompt_of())
    again = engine.ask(prompt_of())
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)
    if name.startswith("ours"):
        assert again.record["outcome"] == "done"
        assert "cacheflow_reason" not in again.params
    else:
        assert again.records == []
        assert again.params["cacheflow_reason"] == "another connector of this engine loaded the prefix"


def test_what_only_the_other_holds_is_brought_by_it(setting):
    """In either order; and is saved by ours once it has proved right."""
    _, engine, _ = setting
    forget_sibling(engine)
    prompt = prompt_of(seed=2)
    own = engine.own(prompt)
    brought = engine.ask(prompt)
    assert brought.tokens == own.tokens
    assert brought.records == []
    assert brought.params["cacheflow_reason"] == "another connector of this engine loaded the prefix"
    engine.evict()
    forget_sibling(engine)
    engine.balance_link(LENGTH)
    again = engine.ask(prompt)
    assert (again.record["outcome"], again.record["end"]) == ("done", 4 * CHUNK)
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)


def test_a_prompt_whose_log_probabilities_are_asked_for_is_nobodys(setting):
    """VLLM asks all connectors and then computes it: that is the reason, not another connector."""
    from vllm import SamplingParams

    _, engine, _ = setting
    engine.saved(prompt_of())
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt_of()}], sampling, use_tqdm=False)
    assert "log-probabilities are asked for" in output.kv_transfer_params["cacheflow_reason"]
    engine.evict()


def test_both_restore_in_one_batch(setting):
    """Loads before the forward and restorations after it, in the same steps; aborts among them; no block is lost."""
    from support.keeping_connector import KEPT

    name, engine, _ = setting
    forget_sibling(engine)
    theirs = [prompt_of(seed=10 + n, length=3 * CHUNK + 5 * n + 3) for n in range(3)]
    ours = [prompt_of(seed=20 + n, length=3 * CHUNK + 7 * n + 3) for n in range(3)]
    own = {id(each): engine.saved(each).tokens for each in ours}
    forget_sibling(engine)
    own |= {id(each): engine.own(each).tokens for each in theirs}
    free_blocks = engine.free_blocks
    engine.balance_link(len(ours[0]))
    names = {}
    for one, other in zip(ours, theirs, strict=True):
        for each in (one, other):
            names[engine.submit(each)] = each
            engine.step()
    aborted = engine.submit(ours[0][: 2 * CHUNK + 9])
    engine.step()
    engine.abort(aborted)
    engine.run()
    for request, prompt in names.items():
        assert engine.answers[request].tokens == own[id(prompt)], request
    restored = [request for request, prompt in names.items() if any(prompt is each for each in ours)]
    assert all(engine.answers[request].record["outcome"] == "done" for request in restored)
    if "keeping" in name:
        assert KEPT.num_loads >= 3
    engine.evict()
    assert engine.free_blocks == free_blocks


def test_statistics_reach_the_frontend(setting):
    """The scheduler's and the worker's, by the class's name, in the log line and on the Prometheus endpoint."""
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.loggers import LoggingStatLogger

    name, engine, _ = setting
    lines, seen = [], []
    log = LoggingStatLogger(engine.engine.vllm_config)
    make = engine.scheduler.make_stats

    def noting(*args, **kwargs):
        stats = make(*args, **kwargs)
        if stats is not None and stats.kv_connector_stats:
            log.kv_connector_logging.observe(stats.kv_connector_stats)
            seen.extend(stats.kv_connector_stats)
        return stats

    def restored():
        return REGISTRY.get_sample_value("vllm:cacheflow_restorations_total", labels) or 0.0

    engine.scheduler.make_stats = noting
    labels = {"model_name": engine.engine.vllm_config.model_config.served_model_name, "engine": "0", "outcome": "done"}
    before = restored()
    forget_sibling(engine)
    engine.saved(prompt_of(seed=5))
    forget_sibling(engine)
    engine.balance_link(LENGTH)
    assert engine.ask(prompt_of(seed=5)).record["outcome"] == "done"
    engine.engine.do_log_stats()
    log.kv_connector_logging.log(lambda text, *args: lines.append(text % args))
    ours = "OwnConnector" if name == "ours-keeping" else "CacheFlowConnector"
    assert ours in seen
    assert ours in lines[0]
    assert "restorations done" in lines[0]
    assert restored() == before + 1
    engine.scheduler.make_stats = make


def test_handshakes_are_kept_apart(setting):
    """Both children were given their own; what ours found is there whoever comes first, and that it is not alone."""
    from cacheflow.vllm.connector import CacheFlowHandshake
    from support.keeping_connector import KEPT, KeepingHandshake

    name, engine, _ = setting
    if "keeping" in name:
        assert KEPT.handshakes == [{0: KeepingHandshake(engine.layout.num_layers)}]
    assert len(engine.side.decider.stages) == 1
    (of_worker,) = engine.core.model_executor.get_kv_connector_handshake_metadata()
    (of_children,) = of_worker.values()
    assert [each.alone for each in of_children.by_child if isinstance(each, CacheFlowHandshake)] == [False]


def test_a_load_of_the_other_that_fails_is_not_saved(setting):
    """What it was to bring is not there in the step that finds out; no KV of that request may reach the store."""
    from support import v2_runner
    from support.keeping_connector import KEPT

    name, engine, _ = setting
    if "keeping" not in name:
        pytest.skip("its loads cannot be made to fail")
    prompt = prompt_of(seed=6)
    own = engine.own(prompt)
    KEPT.fail = True
    computed = engine.ask(prompt)
    assert KEPT.num_loads == 1
    # vLLM 0.32's second runner goes on with what the blocks held, with or without CacheFlow.
    assert computed.tokens == own.tokens or v2_runner.WANTED
    engine.evict()
    forget_sibling(engine)
    engine.balance_link(LENGTH, ratio=0.1)
    again = engine.ask(prompt, params={"cacheflow": "load"})
    assert "the store holds 0" in again.params["cacheflow_reason"]
    assert again.tokens == own.tokens
    assert np.array_equal(again.kv, own.kv)


@pytest.mark.usefixtures("_single_process_vllm")
def test_what_is_configured_twice_is_refused(tmp_path):
    from vllm.config import KVTransferConfig

    from cacheflow.errors import ConfigError
    from cacheflow.vllm.connector import _check_transfer
    from support.connector_engine import kv_transfer_config

    ours = kv_transfer_config(tmp_path, {})
    once = KVTransferConfig(**multi(child(ours), KEEPING))
    _check_transfer(once)
    _check_transfer(KVTransferConfig(**ours))
    with pytest.raises(ConfigError, match="2 children that are CacheFlow's"):
        _check_transfer(KVTransferConfig(**multi(child(ours), own_name(ours))))
    with pytest.raises(ConfigError, match="kv_load_failure_policy is 'fail'"):
        _check_transfer(replace(once, kv_load_failure_policy="fail"))


@pytest.mark.usefixtures("_single_process_vllm")
def test_facts_that_never_came_are_a_fault_at_start():
    """Whatever stands between the worker and the scheduler: an engine that restores nothing must not start silently."""
    from cacheflow.errors import ConfigError
    from cacheflow.vllm.connector import CacheFlowConnector
    from support.keeping_connector import KeepingHandshake

    with pytest.raises(ConfigError, match="none of 1 workers handed over"):
        CacheFlowConnector.set_xfer_handshake_metadata_pp_aware(SimpleNamespace(), {(0, 0): KeepingHandshake(1)})
