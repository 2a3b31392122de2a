"""Raw bytes of the running states of recurrent layers: gathered for a save, scattered for a load.

vLLM keeps the states of a hybrid model's recurrent layers in blocks of groups of their own: a row's layers are spread
over the groups, so that a row's states at one position are in one block of each group.

Shapes: ``R`` rows of this stage, ``G`` groups of states, ``L`` recurrent layers. A payload is the states of one layer
after the other, as the registered tensors hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from cacheflow.errors import ConfigError
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.worker.layout import BlockLayout, LayerView, Payload, blocks_first


class StateBlocks:
    """The running states of one worker's rows; made once, when vLLM registers its KV caches.

    ``snapshot``, ``gather`` and ``scatter`` are called on the threads that those of ``BlockLayout`` are.

    Attributes:
        layout: The blocks of all recurrent layers, rows ascending.
        num_groups: Blocks that hold the states of one position.
    """

    def __init__(
        self, layout: BlockLayout, *, group_L: Sequence[int], layers_R: Sequence[int], num_groups: int
    ) -> None:
        """States of ``layers_R`` layers in each row; layer ``l`` is in the block of group ``group_L[l]``."""
        self.layout, self.num_groups, self._group_L = layout, num_groups, tuple(group_L)
        self._first_R = (0, *accumulate(layers_R))

    @classmethod
    def of(
        cls,
        handle: ModelHandle,
        kv_caches: Mapping[str, torch.Tensor],
        kv_cache_config: Any,  # noqa: ANN401 -- vLLM's KVCacheConfig
        *,
        lane: CopyLane | None = None,
    ) -> StateBlocks | None:
        """Those of a hybrid model; None of any other. ``lane`` is the worker's; None on the CPU.

        Raises:
            ConfigError: A layer is missing, or its tensor's block dimension is unknown or ambiguous.
        """
        names = [name for row in handle.states_R for name in row]
        if not names:
            return None
        if missing := [name for name in names if name not in kv_caches]:
            raise ConfigError(f"no running states were registered for {missing}; registered are {sorted(kv_caches)}")
        group_of = {name: index for index, each in enumerate(handle.groups.state_names) for name in each}
        num_blocks = int(kv_cache_config.num_blocks)
        views = [LayerView(name, blocks_first(kv_caches[name], num_blocks, name=name)) for name in names]
        return cls(
            BlockLayout(views, block_size=handle.block_size, layout_name="states", lane=lane),
            group_L=[group_of[name] for name in names],
            layers_R=[len(row) for row in handle.states_R],
            num_groups=len(handle.groups.states),
        )

    @property
    def num_rows(self) -> int:
        """Rows of this stage."""
        return len(self._first_R) - 1

    def num_bytes(self, row_lo: int, row_hi: int) -> int:
        """Bytes of the states of rows ``[row_lo, row_hi)`` at one position."""
        return self.layout.num_bytes(self._first_R[row_lo], self._first_R[row_hi], 1)

    def snapshot(self, row_lo: int, row_hi: int, blocks_G: Sequence[int], out: torch.Tensor) -> None:
        """See ``BlockLayout.snapshot``."""
        first, at = self._first_R[row_lo], 0
        for layer, num_bytes in enumerate(self.layout.block_bytes_L[first : self._first_R[row_hi]], start=first):
            self.layout.snapshot(layer, layer + 1, [blocks_G[self._group_L[layer]]], out[at : at + num_bytes])
            at += num_bytes

    def gather(self, row_lo: int, row_hi: int, blocks_G: Sequence[int], out: Payload) -> None:
        """Copy the states of rows ``[row_lo, row_hi)`` out of one block of each group."""
        for layer, part in self._parts(row_lo, row_hi, out):
            self.layout.gather(layer, layer + 1, [blocks_G[self._group_L[layer]]], part)

    def scatter(self, row_lo: int, row_hi: int, blocks_G: Sequence[int], payload: Payload) -> None:
        """Copy states of rows ``[row_lo, row_hi)`` into one block of each group."""
        for layer, part in self._parts(row_lo, row_hi, payload):
            self.layout.scatter(layer, layer + 1, [blocks_G[self._group_L[layer]]], part)

    def copy(self, source_G: Sequence[int], target_G: Sequence[int]) -> None:
        """Copy the states of all rows; call on the worker's main thread, as ``BlockLayout.copy``."""
        self.layout.copy(source_G, target_G)

    def _parts(self, row_lo: int, row_hi: int, payload: Payload) -> Iterator[tuple[int, Payload]]:
        first, last = self._first_R[row_lo], self._first_R[row_hi]
        if first == last:
            return
        for layer, part in zip(
            range(first, last), self.layout.by_layer(payload, first, last, 1), strict=True
        ):  # [1, P] each
            yield layer, part.reshape(-1)
