"""The running states in vLLM's own prefix cache, where a restoration goes on after what that cache holds.

vLLM counts tokens as cached only where the states after them are cached too. But a request that is parked for a
connector gets no block for them, and the cached ones may be evicted for what is set aside. So they are held until they
were copied.
"""

# ruff: noqa: ANN401 -- vLLM's objects: its types are not seen where CacheFlow is checked

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from cacheflow.vllm.compat import missing_for_local_states
from cacheflow.vllm.models.kv_groups import KvGroups

logger = logging.getLogger(__name__)


class LocalStates:
    """Blocks of running states that are held for requests. Scheduler's thread alone."""

    def __init__(self, kv_cache_manager: Any, groups: KvGroups) -> None:
        """Find blocks by vLLM's ``KVCacheManager``; where it lacks what that takes, none are found."""
        self._manager, self._groups = kv_cache_manager, groups
        self._held: dict[str, list[Any]] = {}
        missing = missing_for_local_states(kv_cache_manager)
        self._usable = not missing
        if missing:
            logger.warning(
                "vLLM's KVCacheManager lacks %s: prompts that begin in vLLM's own prefix cache are restored by loading "
                "alone", ", ".join(missing),
            )  # fmt: skip

    def hold(self, request: Any, num_tokens: int) -> bool:
        """Hold the states after so many tokens of a request, instead of what was held for it; whether there are any."""
        self.release(request.request_id)
        if not self._usable:
            return False
        blocks, num_cached, *_ = self._manager.get_computed_blocks(request)
        column = num_tokens // self._groups.block_size - 1
        if num_cached < num_tokens:
            return False
        by_group = [blocks.blocks[group] for group in self._groups.states]
        if any(len(each) <= column or each[column].is_null for each in by_group):
            return False  # vLLM's cache reaches farther, to where other states are
        held = [each[column] for each in by_group]
        self._manager.block_pool.touch(held)
        self._held[request.request_id] = held
        return True

    def held(self, request_id: str) -> tuple[int, ...]:
        """The blocks that are held for a request, one of each group; none where nothing is."""
        return tuple(int(block.block_id) for block in self._held.get(request_id, ()))

    def release(self, request_id: str) -> None:
        """Let the blocks of a request go, back into vLLM's prefix cache."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self._manager.block_pool.free_blocks(held)

    def release_unless(self, wanted: Callable[[str], bool]) -> None:
        """Let the blocks of all requests go that are not ``wanted`` any more."""
        for request_id in [each for each in self._held if not wanted(each)]:
            self.release(request_id)
