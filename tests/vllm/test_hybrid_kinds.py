"""Other models with recurrent layers (Gated DeltaNet, Mamba-2) and other engines: restored, and equal bit for bit.

Each engine ends before the next one starts, because vLLM has one a process: so they have a file of their own.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest

from support.fixed_staircase import planned
from support.hybrid_engines import (
    CHUNK,
    END,
    PROMPT,
    WISHES,
    assert_a_wrong_state_shows,
    assert_equal,
    hybrid_engine,
    prompt,
    stand_ins,
)
from support.v2_runner import WANTED, first_runner

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@dataclass(frozen=True, slots=True)
class Other:
    """An engine, and a prompt whose last chunk ends at ``end``.

    Attributes:
        recomputes: Whether that is compared: not where chunks are not what the engine's passes are.
        within_passes: Whether passes leave states in their middle.
        only_loads: Why nothing is recomputed.
    """

    config: str = "qwen3_next"
    changes: dict = field(default_factory=dict)
    chunk: int = CHUNK
    prompt: int = PROMPT
    end: int = END
    engine: dict = field(default_factory=dict)
    recomputes: bool = True
    within_passes: bool = False
    only_loads: str = ""


OTHERS = {
    "nemotron_h": Other("nemotron_h"),
    "nemotron_h-compiled": Other("nemotron_h", engine={"enforce_eager": False}),
    "nemotron_h, blocks of 192 tokens": Other("nemotron_h", chunk=192, end=960, engine={"block_size": 192}),
    "nemotron_h, states within passes": Other("nemotron_h", chunk=2 * CHUNK, prompt=1000, end=768, within_passes=True),
    "nemotron_h, passes of four blocks": Other(
        "nemotron_h", engine={"max_num_batched_tokens": 4 * CHUNK}, recomputes=False, within_passes=True
    ),
    "granite_hybrid": Other("granite_hybrid"),
    "falcon_h1": Other("falcon_h1"),
    "falcon_h1-compiled": Other("falcon_h1", engine={"enforce_eager": False}),
    "zamba2": Other("zamba2", recomputes=False, only_loads="are in one layer"),
    "qwen3_5": Other("qwen3_5"),
    "compiled": Other(engine={"enforce_eager": False}),
    "qwen3_5-compiled": Other("qwen3_5", engine={"enforce_eager": False}),
    "chunks of two blocks": Other(chunk=2 * CHUNK, prompt=1000, end=768),
    "experts in every layer": Other(changes={"decoder_sparse_step": 1}),
    "qwen3_5-experts": Other("qwen3_5_moe"),
    "qwen3_5-images": Other("qwen3_5_media", engine={"language_model_only": True}),
    "blocks of 192 tokens": Other(chunk=192, end=960, engine={"block_size": 192}),
}
IN_THE_PLAIN_SUITE = ("nemotron_h",)
"""On both generations of vLLM's runner."""


@pytest.fixture(
    params=[
        pytest.param(each, id=name, marks=() if name in IN_THE_PLAIN_SUITE else pytest.mark.long)
        for name, each in OTHERS.items()
        if name in IN_THE_PLAIN_SUITE or not WANTED
    ]
)
def other(request, tmp_path, _single_process_vllm):
    """Ends before the next one starts: vLLM has one engine a process."""
    from support.random_weights import model_folder
    from support.states_within_passes import states_within_passes

    case = request.param
    folder = model_folder(tmp_path / case.config, case.config, **case.changes)
    with (
        stand_ins(),
        states_within_passes() if case.within_passes else nullcontext() as left,
        hybrid_engine(folder, chunk=case.chunk, **case.engine) as engine,
    ):
        yield engine, case
    assert bool(left) == case.within_passes


@pytest.mark.timeout(900)
def test_in_other_engines(other):
    engine, case = other
    reason = engine.worker.facts.load_only_reason
    assert bool(reason) == bool(case.only_loads)
    assert case.only_loads in reason
    tokens, num_blocks, num_chunks = prompt(1, case.prompt), engine.side.decider.num_blocks, case.end // case.chunk
    own = engine.saved(tokens, **WISHES)
    for share in (1, 2) if case.recomputes else ():
        whole = num_chunks * share // 3
        levels = [num_blocks] * whole + [num_blocks // 2] + [0] * (num_chunks - whole - 1)
        with planned(engine, *levels) as staircase:
            again = engine.ask(tokens, **WISHES)
        assert again.record["end"] == case.end
        assert again.record["cells"] == staircase.cells(num_blocks)
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
@pytest.mark.parametrize(("name", "pipeline", "tensor", "layers"), [
    ("qwen3_next", 1, 2, 8), ("qwen3_next", 2, 1, 8), ("qwen3_next", 2, 1, 12),
    ("nemotron_h", 1, 2, 13), ("nemotron_h", 2, 1, 13),
])  # fmt: skip
def test_ranks(tmp_path, rank_host, name, pipeline, tensor, layers):
    """Tensor-parallel ranks have states of their own heads, pipeline stages those of their own rows.

    Two stages of twelve layers are cut within a row: the first ends with two recurrent layers.
    """
    from transformers import AutoConfig

    from support.random_weights import model_folder
    from support.rank_cases import AUTO, LOAD, OFF, Setting, asked, equal, record_of, request, saved
    from support.vllm_models import write_weights

    # vLLM wants experts on every stage of Qwen3-Next.
    changes = {"num_hidden_layers": layers, "decoder_sparse_step": 4} if name == "qwen3_next" else {}
    config = AutoConfig.from_pretrained(model_folder(tmp_path / "config", name, **changes))
    setting = Setting(str(write_weights(tmp_path / "model", config)), tmp_path, rank_host, 400.0)
    script = setting.script(pipeline=pipeline, tensor=tensor)
    script.connector, script.dtype, script.num_kv_blocks = "CacheFlowHybridConnector", "bfloat16", 80
    if name == "nemotron_h":
        script.chunk_tokens = CHUNK  # a block: on the CPU no pass may cross the end of one
    saved(script, 1)
    asked(script, "own", request(1, OFF))
    asked(script, "restored", request(1, AUTO))
    asked(script, "load", request(1, LOAD))
    answers = setting.run(script, "ranks")
    for each in (answers["restored"], answers["load"]):
        assert record_of(each)["outcome"] == "done"
        equal(each, answers["own"])
