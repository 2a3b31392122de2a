"""The worker side: does on this rank what the scheduler side decided for a step, and saves chunks."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from cacheflow.restore.ports import ComputePort
from cacheflow.restore.step_executor import Ports, StepExecutor
from cacheflow.restore.work import RankReport, RestoreTarget, StepReport
from cacheflow.stores.base import Store
from cacheflow.tensors.snapshot_room import SnapshotRoom
from cacheflow.vllm.adapters import Adapter
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.metrics import Counts
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.step import KeepWork, ModelNews, StepWork
from cacheflow.vllm.worker.boundary import BoundaryCapture
from cacheflow.vllm.worker.checkpoint import Checkpoint
from cacheflow.vllm.worker.keeper import PrefixKeeper
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.model_state import ModelState
from cacheflow.vllm.worker.prefetch import PrefixPrefetch
from cacheflow.vllm.worker.recompute import NoComputePort, VllmComputePort
from cacheflow.vllm.worker.saver import ChunkSaver
from cacheflow.vllm.worker.stage_link import StageAnswers, link_stages
from cacheflow.vllm.worker.state_blocks import StateBlocks
from cacheflow.vllm.worker.transfer import BoundaryReads, VllmTransferPort, boundary_pool, staging_pool

NOTHING_DONE = RankReport()


@dataclass(frozen=True, slots=True, eq=False)
class FoundEngine:
    """One rank's engine, checked and measured.

    Attributes:
        handle: The model.
        layout: Its KV blocks.
        states: The running states of its recurrent layers; None of a model without any.
        forward: Recomputes; None in an engine that only loads.
        facts: What the scheduler side needs to know.
    """

    handle: ModelHandle
    layout: BlockLayout
    states: StateBlocks | None
    forward: PartialForward | None
    facts: EngineFacts


class WorkerSide:
    """One rank of one engine; every method is called on the worker's main thread.

    Attributes:
        store: Restorations that begin read from it.
        saver: Writes chunks to the store.
        counts: What this rank counted since they were last taken.
    """

    def __init__(  # noqa: PLR0913 -- one worker's, keyword-only but for the first three
        self,
        store: Store,
        engine: FoundEngine,
        state: ModelState,
        *,
        chunk_tokens: int,
        capture: BoundaryCapture | None,
        room: SnapshotRoom | None,
        counts: Counts,
    ) -> None:
        """Serve what start-up found.

        ``capture`` is None where this rank saves no boundary states, ``room`` where it takes no snapshots of chunks.
        """
        facts = engine.facts
        self.store, self._engine, self._state, self._capture = store, engine, state, capture
        self.counts = counts
        self._has_tiers = bool(store.stats().tiers)
        self._link = link_stages(engine.handle)
        self._pool = staging_pool(
            engine.layout, engine.states, chunk_tokens=chunk_tokens, layers_per_block=facts.layers_per_block
        )
        self._boundary_pool = boundary_pool(
            engine.layout, token_bytes=facts.boundary_token_bytes, chunk_tokens=chunk_tokens
        )
        self.saver = ChunkSaver(
            store,
            engine.layout,
            layers_per_block=facts.layers_per_block,
            keys=facts.keys,
            counts=counts,
            states=engine.states,
            more=None if capture is None else capture.put,
            room=room,
        )
        self._prefetch = PrefixPrefetch(store, facts, engine.layout, engine.states, chunk_tokens=chunk_tokens)
        self._keeper, self._keeps = PrefixKeeper(store), list[KeepWork]()
        self._executor = StepExecutor(self._ports, clock=time.perf_counter, make_answers=self._answers)
        self._request_of: dict[int, str] = {}
        self._adapter_of: dict[int, Adapter] = {}
        self._report = NOTHING_DONE
        self._failed_blocks: set[int] = set()
        self._failing: set[int] = set()
        self._failed_requests: set[str] = set()

    def note_tiers(self) -> None:
        """Count what happened to the tiers of the store since the last call."""
        if self._has_tiers:
            stats = self.store.stats()
            self.counts.note_tiers(stats.tiers)
            self.counts.note_prefetches(stats.prefetches)

    @property
    def facts(self) -> EngineFacts:
        """What the scheduler side needs to know."""
        return self._engine.facts

    @property
    def drafts(self) -> bool:
        """Whether what is saved of a step holds what a drafter writes after the forward."""
        return self._engine.handle.num_drafter_layers > 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left of any restoration."""
        return self._executor.idle and not (self._request_of or self._failed_blocks)

    def expect(self, work: StepWork) -> None:
        """Get ready for the forward that is about to run, and keep boundary states of it; call before every forward."""
        self._state.begin_step(work)
        self._keeps += work.keeps
        for tenant, chain_hashes in work.claims.items():
            self.store.claim(chain_hashes, tenant=tenant)
        for prefetch in work.prefetches:
            self._prefetch.carry_out(prefetch)
        if self._capture is not None:
            self._capture.expect(work.captures)

    def forget(self, request_ids: set[str]) -> None:
        """Drop what was kept of requests that ended, but their last running states, which are written.

        Prefixes of such requests that are to be kept are pinned, once all of theirs is written.
        """
        self.saver.write_kept(request_ids)
        keeps, self._keeps = self._keeps, []
        for keep in keeps:
            self._keeper.carry_out(keep, written=self.saver.writes_under_way())
        outcomes = self._keeper.take_outcomes()
        if self.facts.rank == 0:  # each rank pins the objects of all
            self.counts.kept.update(outcomes)
        if self._capture is not None:
            self._capture.forget(request_ids)

    def _ports(self, target: RestoreTarget) -> Ports:
        engine = self._engine
        checkpoint = None if engine.states is None else Checkpoint(engine.states, target.state_blocks)
        compute: ComputePort = NoComputePort(checkpoint)
        boundaries = None
        if engine.forward is not None:
            adapter = self._adapter_of.get(target.restore_id)
            compute = recomputing = VllmComputePort(
                engine.forward, target, link=self._link, adapter=adapter, checkpoint=checkpoint
            )
            if token_bytes := engine.facts.boundary_token_bytes:
                boundaries = BoundaryReads(pool=self._boundary_pool, token_bytes=token_bytes, give=recomputing.give)
        transfer = VllmTransferPort(
            self.store,
            engine.layout,
            target,
            pool=self._pool,
            fence=engine.layout.fence(),
            keys=engine.facts.keys,
            boundaries=boundaries,
            checkpoint=checkpoint,
        )
        return compute, transfer

    def _answers(self, target: RestoreTarget) -> StageAnswers | None:
        return None if self._link is None else StageAnswers(self._link, target)

    def carry_out(self, work: StepWork) -> None:
        """Begin, drop, read, receive, recompute, finish; call after the forward."""
        if self._capture is not None:
            self._capture.forward_ended()
        if work.idle_after_forward:
            return
        if self._link is not None:
            self._link.begin_step()
        for target in work.targets:
            self._request_of[target.restore_id] = target.request_id
            version = work.adapters.get(target.restore_id)
            if version is not None and version.adapter is not None:
                self._adapter_of[target.restore_id] = version.adapter
            self._copy_shared(target)
            if target.start_states:
                assert self._engine.states is not None, "running states are copied of models that have any"
                self._engine.states.copy(target.start_states, target.state_blocks)
            self._state.begin(target, work)
            self._executor.begin(target)
        for restore_id, block_ids in work.failed_blocks.items():
            self._failed_blocks.update(block_ids)
            self._failing.add(restore_id)
        self._executor.carry_out(work.of_stage(self._engine.handle.shard.pp_rank), wait_s=work.wait_s)

    def _copy_shared(self, target: RestoreTarget) -> None:
        """Copy what another restoration has restored; its blocks are held at least until the end of this step."""
        if target.copied_from:
            end = target.start // self._engine.facts.block_size
            self._engine.layout.copy(target.copied_from, target.block_ids[end - len(target.copied_from) : end])

    def save(self, work: StepWork) -> None:
        """Copy the chunks that this step's forward completed, unless weights or adapters have changed since."""
        may_save = self._state.may_save(work)
        if self._engine.facts.keys.writes:
            self.saver.save(may_save)
        self.saver.write_kept(work.preempted)

    def take_finished(self) -> set[str]:
        """Requests whose restoration ended since the last call; vLLM asks this before it asks for the report."""
        self._report = report = self._executor.take_report()
        if report.finished:
            self._engine.layout.see_placed()  # also of what was given up: its blocks are others' from now on
            refused = self._state.end(report.finished)
            self._failed_blocks.update(itertools.chain(*refused.values()))
            failing = self._failing.intersection(report.finished).union(refused)
            self._failing -= failing
            self._failed_requests.update(self._request_of[restore_id] for restore_id in failing)
            for restore_id in report.finished:
                self._adapter_of.pop(restore_id, None)
        return {self._request_of.pop(restore_id) for restore_id in report.finished}

    def take_report(self) -> StepReport | None:
        """What was done up to the last ``take_finished``; None when nothing was."""
        report, self._report = self._report, NOTHING_DONE
        return None if report.idle else StepReport({self.facts.rank: report})

    def take_news(self) -> tuple[int, ModelNews] | None:
        """This rank's number and what has become of its weights and adapters; None when there is nothing to tell."""
        news = self._state.take_news()
        return None if news.idle else (self.facts.rank, news)

    def take_failed_blocks(self) -> set[int]:
        """KV blocks whose content is undefined, of restorations that ended since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Requests whose restoration ended without all that was promised, since the last call."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def close(self) -> None:
        """End the threads; nothing touches the KV blocks any more."""
        self._executor.close()
        self.saver.close()
        self._keeper.close()
        self._prefetch.close()
        if self._capture is not None:
            self._capture.close()
