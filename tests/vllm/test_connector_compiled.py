"""A compiled engine: restored in whole passes, equal in every bit to what it computes itself."""

from dataclasses import replace

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 256
NUM_CHUNKS = 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory, _single_process_vllm):
    from support.connector_engine import serving_engine
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("compiled"), "llama", num_hidden_layers=6)
    options = {"throttle_bytes_per_s": 1e9, "self_test": True}
    with serving_engine(folder, dtype="bfloat16", chunk_tokens=CHUNK, options=options, enforce_eager=False) as engine:
        yield engine


@pytest.mark.parametrize("policy", ["cacheflow", "cake", "load", "cacheflow_v1", "cacheflow_v2"])
def test_token_wise(engine, policy):
    from support.connector_engine import random_tokens

    engine.configure(policy=policy)
    prompt = random_tokens(NUM_CHUNKS * CHUNK + 37)
    own = engine.own(prompt)
    first = engine.saved(prompt)
    assert np.array_equal(first.kv, own.kv)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    again = engine.ask(prompt)
    assert again.record["outcome"] == "done"
    assert again.record["loaded_cells"] + again.record["recomputed_cells"] == NUM_CHUNKS
    assert again.record["loaded_cells"] > 0
    assert (again.record["recomputed_cells"] > 0) == (policy != "load")
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens


def test_the_forward_itself_goes_in_whole_passes(engine, monkeypatch):
    """The self-test finds no cuts between layers to compare; two chunks are recomputed into poisoned blocks."""
    from cacheflow.plan.grid import Tile
    from cacheflow.restore.work import RestoreTarget
    from cacheflow.vllm.models.model_access import open_model
    from cacheflow.vllm.models.partial_forward import PartialForward
    from cacheflow.vllm.startup.selftest import self_test
    from cacheflow.vllm.worker.recompute import VllmComputePort
    from support.connector_engine import random_tokens

    handle = open_model(engine.runner.vllm_config, engine.runner.kv_cache_config)
    assert handle.compiled
    forward = PartialForward(handle)
    report = self_test(engine.layout, forward, chunk_tokens=CHUNK)
    assert (report.difference, report.num_cuts) == (None, 0)
    monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", 128)
    tokens = random_tokens(256 + 9)
    own = engine.own(tokens)
    block_ids = [engine.layout.num_blocks - 1, engine.layout.num_blocks - 2]
    target = RestoreTarget(
        restore_id=1, request_id="r", start=0, object_start=0, chunk_ends=(128, 256), tokens=tuple(tokens[:256]),
        block_ids=tuple(block_ids), namespace="n", chain_hashes=("h",) * 2, layers_per_block=engine.layout.num_layers,
    )  # fmt: skip
    with pytest.raises(ValueError, match="whole passes"):
        VllmComputePort(forward, replace(target, layers_per_block=1))
    port = VllmComputePort(forward, target)
    assert not np.array_equal(engine.gather(block_ids), own.kv)
    for chunk in range(2):
        port.recompute(Tile(chunk, chunk + 1, 0, 1), kv_only_top=False)
    port.finish()
    assert np.array_equal(engine.gather(block_ids), own.kv)


def test_layer_blocks_are_refused(engine):
    from cacheflow.errors import ConfigError

    with pytest.raises(ConfigError, match="enforce-eager"):
        engine.configure(layers_per_block=2)
