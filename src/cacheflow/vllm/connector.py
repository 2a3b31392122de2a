"""The connector vLLM loads: translates vLLM's calls for the scheduler side and the worker side, and nothing else.

``--kv-transfer-config '{"kv_connector": "CacheFlowConnector", "kv_connector_module_path": "cacheflow.vllm.connector",
"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'``
"""

# ruff: noqa: ANN401 -- vLLM's objects: its types are not seen where CacheFlow is checked

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from cacheflow.errors import ConfigError
from cacheflow.restore.work import StepReport
from cacheflow.vllm.child_handshakes import keep_handshakes_apart
from cacheflow.vllm.compat import check_version
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.last_line import log_beside_vllm, reason_left
from cacheflow.vllm.models.kv_groups import KvGroups
from cacheflow.vllm.models.refusals import load_refusals, require_loadable
from cacheflow.vllm.models.workers import worker_of
from cacheflow.vllm.options import DEFAULT_CHUNK_TOKENS, ConnectorOptions
from cacheflow.vllm.plugin import register
from cacheflow.vllm.prometheus import CacheFlowPromMetrics, CacheFlowStats
from cacheflow.vllm.scheduler.side import SchedulerSide
from cacheflow.vllm.scheduler.view import NO_STATES, RequestView, ScheduledRequest, TargetStates
from cacheflow.vllm.starting import Starting
from cacheflow.vllm.startup.open_store import acquire_store, release_store
from cacheflow.vllm.step import NOTHING, ModelNews, StepWork
from cacheflow.vllm.worker.side import WorkerSide

logger = logging.getLogger(__name__)

register()  # for a checkout on PYTHONPATH, whose entry point vLLM cannot see; does nothing the second time
keep_handshakes_apart()


@dataclass
class CacheFlowMetadata(KVConnectorMetadata):
    """Scheduler to worker, every step.

    Attributes:
        work: What to do.
        loads_first: Another connector loads for this very forward, so vLLM calls ``start_load_kv`` before it.
    """

    work: StepWork
    loads_first: bool = False


@dataclass
class CacheFlowWorkerMetadata(KVConnectorWorkerMetadata):
    """Worker to scheduler, in steps that have something to report.

    Attributes:
        report: What came of the work.
        news: What became of the weights and adapters, by rank.
    """

    report: StepReport
    news: Mapping[int, ModelNews] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> CacheFlowWorkerMetadata:
        """Reports of several ranks as one."""
        assert isinstance(other, CacheFlowWorkerMetadata)
        return CacheFlowWorkerMetadata(self.report.merged(other.report), {**self.news, **other.news})


@dataclass
class CacheFlowHandshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler at start, and again whenever vLLM has slept."""

    facts: EngineFacts
    alone: bool = False
    """Whether no other connector serves the engine."""


class CacheFlowConnector(KVConnectorBase_V1):
    """Restores evicted prefixes by recomputing and loading at once; see ``docs/vllm.md``.

    Alone or as a child of vLLM's ``MultiConnector``; also as a base class in a module of the user's.

    vLLM makes one for its scheduler and one in each worker. Each hands vLLM's calls on: at first to ``Starting``, then
    to the ``SchedulerSide`` or the ``WorkerSide`` that comes of it.
    """

    _alone = False
    """Whether no other connector serves the engine; the scheduler's learns it by the handshake."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a subclass known by its name: a ``MultiConnector`` looks its children up by it for statistics."""
        super().__init_subclass__(**kwargs)
        with contextlib.suppress(ValueError):  # the name is taken: by ours, which reads the same statistics
            KVConnectorFactory.register_connector(cls.__name__, cls.__module__, cls.__name__)

    @reason_left()
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Check the configuration and open the store.

        Raises:
            ConfigError: An option is unknown or out of range, or the engine is configured in a way CacheFlow cannot
                serve; the message says what to change.
            StoreError: The store cannot be opened.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        asked = ConnectorOptions.parse(transfer.kv_connector_extra_config)
        if role is KVConnectorRole.WORKER:  # which vLLM makes first
            of_engine = worker_of(vllm_config).vllm_config.kv_transfer_config
            _check_transfer(of_engine)
            self._alone = issubclass(KVConnectorFactory.get_connector_class(of_engine), CacheFlowConnector)
        log_beside_vllm()
        check_version()
        require_loadable(load_refusals(vllm_config, kv_cache_config))
        self._groups = KvGroups.of(kv_cache_config)
        options = asked.for_engine(self._default_chunk_tokens)
        options.require_chunk_in_prompt(int(vllm_config.model_config.max_model_len))
        options.require_reachable_store(str(vllm_config.parallel_config.distributed_executor_backend))
        options.require_block_size(self._groups.block_size)
        self._engine_id = str(transfer.engine_id)
        store = acquire_store(self._engine_id, options)
        self.begin(Starting(options=options, store=store, vllm_config=vllm_config, kv_cache_config=kv_cache_config))

    def begin(self, starting: Starting) -> None:
        """Serve, from the handshake on, with the side that ``starting`` makes of what the workers found out.

        The constructor calls it. To start anew with other options or another store, close the side that served before.
        """
        self._side: Starting | SchedulerSide | WorkerSide = starting
        self._to_carry_out: StepWork | None = None
        self._to_save: StepWork | None = None

    @property
    def _default_chunk_tokens(self) -> int:
        """Tokens of a chunk where none were asked for."""
        return DEFAULT_CHUNK_TOKENS

    # Scheduler side

    @property
    def requires_kv_delivery(self) -> bool:
        """A lost save is a later miss, never a wrong answer."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any = None) -> bool:
        """No: reads under way write into KV blocks, which must stay where they are.

        vLLM 0.33 asks the class before it starts an engine with ``--enable-sleep-mode``; 0.32 does not ask.
        """
        return False

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        """Take in what the workers found out at start; when vLLM repeats it after it has slept, nothing changes.

        Raises:
            ConfigError: No worker of CacheFlow's is among those that handed something over.
        """
        ours = [each for _, each in sorted(metadata.items()) if isinstance(each, CacheFlowHandshake)]
        if not ours:
            raise ConfigError(
                f"none of {len(metadata)} workers handed over what CacheFlow found out at start: without that nothing "
                "is restored. Another connector stands between them that passes on its own handshake only"
            )
        if isinstance(self._side, Starting):
            self._side = self._side.scheduler([each.facts for each in ours])
            self._alone = all(each.alone for each in ours)

    def on_new_request(self, request: Any) -> None:
        """Start the lookup as soon as a request arrives."""
        self.scheduler_side.new_request(RequestView.of(request))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens to restore beyond vLLM's own prefix cache."""
        scheduler = self.scheduler_side
        if not scheduler.knows(request.request_id):  # where vLLM has no on_new_request
            scheduler.new_request(RequestView.of(request))
        matched = scheduler.num_matched(
            request.request_id,
            num_computed_tokens,
            num_preemptions=request.num_preemptions,
            has_start_states=self._has_start_states(request, num_computed_tokens),
        )
        return matched, bool(matched)

    def _has_start_states(self, request: Any, num_computed_tokens: int) -> bool:
        """Whether recurrent layers can go on after so many tokens; a model without any needs nothing for it."""
        return True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Begin the restoration vLLM has set blocks aside for; none where another connector brings the prefix."""
        if num_external_tokens:
            kv_blocks = self._groups.kv_blocks(blocks.get_block_ids())
            end = len(kv_blocks) * self._groups.block_size
            states = self._target_states(request.request_id, blocks, end)
            self.scheduler_side.allocated(request.request_id, kv_blocks, num_external_tokens, states)
        else:
            self.scheduler_side.passed_over(request.request_id, num_loaded=self._num_loaded(request))

    def _num_loaded(self, request: Any) -> int | None:
        """Tokens that another connector loads for a request; None where vLLM does not say.

        It counts them until the request has its first token, and no more once it was preempted: the number stays then.
        """
        if self._alone or request.skip_reading_prefix_cache:
            return 0
        stats = request.prefill_stats
        return None if stats is None or request.num_preemptions else int(stats.num_external_cached_tokens)

    def _target_states(self, request_id: str, blocks: Any, end: int) -> TargetStates:
        """Where the running states of a request stand whose blocks were set aside up to token ``end``."""
        return NO_STATES

    def build_connector_meta(self, scheduler_output: Any) -> CacheFlowMetadata:
        """This step's work for the workers."""
        groups = self._groups
        work = self.scheduler_side.step(
            ScheduledRequest.of_step(scheduler_output),
            lambda name: groups.kv_blocks(self._block_ids(scheduler_output, name)),
            num_scheduled_tokens=scheduler_output.total_num_scheduled_tokens,
            state_blocks_of=lambda name, end: groups.state_blocks(self._block_ids(scheduler_output, name), end),
            preempted=sorted(scheduler_output.preempted_req_ids or ()),
        )
        return CacheFlowMetadata(work, loads_first=scheduler_output.has_sync_kv_loads)

    def _block_ids(self, scheduler_output: Any, request_id: str) -> tuple[list[int], ...]:
        """A request's blocks by KV cache group."""
        state = getattr(scheduler_output, "kv_connector_block_state", None)
        block_ids = state.get_block_ids(request_id) if state is not None else None
        if block_ids is None:
            assert self._kv_cache_manager is not None, "vLLM binds its cache manager before the first step"
            block_ids = self._kv_cache_manager.get_block_ids(request_id)
        return tuple(block_ids)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in what the workers did."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, CacheFlowWorkerMetadata):
            self.scheduler_side.take_news(meta.news)
            self.scheduler_side.take_report(meta.report)
        if connector_output.invalid_block_ids:
            self.scheduler_side.load_failed()

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Learn whenever vLLM empties its own prefix cache, which after a change of weights may hold old KV."""
        super().bind_kv_cache_manager(kv_cache_manager)
        reset = kv_cache_manager.reset_prefix_cache

        def reporting() -> bool:
            was_reset = bool(reset())
            if was_reset and isinstance(self._side, SchedulerSide):
                self._side.local_cache_was_reset()
            return was_reset

        kv_cache_manager.reset_prefix_cache = reporting

    def reset_cache(self) -> bool:
        """Restore nothing that was saved so far; what others share in the store stays."""
        if isinstance(self._side, SchedulerSide):
            self._side.reset()
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; vLLM keeps the blocks of one that is being restored until the worker has finished."""
        return False, self.scheduler_side.finished(request.request_id)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn where the KV blocks are."""
        if isinstance(self._side, Starting):
            self._side.kv_caches = kv_caches

    @reason_left()
    def get_handshake_metadata(self) -> CacheFlowHandshake:
        """Self-test and calibration, before the first request; what they found when vLLM asks again."""
        if isinstance(self._side, Starting):
            self._side = self._side.worker()
        return CacheFlowHandshake(self.worker_side.facts, alone=self._alone)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take this step's work; vLLM calls it right before the forward."""
        super().bind_connector_metadata(connector_metadata)
        work = connector_metadata.work if isinstance(connector_metadata, CacheFlowMetadata) else NOTHING
        self._to_carry_out = self._to_save = work
        self.worker_side.expect(work)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do this step's work; vLLM calls it every step, after the forward unless a connector loads for it."""
        metadata = self._connector_metadata
        if not (isinstance(metadata, CacheFlowMetadata) and metadata.loads_first):
            self._carry_out()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is parked until all of its prefix is there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: chunks are saved whole, after the forward."""

    def wait_for_save(self) -> None:
        """Copy the chunks this step completed; they are written in the background."""
        self._save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose restoration ended.

        vLLM asks in every step, after the forward: what has not been carried out or saved by now is. For it starts
        loads before the forward where another connector loads for it, and with drafts it calls ``wait_for_save`` later
        or, on a pipeline stage before the last, never. A drafter with a KV cache writes it in between.
        """
        self._carry_out()
        if not self.worker_side.drafts:
            self._save()
        self.worker_side.forget(finished_req_ids)
        return None, self.worker_side.take_finished() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """KV blocks of restorations that could not be completed."""
        return self.worker_side.take_failed_blocks()

    def build_connector_worker_meta(self) -> CacheFlowWorkerMetadata | None:
        """What this rank did in this step."""
        report, news = self.worker_side.take_report(), self.worker_side.take_news()
        if report is None and news is None:
            return None
        return CacheFlowWorkerMetadata(report or StepReport(), {} if news is None else dict([news]))

    def _carry_out(self) -> None:
        work, self._to_carry_out = self._to_carry_out, None
        if work is not None:
            self.worker_side.carry_out(work)

    def _save(self) -> None:
        work, self._to_save = self._to_save, None
        if work is not None:
            self.worker_side.save(work)

    # Both

    def get_kv_connector_stats(self) -> CacheFlowStats | None:
        """Counts of this side since the last call."""
        if isinstance(self._side, WorkerSide):
            self._side.note_tiers()
        data = self._side.counts.take()
        return CacheFlowStats(data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheFlowStats:
        """Stats as they arrive in the frontend."""
        return CacheFlowStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> CacheFlowPromMetrics:
        """Register ``vllm:cacheflow_*``."""
        return CacheFlowPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """End threads and give the store back; what is under way is given up."""
        self._side.close()
        if self._engine_id:
            release_store(self._engine_id)
            self._engine_id = ""

    @property
    def scheduler_side(self) -> SchedulerSide:
        """What decides, on the scheduler's connector, once the handshake has been made."""
        assert isinstance(self._side, SchedulerSide), "called on a worker's connector, or before the handshake"
        return self._side

    @property
    def worker_side(self) -> WorkerSide:
        """What carries work out, on a worker's connector, once the handshake has been made."""
        assert isinstance(self._side, WorkerSide), "called on the scheduler's connector, or before the handshake"
        return self._side


def _check_transfer(transfer: Any) -> None:
    """Check the configuration that vLLM itself reads: of a child of ``MultiConnector`` that is not its own.

    Raises:
        ConfigError: A failed load would end the request, or CacheFlow is configured twice.
    """
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: a failed load would end the request; "
            'set "kv_load_failure_policy": "recompute" in --kv-transfer-config (with MultiConnector in the outer one)'
        )
    if transfer.kv_connector != "MultiConnector":
        return
    children = [KVTransferConfig(**each) for each in transfer.kv_connector_extra_config["connectors"]]
    num_ours = sum(issubclass(KVConnectorFactory.get_connector_class(each), CacheFlowConnector) for each in children)
    if num_ours > 1:
        raise ConfigError(f"MultiConnector has {num_ours} children that are CacheFlow's: leave one")
