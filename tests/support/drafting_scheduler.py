"""VLLM's own scheduler with CacheFlow's connector, and in the model's place a rule that says the next token.

A KV entry is the chain of all that was written before it in the same KV blocks, so a wrong token anywhere below it
shows. Drafts are right or wrong by chance. What is saved is compared with the chain of the tokens it is saved as.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from cacheflow.stores.keys import chain_hashes
from cacheflow.vllm.options import ConnectorOptions
from support.scheduler_cases import facts

BLOCK, CHUNK = 16, 32
MAX_TOKENS = 512
UNWRITTEN = 0


def next_token(tokens: list[int]) -> int:
    """The one right continuation."""
    return hash((len(tokens), *tokens[-5:])) % 40 + 2


def link(below: int, token: int) -> int:
    return hash((below, token)) or 1


@dataclass
class Running:
    """What the worker knows of a request: more than the scheduler where steps overlap."""

    tokens: list[int]
    num_computed: int


@dataclass
class DraftingEngine:
    """A scheduler, driven step by step.

    Attributes:
        scheduler: vLLM's, synchronous or not.
        luck: Share of drafts that are right.
        overlap: Steps that are scheduled before the first of them is told of its outcome.
    """

    scheduler: Any
    luck: float
    overlap: int
    rng: random.Random
    kv: dict[int, list[int]] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    saved: dict[str, list[int]] = field(default_factory=dict)
    final: dict[str, list[int]] = field(default_factory=dict)
    num_rejected: int = 0
    num_accepted: int = 0
    _under_way: deque = field(default_factory=deque)

    @property
    def connector(self) -> Any:
        return self.scheduler.connector

    def add(self, request: Any) -> None:
        self.scheduler.add_request(request)
        self.final[request.request_id] = request._all_token_ids  # noqa: SLF001 -- the list that grows; vLLM shows it in a view only

    def run(self, *, max_steps: int = 3000) -> None:
        """Step until every request has ended."""
        for _ in range(max_steps):
            if not self.scheduler.requests:
                return
            self.step()
        raise AssertionError(f"{len(self.scheduler.requests)} requests never ended")

    def step(self) -> None:
        """Schedule a step and run it; tell the scheduler of the oldest that is under way."""
        output = self.scheduler.schedule()
        sampled, drafts = self._forward(output)
        self._save(output)
        self._under_way.append((output, sampled, drafts))
        if len(self._under_way) >= self.overlap or not output.num_scheduled_tokens:
            while len(self._under_way) >= self.overlap:
                self._tell(*self._under_way.popleft())

    def _tell(self, output: Any, sampled: dict[str, list[int]], drafts: dict[str, list[int]]) -> None:
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

        names = list(sampled)
        answer = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
        )
        self.scheduler.update_from_output(output, answer)
        if self.overlap == 1:  # with overlap the worker keeps its drafts to itself
            self.scheduler.update_draft_token_ids(DraftTokenIds(list(drafts), list(drafts.values())))

    def _forward(self, output: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        self._take_in(output)
        sampled, drafts = {}, {}
        for name, count in output.num_scheduled_tokens.items():
            request, given = self.running[name], output.scheduled_spec_decode_tokens.get(name, [])
            # Where steps overlap the scheduler has only kept places for drafts, and the worker knows them.
            drafted = self._drafts(request, len(given)) if given[:1] == [-1] else given
            known = count - len(drafted)
            end = request.num_computed + known
            self._write(name, request.num_computed, [*request.tokens[request.num_computed : end], *drafted])
            request.num_computed = end
            sampled[name] = self._verify(request, drafted) if end == len(request.tokens) else []
            drafts[name] = self._drafts(request, self.rng.randint(0, self.scheduler.num_spec_tokens))
        return sampled, drafts

    def _take_in(self, output: Any) -> None:
        """Begin requests, and begin those anew that were preempted."""
        cached = output.scheduled_cached_reqs
        for new in output.scheduled_new_reqs:
            self.running[new.req_id] = Running(list(self.final[new.req_id]), new.num_computed_tokens)
        for name, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self.running[name] = Running(list(self.final[name]), num_computed)

    def _drafts(self, request: Running, count: int) -> list[int]:
        """What is drafted behind the newest token: each right or wrong by luck."""
        drafts: list[int] = []
        for _ in range(count):
            right = next_token([*request.tokens, *drafts])
            drafts.append(right if self.rng.random() < self.luck else 1)
        return drafts

    def _verify(self, request: Running, drafted: list[int]) -> list[int]:
        sampled = []
        for draft in drafted:
            sampled.append(next_token(request.tokens))
            request.tokens.append(sampled[-1])
            if sampled[-1] != draft:
                self.num_rejected += len(drafted) - len(sampled) + 1
                return sampled
            request.num_computed += 1
            self.num_accepted += 1
        sampled.append(next_token(request.tokens))
        request.tokens.append(sampled[-1])
        return sampled

    def _write(self, name: str, start: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, start):
            below = self._entry(name, position - 1) if position else UNWRITTEN
            block_ids = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            self.kv.setdefault(block_ids[position // BLOCK], [UNWRITTEN] * BLOCK)[position % BLOCK] = link(below, token)

    def _entry(self, name: str, position: int) -> int:
        return self.kv[self.scheduler.kv_cache_manager.get_block_ids(name)[0][position // BLOCK]][position % BLOCK]

    def _save(self, output: Any) -> None:
        """As the worker does: copy what is in the blocks when the step's forward is through."""
        for order in output.kv_connector_metadata.work.saves:
            entries = [entry for block in order.block_ids for entry in self.kv[block]]
            assert self.saved.setdefault(order.chain_hash, entries) == entries, "saved twice, with other KV"

    def wrong(self) -> list[str]:
        """Saves that are not the KV of any request's final tokens."""
        right: dict[str, list[int]] = {}
        for tokens in self.final.values():
            ends = list(range(CHUNK, len(tokens) + 1, CHUNK))
            chain, entries = UNWRITTEN, []
            for token in tokens:
                chain = link(chain, token)
                entries.append(chain)
            for end, chain_hash in zip(ends, chain_hashes(list(tokens), ends), strict=True):
                right[chain_hash.hex()] = entries[end - CHUNK : end]
        return [name for name, entries in self.saved.items() if right.get(name) != entries]


def drafting_engine(config: Any, *, seed: int, luck: float, overlap: int, num_blocks: int) -> DraftingEngine:
    """A fresh scheduler for an engine's configuration."""
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from cacheflow.vllm.connector import CacheFlowHandshake

    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=4, dtype=torch.bfloat16)
    caches = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layers.0"], spec)]
    )
    kind = Scheduler if overlap == 1 else AsyncScheduler
    scheduler = kind(
        vllm_config=config, kv_cache_config=caches, block_size=BLOCK, hash_block_size=BLOCK,
        structured_output_manager=StructuredOutputManager(config),
    )  # fmt: skip
    scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): CacheFlowHandshake(facts(block_size=BLOCK))})
    return DraftingEngine(scheduler, luck, overlap, random.Random(seed))


def drafting_config(folder: Any, *, num_drafts: int) -> Any:
    """VLLM's configuration of an engine that drafts, with CacheFlow's connector."""
    from vllm.engine.arg_utils import EngineArgs

    from cacheflow.vllm.plugin import register

    register()
    extra = {"chunk_tokens": CHUNK, "explain": True, "lookup_timeout_s": ConnectorOptions().lookup_timeout_s}
    transfer = {
        "kv_connector": "CacheFlowConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }  # fmt: skip
    speculative = {"method": "ngram", "num_speculative_tokens": num_drafts, "prompt_lookup_max": 3}
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, block_size=BLOCK, max_model_len=MAX_TOKENS,
        max_num_seqs=4, max_num_batched_tokens=64, enable_prefix_caching=True, kv_transfer_config=transfer,
        speculative_config=speculative,
    ).create_engine_config()  # fmt: skip


def make_request(name: str, tokens: list[int], *, num_tokens: int, salt: str | None = None) -> Any:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from vllm import SamplingParams

    init_none_hash(sha256)
    return Request(
        request_id=name, prompt_token_ids=tokens, pooling_params=None, cache_salt=salt,
        sampling_params=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )  # fmt: skip
