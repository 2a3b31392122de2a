"""The connector of models with recurrent layers (Gated DeltaNet: Qwen3-Next, Qwen3.5; Mamba-2: Nemotron-H, Granite 4).

``--kv-transfer-config '{"kv_connector": "CacheFlowHybridConnector", "kv_connector_module_path":
"cacheflow.vllm.hybrid_connector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'``

vLLM keeps their running states in KV cache groups of their own, which it does only beside a connector that says it can
handle several. For a model with sliding windows it would do so too and keep less of a prompt: so this is a class of its
own.
"""

# ruff: noqa: ANN401 -- vLLM's objects: its types are not seen where CacheFlow is checked

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults, SupportsHMA

from cacheflow.vllm.connector import CacheFlowConnector, CacheFlowMetadata
from cacheflow.vllm.local_states import LocalStates
from cacheflow.vllm.scheduler.view import TargetStates


class CacheFlowHybridConnector(CacheFlowConnector, SupportsHMA):
    """``CacheFlowConnector`` where vLLM has several KV cache groups: one of attention, the others of running states."""

    @property
    def _default_chunk_tokens(self) -> int:
        """A chunk is a KV block: blocks of hybrid models hold 500 tokens and more."""
        return self._groups.block_size

    # Scheduler side

    _local_states: LocalStates
    """Set when vLLM binds its cache manager, before the first step."""

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """See ``CacheFlowConnector``; learn to find the running states of vLLM's own prefix cache."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._local_states = LocalStates(kv_cache_manager, self._groups)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See ``CacheFlowConnector``; also asks vLLM to stop where states are wanted."""
        matched, loads = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not matched:
            self._local_states.release(request.request_id)
        own_stop = getattr(request, "shared_prefix_boundary", None)
        if matched is not None and own_stop is not None:
            end = num_computed_tokens + matched
            request.shared_prefix_boundary = self.scheduler_side.stop_at(
                request.request_id, end, vllm_stop=own_stop, kept_within_passes=self._groups.kept_within_passes
            )
        return matched, loads

    def _has_start_states(self, request: Any, num_computed_tokens: int) -> bool:
        return not num_computed_tokens or self._local_states.hold(request, num_computed_tokens)

    def _target_states(self, request_id: str, blocks: Any, end: int) -> TargetStates:
        return TargetStates(
            blocks=self._groups.state_blocks(blocks.get_block_ids(), end),
            start=self._local_states.held(request_id),
        )

    def build_connector_meta(self, scheduler_output: Any) -> CacheFlowMetadata:
        """See ``CacheFlowConnector``."""
        self._local_states.release_unless(self.scheduler_side.restorations.restoring)
        return super().build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """See ``CacheFlowConnector``."""
        super().update_connector_output(connector_output)
        for request_id in connector_output.finished_recving or ():
            self._local_states.release(request_id)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See ``request_finished``."""
        return self.request_finished(request, block_ids[self._groups.attention])

    # Worker side

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests whose restoration ended; of one that did not get all it promised vLLM computes everything."""
        _, finished = self.get_finished(finished_req_ids)
        self.worker_side.take_failed_blocks()
        return KVConnectorTransferResults(
            finished_recving=set(finished or ()), failed_recving=self.worker_side.take_failed_requests()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Never any: vLLM takes block ids only of models with one group."""
        return set()
