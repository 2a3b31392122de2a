"""LoRA adapters in a real engine: known by their content, whatever they are called and wherever they lie."""

import contextlib
import json
import re

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNK = 128


def restored(answer):
    return sum(record["end"] - record["start"] for record in answer.records if record["outcome"] == "done")


def write_adapter(folder, seed):
    import torch
    from safetensors.torch import save_file

    from support.vllm_models import TINY

    hidden, kv = TINY["hidden_size"], TINY["num_key_value_heads"] * TINY["head_dim"]
    generator, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(TINY["num_hidden_layers"]):
        for name, width in (("q_proj", TINY["num_attention_heads"] * TINY["head_dim"]), ("k_proj", kv), ("v_proj", kv)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{base}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.3
            weights[f"{base}.lora_B.weight"] = torch.randn(width, 8, generator=generator) * 0.3
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj"], "base_model_name_or_path": "x",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def lora(folder, *, number=1, load_inplace=False):
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"ad{number}", number, str(folder), load_inplace=load_inplace)


@pytest.mark.usefixtures("_single_process_vllm")
def test_adapters_are_known_by_their_content(tmp_path):
    """Starts on the CPU; the same adapter is restored, also under another name; a retrained one is not."""
    from support.connector_engine import random_tokens, serving_engine
    from support.vllm_models import write_model

    folder, prompt = write_model(tmp_path / "model", "llama"), random_tokens(4 * CHUNK + 20, seed=11)
    options = {"store": "memory", "policy": "load"}
    adapter, copied = tmp_path / "ad", tmp_path / "copied"
    write_adapter(adapter, 1)
    write_adapter(copied, 1)
    with serving_engine(
        folder, dtype="float32", chunk_tokens=CHUNK, options=options, enable_lora=True, max_lora_rank=8, max_loras=2
    ) as engine:
        base = engine.saved(prompt).tokens
        first = engine.saved(prompt, lora=lora(adapter)).tokens
        assert first != base
        for request, expected in ((None, base), (lora(adapter), first), (lora(copied, number=2), first)):
            answer = engine.ask(prompt, lora=request)
            assert (restored(answer), answer.tokens) == (4 * CHUNK, expected)
            engine.evict()

        write_adapter(adapter, 2)  # retrained, and loaded again in place
        second = engine.ask(prompt, lora=lora(adapter, load_inplace=True))
        assert restored(second) == 0
        assert second.tokens == engine.own(prompt, lora=lora(adapter)).tokens != first
        again = engine.saved(prompt, lora=lora(adapter)).tokens
        answer = engine.ask(prompt, lora=lora(adapter))
        assert again == second.tokens == answer.tokens
        assert restored(answer) == 4 * CHUNK
        engine.evict()

        write_adapter(adapter, 3)  # retrained, and the engine is not told: it goes on with what it has loaded
        answer = engine.ask(prompt, lora=lora(adapter))
        assert answer.tokens == second.tokens
        engine.evict()
        third = engine.ask(prompt, lora=lora(adapter, load_inplace=True))
        assert restored(third) == 0, "saved for the new files by an engine that had the old ones loaded"
        assert third.tokens == engine.own(prompt, lora=lora(adapter)).tokens != second.tokens


@pytest.mark.usefixtures("_single_process_vllm")
def test_adapters_are_recomputed_with_their_own_weights(tmp_path, monkeypatch):
    """Two adapters and the base model, both ways at once and recomputed alone; beside a request of another adapter."""
    from cacheflow.vllm.models import partial_forward
    from support.connector_engine import random_tokens, serving_engine
    from support.vllm_models import write_model

    folder, prompt = write_model(tmp_path / "model", "qwen3"), random_tokens(6 * CHUNK + 20, seed=12)
    folders = [tmp_path / f"ad{number}" for number in (1, 2)]
    for seed, each in enumerate(folders):
        write_adapter(each, seed)
    requests = [None, *(lora(each, number=number) for number, each in enumerate(folders, 1))]
    options = {"store": "memory", "policy": "cake", "throttle_bytes_per_s": 1e8}
    with serving_engine(
        folder, dtype="bfloat16", chunk_tokens=CHUNK, options=options, enable_lora=True, max_lora_rank=8, max_loras=2
    ) as engine:
        saved = [engine.saved(prompt, lora=request) for request in requests]
        assert not (saved[0].kv == saved[1].kv).all()
        engine.balance_link(len(prompt))
        for request, own in zip(requests, saved, strict=True):
            other = engine.submit(random_tokens(40, seed=13), num_tokens=60, lora=requests[1])
            engine.run(until=lambda other=other: bool(engine.answers[other].tokens))
            again = engine.submit(prompt, lora=request)
            engine.run()
            record = engine.answers[again].record
            assert record["recomputed_cells"] > 0
            assert record["loaded_cells"] > 0
            assert (engine.answers[again].kv == own.kv).all()
            engine.evict()
        # Negative control: without the adapter's mapping the last batch's adapter is in the keys.
        engine.ask(random_tokens(40, seed=14), num_tokens=2, lora=requests[1])
        monkeypatch.setattr(partial_forward, "_adapter_set", lambda *_: contextlib.nullcontext())
        wrong = engine.ask(prompt, lora=requests[2])
        assert wrong.record["recomputed_cells"] > 0
        assert not (wrong.kv == saved[2].kv).all()


@pytest.mark.usefixtures("_single_process_vllm")
def test_an_adapter_without_room_is_loaded_and_said_in_one_line(tmp_path, caplog):
    """One slot, in use by a request of another adapter: nothing can be recomputed until that ends."""
    from support.connector_engine import random_tokens, serving_engine
    from support.vllm_models import write_model

    folder, prompt = write_model(tmp_path / "model", "llama"), random_tokens(6 * CHUNK + 20, seed=17)
    for number in (1, 2):
        write_adapter(tmp_path / f"ad{number}", number)
    first, second = (lora(tmp_path / f"ad{number}", number=number) for number in (1, 2))
    options = {"store": "memory", "policy": "cake", "throttle_bytes_per_s": 1e8}
    with serving_engine(
        folder, dtype="float32", chunk_tokens=CHUNK, options=options, enable_lora=True, max_lora_rank=8, max_loras=1
    ) as engine:
        own = engine.saved(prompt, lora=second)
        engine.balance_link(len(prompt))
        other = engine.submit(random_tokens(40, seed=18), num_tokens=60, lora=first)
        engine.run(until=lambda: bool(engine.answers[other].tokens))
        caplog.clear()
        again = engine.submit(prompt, lora=second)
        engine.run()
        assert engine.answers[again].tokens == own.tokens
        assert (engine.answers[again].kv == own.kv).all()
        said = [each for each in caplog.records if each.name.startswith("cacheflow")]
        (line,) = [each.message for each in said if "--max-loras" in each.message]
        assert re.search("vLLM computes the rest .*ad2 has no room beside those in use: raise --max-loras", line)
        assert not [each for each in said if each.exc_info]


@pytest.mark.usefixtures("_single_process_vllm")
def test_the_base_model_beside_an_adapter_leaves_nothing_wrong_in_the_store(tmp_path):
    """vLLM's kernels for the CPU compute it with the adapter: a mistake that must not outlive the request."""
    from support.connector_engine import random_tokens, serving_engine
    from support.vllm_models import write_model

    folder, prompt = write_model(tmp_path / "model", "llama"), random_tokens(3 * CHUNK + 20, seed=15)
    write_adapter(tmp_path / "ad", 1)
    with serving_engine(
        folder, dtype="float32", chunk_tokens=CHUNK, options={"store": "memory", "policy": "load"},
        enable_lora=True, max_lora_rank=8, max_loras=1, max_num_batched_tokens=2 * CHUNK,
    ) as engine:  # fmt: skip
        own = engine.own(prompt)
        other = engine.submit(random_tokens(40, seed=16), num_tokens=60, lora=lora(tmp_path / "ad"))
        engine.run(until=lambda: bool(engine.answers[other].tokens))
        beside = engine.submit(prompt)
        engine.run()
        leaks = not (engine.answers[beside].kv == own.kv).all()
        engine.evict()
        again = engine.ask(prompt)
        assert restored(again) == (0 if leaks else 3 * CHUNK)
        assert again.tokens == own.tokens
        engine.evict()
        again = engine.ask(prompt)
        assert restored(again) == 3 * CHUNK
        assert again.tokens == own.tokens
