"""What a connector has before the workers' facts are known, and how the side that serves is made of it.

vLLM hands the KV caches over, asks the workers for a handshake and gives that to the scheduler, all before the first
request. From then on a connector has a ``SchedulerSide`` or a ``WorkerSide``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cacheflow.stores.base import Store
from cacheflow.tensors.pinned_memory import PinnedMemory
from cacheflow.tensors.snapshot_room import SnapshotRoom
from cacheflow.vllm.adapters import LoadedAdapters
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.models.workers import worker_of
from cacheflow.vllm.options import ServingOptions
from cacheflow.vllm.scheduler.side import SchedulerSide
from cacheflow.vllm.startup.find_engine import find_engine
from cacheflow.vllm.worker.boundary import BoundaryCapture
from cacheflow.vllm.worker.model_state import ModelState
from cacheflow.vllm.worker.saver import snapshot_room
from cacheflow.vllm.worker.side import FoundEngine, WorkerSide
from cacheflow.vllm.worker.weights_watch import watch_weights


@dataclass(slots=True, kw_only=True)
class Starting:
    """What a side is made of.

    Attributes:
        options: The connector's.
        store: The engine's.
        vllm_config: vLLM's ``VllmConfig``.
        kv_cache_config: vLLM's ``KVCacheConfig``.
        kv_caches: The tensors that vLLM registered, by layer; empty on the scheduler's connector.
        counts: A worker side goes on with them.
    """

    options: ServingOptions
    store: Store
    vllm_config: Any
    kv_cache_config: Any
    kv_caches: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def scheduler(self, facts_by_rank: Sequence[EngineFacts]) -> SchedulerSide:
        """The scheduler side, given what every worker found out."""
        return SchedulerSide(self.options, self.store, facts_by_rank, clock=time.perf_counter)

    def worker(self) -> WorkerSide:
        """This rank's worker side: checks the model, tests restoration and measures costs.

        Raises:
            UnsupportedModelError: The model cannot be recomputed and the user did not ask for ``load_only``.
            SelfTestError: Restored KV differs from the engine's own.
            ConfigError: The KV cache is laid out in a way CacheFlow does not know, or the GPU has no memory left.
        """
        # Before the weights' fingerprint is taken: what changes from now on is noticed.
        runner = worker_of(self.vllm_config).model_runner
        weights, adapters = watch_weights(runner), LoadedAdapters(runner)
        weights.check()
        engine = find_engine(self.options, self.store, self.vllm_config, self.kv_cache_config, self.kv_caches)
        facts, lane = engine.facts, engine.layout.lane
        if lane is not None:
            self.store.lend_to(PinnedMemory(lane.streams))
        return WorkerSide(
            self.store,
            engine,
            ModelState(rank=facts.rank, block_size=facts.block_size, weights=weights, adapters=adapters),
            chunk_tokens=self.options.chunk_tokens,
            capture=self._capture(engine),
            room=self._room(engine),
            counts=self.counts,
        )

    def _room(self, engine: FoundEngine) -> SnapshotRoom | None:
        """On CUDA, of ranks that save."""
        if not (self.options.save and engine.facts.keys.writes):
            return None
        return snapshot_room(
            engine.layout,
            engine.states,
            chunk_tokens=self.options.chunk_tokens,
            batch_tokens=self.vllm_config.scheduler_config.max_num_batched_tokens,
        )

    def _capture(self, engine: FoundEngine) -> BoundaryCapture | None:
        """On later stages that store boundary states; of tensor-parallel ranks, which all have them, on the first."""
        if not (self.options.save and engine.facts.boundary_token_bytes and engine.handle.shard.tp_rank == 0):
            return None
        return BoundaryCapture(
            engine.handle,
            chunk_tokens=self.options.chunk_tokens,
            batch_tokens=self.vllm_config.scheduler_config.max_num_batched_tokens,
            counts=self.counts,
        )

    def close(self) -> None:
        """No thread has been started."""
