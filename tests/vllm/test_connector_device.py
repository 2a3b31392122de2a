"""vLLM's own engine over streams that are late: the way that workers go on CUDA, for bits and for who waits.

The model computes at once, on the CPU; uploads and saves are done as late as can be, or in any sequence.
"""

import random

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK, NUM_CHUNKS, LAYERS = 128, 5, 6


@pytest.fixture(scope="module")
def setting(tmp_path_factory, _single_process_vllm):
    """An engine whose worker has a device with streams, the device, and what an engine without a connector answered."""
    from cacheflow.tensors.copy_lane import CopyLane
    from cacheflow.vllm.startup import find_engine
    from support.connector_engine import random_tokens, serving_engine
    from support.fake_device import NONE_GOES_ON, PromptDevice
    from support.vllm_models import write_model

    folder = write_model(tmp_path_factory.mktemp("device"), "qwen3", num_hidden_layers=LAYERS)
    prompt = random_tokens(NUM_CHUNKS * CHUNK + 37, seed=CHUNK)
    with serving_engine(folder, dtype="bfloat16", chunk_tokens=CHUNK) as plain:
        own = plain.ask(prompt)
    rng = random.Random(5)
    device = PromptDevice(lambda num_ready: NONE_GOES_ON if rng.random() < 0.9 else rng.randrange(num_ready))
    lane = CopyLane(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find_engine, "lane_of", lambda of_device: lane)
        options = {"throttle_bytes_per_s": 1e9, "self_test": True}
        with serving_engine(folder, dtype="bfloat16", chunk_tokens=CHUNK, options=options) as engine:
            yield engine, device, prompt, own


@pytest.mark.parametrize("policy", ["cacheflow", "load", "cacheflow_v1"])
@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_saved_and_restored_as_computed(setting, policy, layers_per_block):
    engine, device, prompt, own = setting
    engine.configure(policy=policy, layers_per_block=layers_per_block)
    first = engine.saved(prompt)
    assert np.array_equal(first.kv, own.kv)
    engine.balance_link(len(prompt), ratio=0.2 if policy == "load" else 1.0)
    device.waits_by_thread.clear()
    device.asked.clear()
    lent_before = engine.store.stats().num_lent
    again = engine.ask(prompt)
    record = again.record
    assert record["outcome"] == "done"
    assert record["loaded_cells"] > 0
    assert record["recomputed_cells"] > 0 or policy == "load"  # which recomputes what a slow device takes too late
    assert np.array_equal(again.kv, own.kv)
    assert again.tokens == own.tokens
    assert device.asked["up", "launch"] >= record["loaded_cells"] > 0
    assert engine.store.stats().num_lent - lent_before >= record["loaded_cells"], "from where the store has them"
    # The I/O thread never waits. The main one does for builders' buffers, once a piece: each chunk's, and that of one
    # which stopped below its top and went on after others.
    assert set(device.waits_by_thread) <= {"MainThread", "cacheflow-save"}
    assert device.waits_by_thread["MainThread"] <= (2 * NUM_CHUNKS if record["recomputed_cells"] else 0)


def test_what_was_recomputed_took_the_seconds_that_events_say(setting):
    engine, _, prompt, own = setting
    engine.configure(policy="cacheflow", layers_per_block=1)
    engine.saved(prompt)
    engine.balance_link(len(prompt), ratio=3.0)
    reports, take = [], engine.worker.take_report

    def noted():
        report = take()
        if report is not None:
            reports.extend(each for rank in report.by_rank.values() for each in rank.computes)
        return report

    engine.worker.take_report = noted
    again = engine.ask(prompt)
    assert again.record["outcome"] == "done"
    assert np.array_equal(again.kv, own.kv)
    assert reports
    assert all(seconds > 0 for each in reports for seconds in each.seconds)
    assert [each.first for each in reports] == list(range(len(reports))), "each piece by itself, in sequence, once"
