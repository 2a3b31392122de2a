"""A connector beside CacheFlow's: keeps prompts in memory, loads them for the very next forward, and has a handshake.

What it brings can be made to fail: then the KV blocks keep what they held, and vLLM is told. Scheduler and worker in
one process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from cacheflow.vllm.connector import CacheFlowConnector


class OwnConnector(CacheFlowConnector):
    """CacheFlow's by another name and module, as a user might extend it."""


@dataclass
class Kept:
    """What all connectors of this process keep.

    Attributes:
        kv: KV of whole blocks by their tokens: ``[blocks, ...]`` of each layer.
        fail: Loads fail.
        num_loads: Loads begun.
        handshakes: What each scheduler's half was handed.
    """

    kv: dict[tuple[int, ...], dict[str, torch.Tensor]] = field(default_factory=dict)
    fail: bool = False
    num_loads: int = 0
    handshakes: list[dict[Any, KeepingHandshake]] = field(default_factory=list)

    def clear(self) -> None:
        self.kv.clear()
        self.fail, self.num_loads = False, 0


KEPT = Kept()


@dataclass
class KeepingHandshake(KVConnectorHandshakeMetadata):
    """This connector's."""

    num_layers: int


@dataclass
class KeepingMetadata(KVConnectorMetadata):
    """Tokens and their KV blocks."""

    loads: list[tuple[tuple[int, ...], list[int]]]
    saves: list[tuple[tuple[int, ...], list[int]]]


class KeepingConnector(KVConnectorBase_V1):
    """Serves what it kept of an earlier prompt."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._loads: dict[str, tuple[tuple[int, ...], list[int]]] = {}
        self._requests: dict[str, Any] = {}
        self._failed: set[int] = set()

    # Scheduler side

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """Must be this connector's own."""
        assert metadata, "this connector's workers hand something over"
        assert all(type(each) is KeepingHandshake for each in metadata.values()), metadata
        KEPT.handshakes.append(metadata)

    def on_new_request(self, request: Any) -> None:
        self._requests[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        found = self._longest(request)
        return max(0, len(found) - num_computed_tokens), False

    def _longest(self, request: Any) -> tuple[int, ...]:
        tokens = tuple(request.all_token_ids[: (request.num_tokens - 1) // self._size * self._size])
        while tokens and tokens not in KEPT.kv:
            tokens = tokens[: -self._size]
        return tokens

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._loads[request.request_id] = (self._longest(request), list(blocks.get_block_ids()[0]))

    def build_connector_meta(self, scheduler_output: Any) -> KeepingMetadata:
        loads, self._loads = list(self._loads.values()), {}
        saves = []
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self._requests[request_id]
            num_computed = request.num_computed_tokens + scheduler_output.num_scheduled_tokens[request_id]
            if num_computed == request.num_prompt_tokens:
                tokens = tuple(request.all_token_ids[: num_computed // self._size * self._size])
                saves.append((tokens, list(self._kv_cache_manager.get_block_ids(request_id)[0])))
        return KeepingMetadata(loads, saves)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = kv_caches

    def get_handshake_metadata(self) -> KeepingHandshake:
        return KeepingHandshake(len(self._kv_caches))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        for tokens, block_ids in metadata.loads:
            KEPT.num_loads += 1
            ids = block_ids[: len(tokens) // self._size]
            if KEPT.fail:
                self._failed.update(ids)
                continue
            for name, kv in KEPT.kv[tokens].items():
                self._kv_caches[name][ids] = kv

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        for tokens, block_ids in self._get_connector_metadata().saves:
            ids = block_ids[: len(tokens) // self._size]
            KEPT.kv.setdefault(tokens, {name: cache[ids].clone() for name, cache in self._kv_caches.items()})

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed
