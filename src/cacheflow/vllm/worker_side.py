"""The worker side: obeys the step's orders on this rank, saves chunks, finds out at start what the engine can do."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from cacheflow.plan.grid import Tile
from cacheflow.restore.ports import ComputePort
from cacheflow.restore.step_executor import Ports, StepExecutor
from cacheflow.restore.work import RankReport, RestoreTarget, StepReport
from cacheflow.stores.base import Store
from cacheflow.vllm.adapters import LoadedAdapters
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.models.workers import worker_of
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.startup.find_engine import FoundEngine, find_engine
from cacheflow.vllm.step import ModelNews, StepWork
from cacheflow.vllm.worker.boundary import BoundaryCapture
from cacheflow.vllm.worker.model_state import ModelState
from cacheflow.vllm.worker.recompute import VllmComputePort
from cacheflow.vllm.worker.saver import ChunkSaver, MorePuts
from cacheflow.vllm.worker.stage_link import StageAnswers, StageLink, link_stages
from cacheflow.vllm.worker.transfer import BoundaryReads, VllmTransferPort, boundary_pool, staging_pool
from cacheflow.vllm.worker.weights_watch import watch_weights

logger = logging.getLogger(__name__)

NOTHING_DONE = RankReport()


class NoComputePort:
    """The compute side of an engine that only loads: it is never ordered to compute."""

    def recompute(self, tile: Tile, *, kv_only_top: bool) -> None:
        """Never called.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"an engine that only loads was ordered to recompute {tile}, keys only: {kv_only_top}")

    def restart(self, chunk: int) -> None:
        """Nothing to forget."""

    def run_suffix(self, block_lo: int, block_hi: int) -> None:
        """Never called: vLLM runs the new tokens."""
        raise ValueError(f"an engine that only loads was ordered to run blocks [{block_lo}, {block_hi})")

    def finish(self) -> None:
        """Nothing to wait for."""


class WorkerSide:
    """One rank of one engine; every method is called on the worker's main thread."""

    def __init__(self, options: ConnectorOptions, store: Store, vllm_config: Any, kv_cache_config: Any) -> None:  # noqa: ANN401
        """Wait for the KV caches."""
        self._options, self._store = options, store
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._engine: FoundEngine | None = None
        self._carrier = StepExecutor(self._ports, clock=time.perf_counter, make_answers=self._answers)
        self._saver: ChunkSaver | None = None
        self._capture: BoundaryCapture | None = None
        self._link: StageLink | None = None
        self._model_state: ModelState | None = None
        self._request_of: dict[int, str] = {}
        self._report = NOTHING_DONE
        self._failed_blocks: set[int] = set()
        self.counts = Counts()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Note where the KV blocks are."""
        self._kv_caches = kv_caches

    def find_facts(self) -> EngineFacts:
        """Check the model, test restoration and measure costs, before the first request; later what was found then.

        Raises:
            UnsupportedModelError: The model cannot be recomputed and the user did not ask for ``load_only``.
            SelfTestError: Restored KV differs from the engine's own.
            ConfigError: The KV cache is laid out in a way CacheFlow does not know.
        """
        if self._engine is not None:
            return self._engine.facts
        # Before the weights' fingerprint is taken: what changes from now on is noticed.
        runner = worker_of(self._vllm_config).model_runner
        watch, adapters = watch_weights(runner), LoadedAdapters(runner)
        watch.check()
        engine = find_engine(self._options, self._store, self._vllm_config, self._kv_cache_config, self._kv_caches)
        facts = engine.facts
        self._engine = engine
        self._link = link_stages(engine.handle)
        self._model_state = ModelState(rank=facts.rank, block_size=facts.block_size, weights=watch, adapters=adapters)
        self._pool = staging_pool(
            engine.layout, chunk_tokens=self._options.chunk_tokens, layers_per_block=facts.layers_per_block
        )
        self._boundary_pool = boundary_pool(
            token_bytes=facts.boundary_token_bytes, chunk_tokens=self._options.chunk_tokens
        )
        self._saver = ChunkSaver(
            self._store,
            engine.layout,
            layers_per_block=facts.layers_per_block,
            keys=facts.keys,
            counts=self.counts,
            more=self._start_capturing(engine),
        )
        return facts

    def _start_capturing(self, engine: FoundEngine) -> MorePuts | None:
        """On later stages that store boundary states; of tensor-parallel ranks, which all have them, on the first."""
        if self._options.save and engine.facts.boundary_token_bytes and engine.handle.shard.tp_rank == 0:
            self._capture = BoundaryCapture(
                engine.handle,
                chunk_tokens=self._options.chunk_tokens,
                batch_tokens=self._vllm_config.scheduler_config.max_num_batched_tokens,
                counts=self.counts,
            )
            return self._capture.put
        return None

    def expect(self, orders: StepWork) -> None:
        """Get ready for the forward that is about to run, and keep boundary states of it; call before every forward."""
        if self._model_state is not None:
            self._model_state.begin_step(orders)
        if self._capture is not None:
            self._capture.expect(orders.captures)

    def forget(self, request_ids: set[str]) -> None:
        """Drop what was kept of requests that ended."""
        if self._capture is not None:
            self._capture.forget(request_ids)

    def _ports(self, target: RestoreTarget) -> Ports:
        engine = self._engine
        assert engine is not None, "orders come after the facts were found"
        engine.layout.fence()
        compute: ComputePort = NoComputePort()
        if engine.forward is not None:
            compute = VllmComputePort(engine.forward, target, link=self._link)
        transfer = VllmTransferPort(
            self._store,
            engine.layout,
            target,
            pool=self._pool,
            keys=engine.facts.keys,
            boundaries=self._boundary_reads(compute),
        )
        return compute, transfer

    def _answers(self, target: RestoreTarget) -> StageAnswers | None:
        return None if self._link is None else StageAnswers(self._link, target)

    def _boundary_reads(self, compute: ComputePort) -> BoundaryReads | None:
        assert self._engine is not None, "orders come after the facts were found"
        token_bytes = self._engine.facts.boundary_token_bytes
        if not token_bytes or not isinstance(compute, VllmComputePort):
            return None
        return BoundaryReads(pool=self._boundary_pool, token_bytes=token_bytes, give=compute.give)

    def carry_out(self, orders: StepWork) -> None:
        """Begin, drop, read, receive, recompute, finish: as ordered; call behind the forward."""
        if self._capture is not None:
            self._capture.forward_ended()
        if orders.idle:
            return
        if self._link is not None:
            self._link.begin_step()
        for target in orders.targets:
            self._request_of[target.restore_id] = target.request_id
            self._copy_shared(target)
            self._state.begin(target, orders)
            self._carrier.begin(target)
        for block_ids in orders.failed_blocks.values():
            self._failed_blocks.update(block_ids)
        stage = self._engine.handle.shard.pp_rank if self._engine is not None else 0
        self._carrier.carry_out(orders.of_stage(stage), wait_s=orders.wait_s)

    def _copy_shared(self, target: RestoreTarget) -> None:
        """Copy what another restoration has brought; its blocks are held at least until the end of this step."""
        if target.copied_from:
            assert self._engine is not None, "orders come after the facts were found"
            end = target.start // self._engine.facts.block_size
            self._engine.layout.copy(target.copied_from, target.block_ids[end - len(target.copied_from) : end])

    def save(self, orders: StepWork) -> None:
        """Copy the chunks that this step's forward completed, unless weights or adapters have changed since."""
        if self._saver is not None:
            self._saver.save(self._state.may_save(orders))

    def take_finished(self) -> set[str]:
        """Requests whose restoration ended since the last call; vLLM asks this before it asks for the report."""
        report = self._carrier.take_report()
        self._report = report
        if report.finished:
            self._failed_blocks.update(self._state.end(report.finished))
        return {self._request_of.pop(restore_id) for restore_id in report.finished}

    def take_report(self) -> StepReport | None:
        """What was done up to the last ``take_finished``; None when nothing was."""
        report, self._report = self._report, NOTHING_DONE
        if self._engine is None or report.idle:
            return None
        return StepReport({self._engine.facts.rank: report})

    def take_news(self) -> tuple[int, ModelNews] | None:
        """This rank's number and what has become of its weights and adapters; None when there is nothing to tell."""
        if self._engine is None:
            return None
        news = self._state.take_news()
        return None if news.idle else (self._engine.facts.rank, news)

    def take_failed_blocks(self) -> set[int]:
        """KV blocks whose content is undefined, of restorations that ended since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    @property
    def _state(self) -> ModelState:
        assert self._model_state is not None, "orders come after the facts were found"
        return self._model_state

    def close(self) -> None:
        """End the threads; nothing touches the KV blocks any more."""
        self._carrier.close()
        if self._saver is not None:
            self._saver.close()
        if self._capture is not None:
            self._capture.close()
