"""Hybrids under vLLM's options that change where running states are kept, and what they look like."""

import numpy as np
import pytest

from support.fixed_staircase import planned
from support.hybrid_engines import CHUNK, WISHES, assert_equal, asynchronous, hybrid_engine, nothing_lost, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OFF = {"cacheflow": "off"}
ROWS = 2


@pytest.fixture
def folder(tmp_path, _single_process_vllm):
    from support.random_weights import model_folder

    return model_folder(tmp_path / "qwen3_next", "qwen3_next")


def restored_by_plan(engine, tokens, own, *levels_K, start=0):
    """Forgotten by vLLM but for ``start`` tokens, and restored by a plan."""
    with planned(engine, *levels_K) as staircase:
        again = engine.ask(tokens, **WISHES)
    assert (again.record["start"], again.record["cells"]) == (start, staircase.cells(ROWS))
    assert_equal(again, own)
    return again


@pytest.mark.parametrize(("interval", "at"), [(None, 640), (512, 512)])
def test_vllm_keeps_states_within_a_prompt(folder, interval, at):
    """``prefix_cache_retention_interval``: another prompt goes on from them, and a restoration after them."""
    with hybrid_engine(folder, prefix_cache_retention_interval=interval) as started, nothing_lost(started) as engine:
        tokens = prompt(1)
        own = engine.saved(tokens, **WISHES)
        restored_by_plan(engine, tokens, own, 2, 2, 2, 1, 1, 0, 0, 0)
        engine.evict()
        engine.ask(tokens, params=OFF, num_tokens=1)
        engine.evict()
        engine.ask(tokens[:700] + prompt(2, 500), params=OFF, num_tokens=1)
        restored_by_plan(engine, tokens, own, *(2, 1, 0, 0, 0)[: (1024 - at) // CHUNK], start=at)
        engine.evict()
        parting = tokens[:700] + prompt(3, 300)
        own = engine.own(parting, **WISHES)
        engine.ask(tokens, params={"cacheflow": "load"}, num_tokens=1)
        again = engine.ask(parting, **WISHES)
        assert again.records == []
        assert_equal(again, own)


def test_hits_that_end_within_a_block(folder):
    """``prefix_match_unit``: a restoration ends where a block does, and vLLM has what goes on from within one.

    There vLLM has let go of the states at the end of the block before, when the first token comes.
    """

    def same(answer, own):
        assert np.array_equal(answer.kv, own.kv)
        assert (answer.tokens, answer.logprobs) == (own.tokens, own.logprobs)

    with hybrid_engine(folder, prefix_match_unit=64) as started, nothing_lost(started) as engine:
        tokens, longer = prompt(1), prompt(4, 1500)
        own, local = (engine.ask(tokens, params=OFF, **WISHES) for _ in range(2))
        same(engine.saved(tokens, **WISHES), own)
        with planned(engine, 2, 2, 2, 1, 1, 0, 0, 0) as staircase:
            again = engine.ask(tokens, **WISHES)
        assert again.record["cells"] == staircase.cells(ROWS)
        same(again, own)
        again = engine.ask(tokens, **WISHES)
        assert again.records == []
        same(again, local)
        own = engine.saved(longer, **WISHES)
        engine.ask(longer[:1100], params=OFF, num_tokens=1)
        again = engine.ask(longer, **WISHES)
        assert (again.record["start"], again.record["end"]) == (1024, 1408)
        assert again.record["recomputed_cells"] == 0
        same(again, own)


def test_vllm_schedules_ahead_of_what_it_has_sampled(folder):
    """A reply's states are saved although the last token of their chunk is known a step later."""
    first, end = prompt(5, 7 * CHUNK + 90), 8 * CHUNK
    unset = {"chunk_tokens": None}  # a chunk is then a block
    with asynchronous(), hybrid_engine(folder, options=unset) as started, nothing_lost(started) as engine:
        tokens = prompt(1)
        own = engine.saved(tokens, **WISHES)
        restored_by_plan(engine, tokens, own, 2, 2, 2, 1, 1, 0, 0, 0)
        engine.evict()
        name = engine.submit(first, num_tokens=100)
        engine.run(until=lambda: engine.request(name).num_computed_tokens >= end)
        states, kv = engine.gather_states(engine.state_blocks(name, end)), engine.gather(engine.block_ids(name)[:8])
        engine.run()
        turn = first + engine.answers[name].tokens + prompt(6, 9)
        engine.ask(prompt(7, 20), num_tokens=1, params=OFF)  # vLLM tells workers of ends a step later
        engine.evict()
        again = engine.ask(turn, params={"cacheflow": "load"}, **WISHES)
        assert again.record["end"] == end
        assert len(again.record["cells"]) == end // CHUNK
        assert np.array_equal(again.kv, kv)
        assert np.array_equal(again.states, states)


STATES = {
    "as they are": ("float32", "SD"),
    "of bfloat16": ("bfloat16", "SD"),
    "dimensions first": ("float32", "DS"),
}
"""Dtype of the recurrent states, and layout of the convolution's."""


@pytest.fixture(scope="module")
def store_of_all(tmp_path_factory):
    """Of every engine of the test below; what those wrote that ran before is not theirs."""
    return {"store": "file", "store_path": str(tmp_path_factory.mktemp("states") / "store")}


@pytest.mark.parametrize("name", STATES)
def test_states_of_another_dtype_or_layout(folder, name, store_of_all, monkeypatch):
    """They are restored as exactly, and are another engine's."""
    from vllm.model_executor.layers.mamba import mamba_utils

    dtype, layout = STATES[name]
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", layout)
    mamba_utils.get_conv_state_layout.cache_clear()
    with hybrid_engine(folder, options=store_of_all, mamba_ssm_cache_dtype=dtype) as engine:
        tokens = prompt(1)
        first = engine.ask(tokens, **WISHES)
        engine.evict()
        described = dict(engine.worker.facts.identity)["states"]
        assert described.endswith(f" of {dtype}, convolution {layout}")
        assert first.records == []
        restored_by_plan(engine, tokens, first, 2, 2, 2, 1, 1, 0, 0, 0)
        engine.evict()
        loaded = engine.ask(tokens, params={"cacheflow": "load"}, **WISHES)
        assert loaded.record["recomputed_cells"] == 0
        assert_equal(loaded, first)
    mamba_utils.get_conv_state_layout.cache_clear()
