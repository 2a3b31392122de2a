"""Raw bytes of KV-cache blocks, whatever is in them: gathered for a save, scattered for a load.

Nothing is assumed about the inside of a block, so any layout works whose blocks are whole: the block dimension of each
layer's tensor is found from the number of blocks, and a tensor that cannot be understood is refused with its shape.

A block holds as many tokens in every layer, not as many bytes: of one model some layers may have other heads.

Shapes: ``L`` layers of this pipeline stage (counted from its first), ``N`` KV blocks, ``P`` bytes of one block of one
layer. A payload is the bytes of ``[blocks, P]`` of one layer after the other: layers ascending, blocks in the order of
the ids; inside a block the bytes stand in the logical order of the registered tensor, whatever its strides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.errors import ConfigError
from cacheflow.plan.grid import layers_of_blocks
from cacheflow.tensors.block_copy import DeviceCopies, HostCopies
from cacheflow.tensors.copy_lane import CopyLane
from cacheflow.tensors.streams import StreamEvent
from cacheflow.vllm.models.kv_groups import KvGroups
from cacheflow.vllm.models.model_access import layer_number

Payload = npt.NDArray[np.uint8]
BlockShapes = frozenset[tuple[int, ...]]
"""What vLLM puts inside a block of a layer, of all layers."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's tensor with its blocks in front.

    Attributes:
        name: vLLM's name of the attention layer.
        blocks_NI: ``[N, ...]``: blocks first, then what vLLM put inside one, in logical order.
    """

    name: str
    blocks_NI: torch.Tensor


class BlockLayout:
    """The KV blocks of one worker; made once, when vLLM registers its KV caches.

    On the CPU numpy copies (it releases the GIL), and every method may be called on any thread, also side by side on
    different blocks. On CUDA the device copies after a call has returned: ``place`` is called on the I/O thread, all
    else on the worker's main thread, and kernels launched there see what was placed before them.
    """

    def __init__(
        self, layers: Sequence[LayerView], *, block_size: int, layout_name: str, lane: CopyLane | None = None
    ) -> None:
        """Take over checked views; see ``from_kv_caches``. ``lane`` is the worker's; None on the CPU.

        Raises:
            ConfigError: There is no layer, or blocks differ between layers in dtype, number or device.
        """
        if not layers:
            raise ConfigError("no KV cache was registered: nothing to restore")
        self.layer_names = tuple(layer.name for layer in layers)
        first = layers[0].blocks_NI
        for layer in layers:
            blocks = layer.blocks_NI
            if (len(blocks), blocks.dtype, blocks.device) != (len(first), first.dtype, first.device):
                raise ConfigError(
                    f"KV caches differ: {layers[0].name} is {_describe(first)}, {layer.name} is {_describe(blocks)}; "
                    "only layers with as many blocks of one dtype on one device are supported"
                )
        self.num_layers = len(layers)
        self.num_blocks = int(first.shape[0])
        self.block_size = block_size
        self.block_bytes_L = tuple(each.blocks_NI[0].numel() * first.element_size() for each in layers)
        self._bytes_before = (0, *accumulate(self.block_bytes_L))
        self.device = first.device
        self.dtype = first.dtype
        self.layout_name = layout_name
        self._inside_L = tuple(tuple(map(int, each.blocks_NI.shape[1:])) for each in layers)
        self.shapes: BlockShapes = frozenset(self._inside_L)
        views = [layer.blocks_NI for layer in layers]
        self.lane = lane
        self._copies = HostCopies(views) if lane is None else DeviceCopies(views, lane)

    @classmethod
    def from_kv_caches(
        cls,
        kv_caches: Mapping[str, torch.Tensor],
        kv_cache_config: Any,  # noqa: ANN401 -- vllm.v1.kv_cache_interface.KVCacheConfig
        *,
        layer_names: Sequence[str] | None = None,
        lane: CopyLane | None = None,
    ) -> BlockLayout:
        """Understand what ``register_kv_caches`` was given.

        Args:
            kv_caches: One tensor per attention layer, by name.
            kv_cache_config: vLLM's KV cache config: number of blocks, block size, name of the layout.
            layer_names: The layers to serve, bottom first; None: all that keep keys and values, by number.
            lane: The worker's; None on the CPU.

        Raises:
            ConfigError: There is more than one KV cache group of keys and values, layers are missing, or a tensor's
                block dimension is unknown or ambiguous; the message has the shapes.
        """
        groups = KvGroups.of(kv_cache_config)
        names = list(layer_names) if layer_names is not None else sorted(groups.attention_names, key=layer_number)
        missing = [name for name in names if name not in kv_caches]
        if missing:
            raise ConfigError(f"no KV cache was registered for {missing}; registered are {sorted(kv_caches)}")
        num_blocks = int(kv_cache_config.num_blocks)
        layout_name = str(kv_cache_config.kv_cache_layout or "")
        views = [
            LayerView(name, blocks_first(kv_caches[name], num_blocks, name=name, layout_name=layout_name))
            for name in names
        ]
        return cls(views, block_size=groups.block_size, layout_name=layout_name, lane=lane)

    def identity(self, shapes: Iterable[BlockShapes] = ()) -> str:
        """Names how bytes stand in a payload, whatever the number of blocks.

        ``shapes`` are those of the engine's other ranks: with them all pipeline stages have one name.
        """
        every = sorted(self.shapes.union(*shapes))
        inside = every[0] if len(every) == 1 else every
        text = f"{self.layout_name}|{inside}|{self.dtype}|{self.block_size}"
        return f"{self.layout_name or 'unnamed'}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def form(self, layer_lo: int, layer_hi: int, num_blocks: int) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
        """What a record says of a payload: shape, dtype, and the axes of the shape along which tokens lie.

        No axes where it is not known how tokens lie in a block, and one dimension of bytes where layers differ.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        inside, *others = dict.fromkeys(self._inside_L[layer_lo:layer_hi])
        if others:
            return (self.num_bytes(layer_lo, layer_hi, num_blocks),), "uint8", ()
        token_axes = tuple(2 + axis for axis in self._token_axes(inside))
        return (layer_hi - layer_lo, num_blocks, *inside), dtype, (1, *token_axes) if token_axes else ()

    def _token_axes(self, inside: tuple[int, ...]) -> tuple[int, ...]:
        """Where tokens lie in a block ``[H, N, C]`` of one of vLLM's named layouts, of ``[split, H, N, C]`` too."""
        if not _is_named(self.layout_name) or len(inside) not in (3, 4):
            return ()
        axes = (*range(len(inside) - 3), len(inside) - 2)
        return axes if math.prod(inside[axis] for axis in axes) == self.block_size else ()

    def num_bytes(self, layer_lo: int, layer_hi: int, num_blocks: int) -> int:
        """Bytes of the payload of so many blocks in layers ``[layer_lo, layer_hi)``."""
        return (self._bytes_before[layer_hi] - self._bytes_before[layer_lo]) * num_blocks

    def largest_object_bytes(self, *, chunk_tokens: int, layers_per_block: int) -> int:
        """Bytes of the largest object that holds a chunk in a block of layers."""
        blocks = layers_of_blocks(layers_per_block, self.num_layers)
        return max(self.num_bytes(lo, hi, chunk_tokens // self.block_size) for lo, hi in blocks)

    def by_layer(self, payload: Payload, layer_lo: int, layer_hi: int, num_blocks: int) -> list[Payload]:
        """A payload of so many blocks in layers ``[layer_lo, layer_hi)`` as views ``[blocks, P]`` of each layer."""
        ends = [
            (end - self._bytes_before[layer_lo]) * num_blocks for end in self._bytes_before[layer_lo : layer_hi + 1]
        ]
        return [payload[start:end].reshape(num_blocks, -1) for start, end in pairwise(ends)]

    def fence(self) -> StreamEvent | None:
        """What ``place`` waits for: an event after all kernels queued so far; None on the CPU.

        Of a set of blocks it is recorded when they are given to a request: kernels of their last owner may still be
        queued. What is queued later, saves among it, no placement waits for.
        """
        return None if self.lane is None else self.lane.streams.current().record()

    def see_placed(self) -> None:
        """Have kernels that are launched from now on, in whatever forward, see what was placed; does not wait."""
        if self.lane is not None:
            self.lane.before_compute()

    def snapshot(self, layer_lo: int, layer_hi: int, block_ids: Sequence[int], out: torch.Tensor) -> None:
        """Queue the copy of blocks of layers ``[layer_lo, layer_hi)`` into device memory, uint8; on CUDA alone.

        Raises:
            ValueError: Layers, blocks or the size of ``out`` do not fit (a caller's bug).
        """
        assert isinstance(self._copies, DeviceCopies), "on the CPU blocks are gathered"
        self._require(layer_lo, layer_hi, block_ids, out.nbytes)
        self._copies.snapshot(layer_lo, layer_hi, _ids(block_ids), out)

    def gather(self, layer_lo: int, layer_hi: int, block_ids: Sequence[int], out: Payload) -> None:
        """Copy blocks of layers ``[layer_lo, layer_hi)`` out; waits for the device.

        Args:
            layer_lo: First layer, counted from the stage's first.
            layer_hi: One past the last.
            block_ids: Which blocks, in the order of the payload.
            out: Receives exactly ``num_bytes(layer_lo, layer_hi, len(block_ids))`` bytes.

        Raises:
            ValueError: Layers, blocks or the size of ``out`` do not fit (a caller's bug).
        """
        self._require(layer_lo, layer_hi, block_ids, _checked(out))
        self._copies.gather(layer_lo, layer_hi, _ids(block_ids), out)

    def scatter(
        self, layer_lo: int, layer_hi: int, block_ids: Sequence[int], payload: Payload, *, skip_blocks: int = 0
    ) -> None:
        """Copy a payload into blocks of layers ``[layer_lo, layer_hi)``; kernels launched later see it.

        Args:
            layer_lo: First layer, counted from the stage's first.
            layer_hi: One past the last.
            block_ids: Target of every block of the payload; the first ``skip_blocks`` of them are not looked at.
            payload: Exactly ``num_bytes(layer_lo, layer_hi, len(block_ids))`` bytes.
            skip_blocks: Blocks at the payload's start that are not written: they hold tokens that are there already.

        Raises:
            ValueError: Layers, blocks or the size of ``payload`` do not fit (a caller's bug).
        """
        self._require(layer_lo, layer_hi, block_ids, _checked(payload), skip_blocks)
        self._copies.scatter(layer_lo, layer_hi, _ids(block_ids), payload, skip_blocks)

    def place(
        self,
        layer_lo: int,
        layer_hi: int,
        block_ids: Sequence[int],
        payload: Payload,
        *,
        skip_blocks: int = 0,
        after: StreamEvent | None,
    ) -> StreamEvent | None:
        """Copy a pinned payload in as ``scatter`` does, beside what compute is doing.

        Args:
            layer_lo: See ``scatter``.
            layer_hi: See ``scatter``.
            block_ids: See ``scatter``.
            payload: See ``scatter``.
            skip_blocks: See ``scatter``.
            after: The ``fence`` of the blocks.

        Returns:
            The event after which the payload may be written again; None where the copy is done already.

        Raises:
            ValueError: As ``scatter``.
        """
        self._require(layer_lo, layer_hi, block_ids, _checked(payload), skip_blocks)
        return self._copies.place(layer_lo, layer_hi, _ids(block_ids), payload, skip_blocks, after=after)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole blocks of all layers; call on the worker's main thread.

        Raises:
            ValueError: Blocks do not fit, or are not as many (a caller's bug).
        """
        if len(source) != len(target) or not 0 <= min(*source, *target) <= max(*source, *target) < self.num_blocks:
            raise ValueError(f"cannot copy blocks {list(source)} over {list(target)} of {self.num_blocks}")
        self._copies.copy(_ids(source), _ids(target))

    def _require(self, layer_lo: int, layer_hi: int, ids: Sequence[int], num_bytes: int, skip: int = 0) -> None:
        if not 0 <= skip < max(1, len(ids)):
            raise ValueError(f"skip_blocks is {skip}, must be in [0, {len(ids)})")
        if not 0 <= layer_lo < layer_hi <= self.num_layers:
            raise ValueError(f"layers [{layer_lo}, {layer_hi}) are not within this stage's {self.num_layers}")
        written = ids[skip:]
        if not written or not 0 <= min(written) <= max(written) < self.num_blocks:
            raise ValueError(f"block ids {list(ids)} are not within [0, {self.num_blocks})")
        expected = self.num_bytes(layer_lo, layer_hi, len(ids))
        if num_bytes != expected:
            raise ValueError(f"payload of {num_bytes} bytes, must be {expected}")


def blocks_first(kv_cache: torch.Tensor, num_blocks: int, *, name: str, layout_name: str = "") -> torch.Tensor:
    """A layer's tensor viewed as ``[num_blocks, ...]``, without a copy.

    The block dimension is the one of ``num_blocks`` entries, or, where the kernel's blocks are smaller than the KV
    manager's, the first if it is a multiple: that many kernel blocks make one.

    Raises:
        ConfigError: No dimension or more than one can be it, or blocks are not whole in memory.
    """
    if not isinstance(kv_cache, torch.Tensor) or kv_cache.ndim < 2:
        raise ConfigError(f"{name}: a KV cache of type {type(kv_cache).__name__} is not supported, only one tensor is")
    found = [dim for dim, size in enumerate(kv_cache.shape) if size == num_blocks]
    described = f"{name} ({_describe(kv_cache)}, strides {kv_cache.stride()}, layout {layout_name or 'unnamed'})"
    if len(found) > 1:
        found = _by_layout(found, layout_name)
    if len(found) == 1:
        return kv_cache.movedim(found[0], 0)
    split, rest = divmod(int(kv_cache.shape[0]), num_blocks)
    if found or rest or split < 2:
        reason = "more than one dimension" if found else "no dimension"
        raise ConfigError(f"{described}: {reason} can hold its {num_blocks} blocks; this layout is not supported")
    if kv_cache.stride(0) * split != kv_cache[0].numel() * split:
        raise ConfigError(f"{described}: {split} kernel blocks make one block but do not lie side by side")
    joined: torch.Tensor = torch.unflatten(kv_cache, 0, (num_blocks, split))
    return joined


def _by_layout(candidates: list[int], layout_name: str) -> list[int]:
    """VLLM's named layouts all register the logical shape ``[B, H, N, C]``: the first dimension is the block's."""
    return [0] if _is_named(layout_name) and 0 in candidates else candidates


def _is_named(layout_name: str) -> bool:
    return len(layout_name) == 5 and set(layout_name) == set("LBHNC")


def _checked(payload: Payload) -> int:
    """Bytes of a payload, once it is one."""
    if payload.dtype != np.uint8 or not payload.flags.c_contiguous:
        raise ValueError(f"payload of {payload.dtype}, must be contiguous uint8")
    return payload.nbytes


def _ids(block_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(block_ids, dtype=np.int64)


def _describe(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
