"""Proves at start that restored KV equals the engine's own, and refuses to serve if it does not.

A probe of a few short chunks is prefilled by whole passes of the engine's model. Then it is restored in other blocks,
which hold poison before: some cells recomputed by partial forwards, in the order of a staircase, the others copied as
loads would be. Every byte of every layer must be equal. The blocks are the last of the KV cache and zero afterwards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cacheflow.errors import SelfTestError
from cacheflow.plan.grid import Tile
from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.models.model_access import ModelHandle
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.startup.probe import Probe, gathered, make_probe, run_by_engine, scratch_blocks, wipe
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.recompute import VllmComputePort

_NUM_CHUNKS = 3
_POISON = 0xFF
"""Bytes of a NaN in every float format: a token that was not restored shows in all that attend to it."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestResult:
    """What the self-test measured.

    Attributes:
        num_tokens: Tokens of the probe.
        num_chunks: Chunks they were cut into.
        recompute_equal: Partial forwards in another order gave the engine's own bits; None where only loads are used.
        copy_equal: Blocks gathered, wiped and scattered back were the same bits.
        worst_difference: Largest absolute difference between recomputed and own KV; 0 when equal.
        elapsed_s: How long it took.
    """

    num_tokens: int
    num_chunks: int
    recompute_equal: bool | None
    copy_equal: bool
    worst_difference: float
    elapsed_s: float

    @property
    def passed(self) -> bool:
        """Whether the engine may restore."""
        return self.copy_equal and self.recompute_equal is not False


def self_test(layout: BlockLayout, forward: PartialForward | None, *, chunk_tokens: int) -> SelfTestResult:
    """Run a probe prompt in scratch blocks at the end of the KV cache; they are zero afterwards.

    Call after KV caches are registered and before anything is served, on every rank.

    Args:
        layout: The registered KV blocks.
        forward: How cells are recomputed; None tests copies alone.
        chunk_tokens: Chunk size of the saves; the probe has at most as many tokens where it only copies.

    Raises:
        SelfTestError: Something differs; the message carries the report's numbers.
        ConfigError: The KV cache is too small for the probe.
    """
    started_s, difference = time.perf_counter(), None
    if forward is None:
        num_tokens = min(chunk_tokens, 2 * layout.block_size)
        with scratch_blocks(layout, num_tokens) as block_ids:
            copy_equal = _copies_are_equal(layout, block_ids, _random_bytes(layout, len(block_ids)))
        num_chunks = 1
    else:
        probe = make_probe(forward.handle, num_chunks=_NUM_CHUNKS)
        with scratch_blocks(layout, 2 * len(probe.tokens)) as block_ids:
            half = len(block_ids) // 2
            own = run_by_engine(forward, layout, probe, block_ids[:half])
            copy_equal = _copies_are_equal(layout, block_ids[:half], own)
            restored = _restored(forward, layout, probe, block_ids[half:][::-1], own)
        num_tokens, num_chunks = len(probe.tokens), len(probe.chunk_ends)
        difference = _worst_difference(own, restored, layout.dtype)
    report = SelfTestResult(
        num_tokens=num_tokens,
        num_chunks=num_chunks,
        recompute_equal=None if difference is None else difference == 0.0,
        copy_equal=copy_equal,
        worst_difference=difference or 0.0,
        elapsed_s=time.perf_counter() - started_s,
    )
    if not report.passed:
        raise SelfTestError(_failure(report, forward))
    return report


def _restored(forward: PartialForward, layout: BlockLayout, probe: Probe, block_ids: list[int], own: Bytes) -> Bytes:
    """Restore the probe into poisoned blocks: a staircase is recomputed, the rest copied from ``own``."""
    wipe(layout, block_ids, value=_POISON)
    handle = forward.handle
    per_block = handle.num_layers if handle.compiled else 1
    port = VllmComputePort(forward, _target(probe, block_ids, per_block))
    for chunk, states in enumerate(probe.boundary):
        assert states.residual is not None
        port.seed(chunk, states.hidden, states.residual)
    blocks_per_chunk = probe.chunk_tokens // layout.block_size
    for chunk, height in enumerate(_heights(handle, len(probe.chunk_ends))):
        middle = height // 2
        if middle:
            port.recompute(Tile(chunk, chunk + 1, 0, middle), kv_only_top=False)
        port.recompute(Tile(chunk, chunk + 1, middle, height), kv_only_top=True)
        layer = height * per_block
        if layer < layout.num_layers:
            first, last = chunk * blocks_per_chunk, (chunk + 1) * blocks_per_chunk
            layout.fence()
            loaded = np.ascontiguousarray(own[layer:, first:last]).reshape(-1)
            layout.scatter(layer, layout.num_layers, block_ids[first:last], loaded)
    port.finish()
    return gathered(layout, block_ids)


def _heights(handle: ModelHandle, num_chunks: int) -> list[int]:
    """Blocks recomputed of each chunk: all of them, but half of the last; a compiled engine has one block."""
    if handle.compiled:
        return [1] * num_chunks
    return [handle.num_layers] * (num_chunks - 1) + [max(1, handle.num_layers // 2)]


def _target(probe: Probe, block_ids: list[int], layers_per_block: int) -> RestoreTarget:
    return RestoreTarget(
        restore_id=-1,
        request_id="self-test",
        start=0,
        object_start=0,
        chunk_ends=probe.chunk_ends,
        tokens=probe.tokens,
        block_ids=tuple(block_ids),
        namespace="",
        chain_hashes=("",) * len(probe.chunk_ends),
        layers_per_block=layers_per_block,
    )


def _copies_are_equal(layout: BlockLayout, block_ids: list[int], own: Bytes) -> bool:
    """Put the bytes into blocks that hold something else, and take them out again."""
    wipe(layout, block_ids, value=_POISON)
    wiped = bool((gathered(layout, block_ids) == _POISON).all())
    layout.fence()
    layout.scatter(0, layout.num_layers, block_ids, own.reshape(-1))
    return wiped and bool(np.array_equal(gathered(layout, block_ids), own))


def _random_bytes(layout: BlockLayout, num_blocks: int) -> Bytes:
    shape = (layout.num_layers, num_blocks, layout.block_bytes)
    return np.random.default_rng(11).integers(0, 256, shape, dtype=np.uint8)


def _worst_difference(own: Bytes, restored: Bytes, dtype: torch.dtype) -> float:
    """Largest absolute difference; infinite where one is NaN and the other is not, 0 only for equal bytes."""
    if np.array_equal(own, restored):
        return 0.0
    values = [torch.from_numpy(each.reshape(-1)).view(dtype).double() for each in (own, restored)]
    worst = float((values[0] - values[1]).abs().max())
    return worst if worst > 0 else float("inf")  # NaN, or bits that differ in equal numbers


def _failure(report: SelfTestResult, forward: PartialForward | None) -> str:
    model = "" if forward is None else f" of {type(forward.handle.model).__name__} ({forward.handle.dtype})"
    return (
        f"restored KV{model} differs from the engine's own over {report.num_tokens} tokens in {report.num_chunks} "
        f"chunks: recomputed equal {report.recompute_equal} (largest difference {report.worst_difference:.3e}), copied "
        f"equal {report.copy_equal}. CacheFlow does not serve this engine"
    )
