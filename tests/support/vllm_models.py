"""Tiny models in an in-process vLLM engine on the CPU, and the KV that the engine's own prefill leaves behind."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support import kv_bytes
from support.garbage import uncollected
from support.random_weights import slow_decay

TINY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
NUM_KV_BLOCKS = 64
"""Far fewer than vLLM would make room for: tests fill them all."""
TINY_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
POISON = 0xFF


def write_model(folder: Path, family: str, *, seed: int = 0, **overrides) -> Path:
    """A tiny model of a family that transformers knows."""
    from transformers import AutoConfig

    extra = TINY_MOE if family == "qwen3_moe" else {}
    return write_weights(folder, AutoConfig.for_model(family, **{**TINY, **extra, **overrides}), seed=seed)


def attention_of(folder: Path | str) -> dict:
    """The attention that an engine on these weights is given: of latents the one that all CPUs have.

    On CPUs with AMX vLLM takes another, for bfloat16 and blocks of 32 tokens alone.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    return {"attention_backend": "CPU_MLA"} if "kv_lora_rank" in config.get("text_config", config) else {}


def write_weights(folder: Path, config: object, *, seed: int = 0) -> Path:
    """Random weights whose attention is far from uniform: near-uniform attention would hide errors."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("A_log"):
                weight.copy_(slow_decay(weight.shape, generator))
            elif "norm" in name:
                weight.copy_((1.6 if "q_norm" in name or "k_norm" in name else 1.0) + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                gain = 1.8 if any(part in name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj")) else 1.0
                weight.copy_(noise * gain / (1 if "embed" in name else weight.shape[-1] ** 0.5))
    module.save_pretrained(folder)
    return folder


@dataclass
class TinyEngine:
    """An engine that has served nothing but what the tests ask for."""

    llm: object
    handle: object
    layout: object
    num_requests: int = field(default=0)

    @property
    def core(self):
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def size(self) -> int:
        return self.layout.block_size

    def tokens(self, count: int, *, seed: int = 3) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, TINY["vocab_size"], (count,), generator=generator).tolist()

    def prefill(self, tokens: list[int], *, chunk_tokens: int) -> np.ndarray:
        """Have vLLM prefill in chunks; returns KV bytes ``[L, blocks, P]`` of the prompt's whole blocks."""
        from vllm import SamplingParams

        self.core.scheduler.max_num_scheduled_tokens = chunk_tokens
        self.num_requests += 1
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
        engine = self.llm.llm_engine
        request_id = engine.add_request(str(self.num_requests), {"prompt_token_ids": tokens}, params)
        request_id = request_id or str(self.num_requests)
        while not any(output.outputs[0].token_ids for output in engine.step()):
            pass
        (internal_id,) = self.core.scheduler.requests
        block_ids = list(self.core.scheduler.kv_cache_manager.get_block_ids(internal_id)[0])
        kv = self.gather(block_ids[: len(tokens) // self.size])
        while engine.has_unfinished_requests():
            engine.step()
        return kv

    def gather(self, block_ids: list[int]) -> np.ndarray:
        return kv_bytes.gather(self.layout, block_ids)

    def place(self, kv: np.ndarray, block_ids: list[int], *, layers: tuple[int, int], blocks: tuple[int, int]) -> None:
        """Put part of ``kv`` where it belongs, as a load would."""
        kv_bytes.scatter(self.layout, kv[:, slice(*blocks)], block_ids[slice(*blocks)], layers=layers)

    def poisoned(self, count: int, *, skip: int = 0) -> list[int]:
        """Blocks at the end of the KV cache, in descending order, full of NaN."""
        last = self.layout.num_blocks - skip
        block_ids = list(range(last - 1, last - 1 - count, -1))
        kv_bytes.fill(self.layout, block_ids, POISON)
        return block_ids

    def differing(self, kv: np.ndarray, block_ids: list[int]) -> float:
        """Share of bytes in which blocks differ from ``kv``."""
        return float((self.gather(block_ids) != kv).mean())


@contextmanager
def tiny_engine(folder: Path, *, dtype: str, **overrides):
    """Start an engine on a model folder and open it as the connector would; nothing is left of it afterwards."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from cacheflow.vllm.models.model_access import open_model
    from cacheflow.vllm.plugin import remember
    from cacheflow.vllm.worker.layout import BlockLayout
    from vllm import LLM

    with uncollected():
        llm = LLM(
            model=str(folder), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=2048,
            max_num_batched_tokens=512, max_num_seqs=4, enable_prefix_caching=False, seed=0,
            num_gpu_blocks_override=NUM_KV_BLOCKS, **attention_of(folder), **overrides,
        )  # fmt: skip
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    remember(worker)
    runner = worker.model_runner
    handle = open_model(worker.vllm_config, runner.kv_cache_config)
    context = worker.vllm_config.compilation_config.static_forward_context
    caches = {name: context[name].kv_cache for name in handle.layer_names}
    layout = BlockLayout.from_kv_caches(caches, runner.kv_cache_config, layer_names=handle.layer_names)
    try:
        yield TinyEngine(llm, handle, layout)
    finally:
        with uncollected() as collect:
            core.shutdown()
            cleanup_dist_env_and_memory()
            del llm, core, worker, runner, handle, context, caches, layout
            collect()
