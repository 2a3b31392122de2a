"""Hybrids in servers: restarts, a second engine on the same store, adapters, other connectors. An engine each."""

import json

import numpy as np
import pytest

from support.fixed_staircase import planned
from support.hybrid_engines import WISHES, assert_equal, hybrid_engine, nothing_lost, prompt, stand_ins

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROWS, END = 2, 1024
STAIRCASE = (2, 2, 2, 1, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _single_process_vllm):
    from support.random_weights import model_folder

    return model_folder(tmp_path_factory.mktemp("servers") / "qwen3_next", "qwen3_next")


def restored_by_plan(engine, tokens, own, **wishes):
    with planned(engine, *STAIRCASE) as staircase:
        again = engine.ask(tokens, **{**WISHES, **wishes})
    assert (again.record["end"], again.record["cells"]) == (END, staircase.cells(ROWS))
    assert_equal(again, own)


def test_a_restart_and_a_second_engine_on_a_store_of_files(folder, tmp_path):
    """The second engine also finds a reply's states, and has other weights than the third, which finds nothing."""
    store = {"store": "file", "store_path": str(tmp_path / "store")}
    tokens, begun = prompt(1), prompt(2, 1000)
    with hybrid_engine(folder, options=store) as engine:
        own = engine.saved(tokens, **WISHES)
        reply = engine.ask(begun, num_tokens=100).tokens
        engine.ask(prompt(3, 20), num_tokens=1)  # vLLM tells workers of ends a step later
        engine.settle()
    with hybrid_engine(folder, options=store) as engine:
        restored_by_plan(engine, tokens, own)
        turn = begun + reply + prompt(4, 100)
        again = engine.ask(turn, params={"cacheflow": "load"}, **WISHES)
        assert again.record["end"] == END
        engine.evict()
        loaded = engine.ask(turn, params={"cacheflow": "load"}, **WISHES)
        assert_equal(loaded, again)
    with hybrid_engine(folder, options=store, seed=1) as engine:
        other = engine.ask(tokens, **WISHES)
        assert other.records == []
        assert "the store holds 0" in other.params["cacheflow_reason"]
        assert other.tokens != own.tokens


def test_as_the_only_child_of_multi_connector(folder):
    """Which is one for several KV cache groups where all of its children are."""

    def around(ours):
        child = {key: value for key, value in ours.items() if key != "kv_load_failure_policy"}
        config = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
        return {**config, "kv_connector_extra_config": {"connectors": [child]}}

    with hybrid_engine(folder, around=around) as started, nothing_lost(started) as engine:
        tokens = prompt(21)
        own = engine.saved(tokens, **WISHES)
        restored_by_plan(engine, tokens, own)


def write_adapter(folder, seed):
    """Of the attention and of the recurrent layers."""
    import torch
    from safetensors.torch import save_file

    generator, weights = torch.Generator().manual_seed(seed), {}
    widths = {"self_attn.q_proj": 1024, "self_attn.k_proj": 256, "self_attn.v_proj": 256, "linear_attn.out_proj": 256}
    for layer in range(4 * ROWS):
        for name, width in widths.items():
            if name.startswith("self_attn") != (layer % 4 == 3):
                continue
            base = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{base}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.1
            weights[f"{base}.lora_B.weight"] = torch.randn(width, 8, generator=generator) * 0.1
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": [name.split(".")[1] for name in widths], "base_model_name_or_path": "x",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("_single_process_vllm")
def test_adapters(tmp_path):
    """Without experts: with those vLLM 0.32 serves no adapters on the CPU."""
    from vllm.lora.request import LoRARequest

    from support.random_weights import model_folder

    folder = model_folder(tmp_path / "qwen3_5", "qwen3_5")
    write_adapter(tmp_path / "ad", 1)
    lora = LoRARequest("ad", 1, str(tmp_path / "ad"))
    arguments = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with stand_ins(), hybrid_engine(folder, **arguments) as started, nothing_lost(started) as engine:
        tokens = prompt(31)
        base, own = engine.saved(tokens, **WISHES), engine.saved(tokens, lora=lora, **WISHES)
        assert not np.array_equal(base.states, own.states)
        restored_by_plan(engine, tokens, own, lora=lora)
        engine.evict()
        restored_by_plan(engine, tokens, base)
