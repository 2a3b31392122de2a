"""Other models with recurrent layers (Gated DeltaNet, Mamba-2) and other engines: restored, and equal bit for bit.

Each engine ends before the next one starts, because vLLM has one a process: so they have a file of their own.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.hybrid_answers import (
    CHUNK,
    END,
    PROMPT,
    WISHES,
    assert_a_wrong_state_shows,
    assert_equal,
    prompt,
    restored,
)
from support.v2_runner import WANTED

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
first_runner = pytest.mark.skipif(WANTED, reason="the second runner's kernels are interpreted: test_hybrids shows it")

STAND_INS = str(Path(__file__).parents[1] / "data" / "stand_ins")
"""For modules that vLLM's models import and never use here: torchvision."""


@dataclass(frozen=True, slots=True)
class Other:
    """An engine, and a prompt whose last chunk ends at ``end``.

    Attributes:
        ratios: Of loading to recomputing; none where chunks are not what the engine's passes are, or nothing is
            recomputed.
        within_passes: Whether passes leave states in their middle.
        only_loads: Why nothing is recomputed.
    """

    config: str = "qwen3_next"
    chunk: int = CHUNK
    prompt: int = PROMPT
    end: int = END
    engine: dict = field(default_factory=dict)
    ratios: tuple[float, ...] = (1.0, 4.0)
    within_passes: bool = False
    only_loads: str = ""


OTHERS = {
    "nemotron_h": Other("nemotron_h"),
    "nemotron_h-compiled": Other("nemotron_h", engine={"enforce_eager": False}),
    "nemotron_h, blocks of 192 tokens": Other("nemotron_h", chunk=192, end=960, engine={"block_size": 192}),
    "nemotron_h, states within passes": Other("nemotron_h", chunk=2 * CHUNK, prompt=1000, end=768, within_passes=True),
    "nemotron_h, passes of four blocks": Other(
        "nemotron_h", engine={"max_num_batched_tokens": 4 * CHUNK}, ratios=(), within_passes=True
    ),
    "granite_hybrid": Other("granite_hybrid"),
    "falcon_h1": Other("falcon_h1"),
    "falcon_h1-compiled": Other("falcon_h1", engine={"enforce_eager": False}),
    "zamba2": Other("zamba2", ratios=(), only_loads="are in one layer"),
    "qwen3_5": Other("qwen3_5"),
    "compiled": Other(engine={"enforce_eager": False}),
    "qwen3_5-compiled": Other("qwen3_5", engine={"enforce_eager": False}),
    "chunks of two blocks": Other(chunk=2 * CHUNK, prompt=1000, end=768),
    "blocks of 192 tokens": Other(chunk=192, end=960, engine={"block_size": 192}),
}


IN_THE_PLAIN_SUITE = ("nemotron_h",)


@pytest.fixture(
    params=[
        pytest.param(each, id=name, marks=() if name in IN_THE_PLAIN_SUITE else pytest.mark.long)
        for name, each in OTHERS.items()
    ]
)
def other(request, tmp_path, monkeypatch, _single_process_vllm):
    """Ends before the next one starts: vLLM has one engine a process."""
    from support.connector_engine import serving_engine
    from support.random_weights import model_folder, random_weights
    from support.states_within_passes import states_within_passes

    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([STAND_INS, *sys.path]))  # vLLM looks at models in a process
    case = request.param
    options = {"self_test": True, "throttle_bytes_per_s": 1e8, "policy": "cake"}
    arguments = {"load_format": "dummy", "num_gpu_blocks_override": 96, "connector": "CacheFlowHybridConnector"}
    folder = model_folder(tmp_path / case.config, case.config)
    with (
        random_weights(),
        states_within_passes() if case.within_passes else nullcontext() as left,
        serving_engine(
            folder, dtype="bfloat16", chunk_tokens=case.chunk, options=options, **arguments | case.engine
        ) as engine,
    ):
        yield engine, case
    assert bool(left) == case.within_passes


@first_runner
@pytest.mark.timeout(900)
def test_in_other_engines(other):
    engine, case = other
    reason = engine.worker.facts.load_only_reason
    assert bool(reason) == bool(case.only_loads)
    assert case.only_loads in reason
    tokens = prompt(1, case.prompt)
    own = engine.saved(tokens, **WISHES)
    for ratio in case.ratios:
        again = restored(engine, tokens, ratio=ratio)
        assert again.record["end"] == case.end
        assert again.record["loaded_cells"] > 0
        assert again.record["recomputed_cells"] > 0
        assert_equal(again, own)
        engine.evict()
    again = engine.ask(tokens, params={"cacheflow": "load"}, **WISHES)
    assert again.record["recomputed_cells"] == 0
    assert again.record["end"] == case.end
    assert_equal(again, own)
    engine.evict()
    step = case.engine.get("max_num_batched_tokens", 2 * case.chunk)
    assert_a_wrong_state_shows(engine, tokens, own, "a little", end=case.end, step=step)


@first_runner
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("pipeline", "tensor", "layers"), [(1, 2, 8), (2, 1, 8), (2, 1, 12)])
def test_ranks(tmp_path, pipeline, tensor, layers):
    """Tensor-parallel ranks have states of their own heads, pipeline stages those of their own rows.

    Two stages of twelve layers are cut within a row: the first ends with two recurrent layers.
    """
    from transformers import AutoConfig

    from support.random_weights import model_folder
    from support.rank_cases import AUTO, LOAD, OFF, Setting, asked, equal, record_of, request, saved
    from support.vllm_models import write_weights

    # vLLM wants experts on every stage.
    changes = {"num_hidden_layers": layers, "decoder_sparse_step": 4}
    config = AutoConfig.from_pretrained(model_folder(tmp_path / "config", "qwen3_next", **changes))
    setting = Setting(str(write_weights(tmp_path / "model", config)), tmp_path, 400.0)
    script = setting.script(pipeline=pipeline, tensor=tensor)
    script.connector, script.dtype, script.num_kv_blocks = "CacheFlowHybridConnector", "bfloat16", 80
    saved(script, 1)
    asked(script, "own", request(1, OFF))
    asked(script, "restored", request(1, AUTO))
    asked(script, "load", request(1, LOAD))
    answers = setting.run(script, "ranks")
    assert record_of(answers["restored"])["recomputed_cells"] > 0
    assert record_of(answers["restored"])["loaded_cells"] > 0
    for each in (answers["restored"], answers["load"]):
        assert record_of(each)["outcome"] == "done"
        equal(each, answers["own"])
