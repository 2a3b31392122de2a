"""Proves at start that restored KV equals the engine's own; what it cannot prove is not recomputed.

A probe of a few short chunks is prefilled by the engine's own steps. Then it is restored in other blocks, which hold
poison before: cells recomputed by partial forwards, cut at every boundary at which a restoration may be cut, the rest
copied as loads would be. Every byte of every layer must be equal. Each layer is also run for its keys and values alone,
and where layers look at a window that is longer than the probe, a chunk far behind its start is compared as well.
The blocks are the last of the KV cache and zero afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cacheflow.errors import SelfTestError, UnsupportedModelError
from cacheflow.plan.grid import Tile
from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.models.boundary_states import States
from cacheflow.vllm.models.layers import Carry, mapped
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.startup.agreement import of_all_ranks
from cacheflow.vllm.startup.probe import (
    Probe,
    SeenStep,
    gathered,
    make_probe,
    run_by_engine,
    scratch_blocks,
    step_by_engine,
    wipe,
)
from cacheflow.vllm.worker.layout import BlockLayout, Payload, block_layers
from cacheflow.vllm.worker.recompute import VllmComputePort

_NUM_CHUNKS = 3
_POISON = 0xFF
"""Bytes of a NaN in every float format: a token that was not restored shows in all that attend to it."""

Bytes = list[Payload]
"""Of each layer ``[blocks, P]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where recomputed KV first differs from the engine's own.

    Attributes:
        where: In which of the comparisons.
        layer: VLLM's name of the lowest layer that differs.
        worst: Largest absolute difference in it; infinite where a number is NaN.
        share: Share of its bytes that differ.
    """

    where: str
    layer: str
    worst: float
    share: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.layer} differs by up to {self.worst:.3g} in {self.share:.0%} of its bytes {self.where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestResult:
    """What the self-test measured.

    Attributes:
        num_tokens: Tokens of the probe.
        num_chunks: Chunks they were cut into.
        num_cuts: Boundaries between layers at which it was cut; 0 where only whole passes or loads are used.
        windows: Lengths of windows for which a chunk behind them was compared.
        difference: Why recomputation is not exact; None where it is, or was not asked for.
        copy_equal: Blocks gathered, wiped and scattered back were the same bits.
        elapsed_s: How long it took.
    """

    num_tokens: int
    num_chunks: int
    num_cuts: int
    windows: tuple[int, ...]
    difference: Difference | None
    copy_equal: bool
    elapsed_s: float

    def __str__(self) -> str:
        """What was proved, in one line."""
        parts = [f"{self.num_tokens} tokens in {self.num_chunks} chunks, restored KV equal to the engine's bit for bit"]
        if self.num_cuts:
            parts.append(f"cut at {self.num_cuts} layers, keys and values alone in each")
        if self.windows:
            parts.append(f"behind windows of {', '.join(map(str, self.windows))} tokens")
        return ", ".join(parts)


def self_test(
    layout: BlockLayout, forward: PartialForward | None, *, chunk_tokens: int, layers_per_block: int = 1
) -> SelfTestResult:
    """Run a probe prompt in scratch blocks at the end of the KV cache; they are zero afterwards.

    Call after KV caches are registered and before anything is served, on every rank.

    Args:
        layout: The registered KV blocks.
        forward: How cells are recomputed; None tests copies alone.
        chunk_tokens: Chunk size of the saves; the probe has at most as many tokens where it only copies.
        layers_per_block: Restorations are cut at multiples of so many layers.

    Raises:
        SelfTestError: Copies are not equal.
        UnsupportedModelError: vLLM calls the model in a way that partial forwards do not know.
        ConfigError: The KV cache is too small for the probe.
    """
    started_s = time.perf_counter()
    windows: tuple[int, ...] = ()
    difference = None
    if forward is None:
        num_tokens, num_chunks, num_cuts = min(chunk_tokens, 2 * layout.block_size), 1, 0
        with scratch_blocks(layout, num_tokens) as block_ids:
            copy_equal = _copies_are_equal(layout, block_ids, _random_bytes(layout, len(block_ids)))
    else:
        test = _RecomputeTest(forward, layout, layers_per_block)
        num_tokens, num_chunks = len(test.probe.tokens), len(test.probe.chunk_ends)
        with scratch_blocks(layout, 2 * num_tokens + test.probe.chunk_tokens) as block_ids:
            copy_equal, difference = test.run(block_ids)
        num_cuts, windows = test.num_cuts, test.windows
    if not copy_equal:
        raise SelfTestError(
            f"blocks of the KV cache that were copied out and back differ ({num_tokens} tokens, layout "
            f"{layout.layout_name or 'unnamed'}): CacheFlow does not serve this engine"
        )
    return SelfTestResult(
        num_tokens=num_tokens,
        num_chunks=num_chunks,
        num_cuts=num_cuts,
        windows=windows,
        difference=difference,
        copy_equal=copy_equal,
        elapsed_s=time.perf_counter() - started_s,
    )


class _RecomputeTest:
    """The probe of one engine, and what it is compared by."""

    def __init__(self, forward: PartialForward, layout: BlockLayout, layers_per_block: int) -> None:
        self._forward, self._layout = forward, layout
        handle = forward.handle
        self._layers_per_block = handle.num_layers if handle.compiled else layers_per_block
        self._num_blocks = -(-handle.num_layers // self._layers_per_block)
        self.probe = make_probe(handle, num_chunks=_NUM_CHUNKS)
        self.num_cuts = self._num_blocks - 1
        self.windows = () if handle.compiled else tuple(self._long_windows())

    def run(self, block_ids: list[int]) -> tuple[bool, Difference | None]:
        """Whether copies are equal, and where recomputation is not; ``block_ids`` hold the probe twice and a chunk."""
        layout, probe, handle = self._layout, self.probe, self._forward.handle
        count = len(probe.tokens) // layout.block_size
        engines, ours, spare = block_ids[:count], block_ids[count : 2 * count][::-1], block_ids[2 * count :]
        handed = _handed(run_by_engine(handle, probe, engines))
        own = gathered(layout, engines)
        copy_equal = _copies_are_equal(layout, engines, own)
        restored = self._restored(ours, own, handed)
        found = [self._compare(own, restored, "when it is recomputed layer by layer")]
        # Nothing is left out after a difference: other ranks may have found none, and layers are run by all together.
        if not handle.compiled:
            last = [each[count - len(spare) :] for each in own]
            alone = self._alone(engines, spare, handed[-1])
            found.append(self._compare(last, alone, "when its keys and values are computed alone"))
        found += [self._behind(window, engines, spare) for window in self.windows]
        return copy_equal, next((each for each in found if each is not None), None)

    def _restored(self, block_ids: list[int], own: Bytes, handed: Sequence[States | None]) -> Bytes:
        """Restore the probe into poisoned blocks: a staircase is recomputed, the rest copied from ``own``."""
        wipe(self._layout, block_ids, value=_POISON)
        target = _target(self.probe, block_ids, self._layers_per_block)
        port = VllmComputePort(self._forward, target)
        per_chunk = self.probe.chunk_tokens // self._layout.block_size
        for chunk, states in enumerate(handed):
            if states is not None:
                port.seed(chunk, states)
            height = self._num_blocks
            if chunk and chunk == len(handed) - 1:
                height = max(1, height // 2)
            for block in range(height):
                port.recompute(Tile(chunk, chunk + 1, block, block + 1), kv_only_top=block == height - 1)
            _, layer = block_layers(height - 1, self._layers_per_block, self._layout.num_layers)
            if layer < self._layout.num_layers:
                first, last = chunk * per_chunk, (chunk + 1) * per_chunk
                self._layout.fence()
                loaded = np.concatenate([each[first:last].reshape(-1) for each in own[layer:]])
                self._layout.scatter(layer, self._layout.num_layers, block_ids[first:last], loaded)
        port.finish()
        return gathered(self._layout, block_ids)

    def _alone(self, past: list[int], spare: list[int], handed: States | None) -> Bytes:
        """Keys and values of the last chunk, each layer's computed alone into spare blocks that hold poison."""
        wipe(self._layout, spare, value=_POISON)
        forward, probe = self._forward, self.probe
        tokens, start = probe.chunk(len(probe.chunk_ends) - 1), len(probe.tokens) - probe.chunk_tokens
        before = past[: start // self._layout.block_size]
        next_token = probe.token_after(len(probe.tokens))
        carry: Carry | None = None
        for layer in range(forward.handle.num_layers):
            for blocks, kv_only in (([*before, *spare], True), (past, False)):
                piece = forward.piece(start, tokens, blocks, _copied(handed), next_token=next_token)
                out = forward.run(piece, _copied(carry), layers=(layer, layer + 1), kv_only_top=kv_only)
            carry = out
        forward.wait()
        return gathered(self._layout, spare)

    def _behind(self, window: int, past: list[int], spare: list[int]) -> Difference | None:
        """Compare a chunk that lies a window's length behind the start of a prompt whose past repeats some blocks."""
        size, tokens = self._layout.block_size, self.probe.chunk(0)
        start = -(-window // size) * size
        blocks = [past[index % len(past)] for index in range(start // size)] + spare
        prompt = [tokens[index % len(tokens)] for index in range(start)] + list(tokens)
        handle, next_token = self._forward.handle, tokens[0]
        [handed] = _handed([step_by_engine(handle, prompt, blocks, start=start, next_token=next_token)])
        own = gathered(self._layout, spare)
        wipe(self._layout, spare, value=_POISON)
        piece = self._forward.piece(start, tokens, blocks, handed, next_token=next_token)
        self._forward.run(piece, None, layers=(0, handle.num_layers))
        self._forward.wait()
        restored = gathered(self._layout, spare)
        return self._compare(own, restored, f"behind its window of {window} tokens")

    def _long_windows(self) -> Iterator[int]:
        """Windows that the probe does not reach, of those that a prompt can reach; of all stages, in the same order."""
        longest = int(self._forward.handle.vllm_config.model_config.max_model_len)
        here = {getattr(each, "sliding_window", None) or 0 for each in self._forward.attention_layers()}
        for window in sorted(set().union(*of_all_ranks({each for each in here if isinstance(each, int)}))):
            reach = -(-window // self._layout.block_size) * self._layout.block_size + self.probe.chunk_tokens
            if window > len(self.probe.tokens) and reach < longest:
                yield window

    def _compare(self, own: Bytes, restored: Bytes, where: str) -> Difference | None:
        for layer, name in enumerate(self._forward.handle.layer_names):
            if not np.array_equal(own[layer], restored[layer]):
                worst = _worst_difference(own[layer], restored[layer], self._layout.dtype)
                share = float((own[layer] != restored[layer]).mean())
                return Difference(where=where, layer=name, worst=worst, share=share)
        return None


def _handed(steps: Sequence[SeenStep]) -> list[States | None]:
    """What each chunk's first layer was handed.

    Raises:
        UnsupportedModelError: Of a model that is called with what a partial forward does not give it.
    """
    for step in steps:
        if step.refusal:
            raise UnsupportedModelError(step.refusal)
    return [step.states for step in steps]


def _target(probe: Probe, block_ids: list[int], layers_per_block: int) -> RestoreTarget:
    return RestoreTarget(
        restore_id=-1,
        request_id="self-test",
        start=0,
        object_start=0,
        chunk_ends=probe.chunk_ends,
        tokens=probe.tokens,
        next_token=probe.token_after(len(probe.tokens)),
        block_ids=tuple(block_ids),
        namespace="",
        chain_hashes=("",) * len(probe.chunk_ends),
        layers_per_block=layers_per_block,
    )


def _copied(nest: Any) -> Any:  # noqa: ANN401
    return mapped(nest, torch.clone)


def _copies_are_equal(layout: BlockLayout, block_ids: list[int], own: Bytes) -> bool:
    """Put the bytes into blocks that hold something else, and take them out again."""
    wipe(layout, block_ids, value=_POISON)
    wiped = all((each == _POISON).all() for each in gathered(layout, block_ids))
    layout.fence()
    layout.scatter(0, layout.num_layers, block_ids, np.concatenate([each.reshape(-1) for each in own]))
    return wiped and all(map(np.array_equal, gathered(layout, block_ids), own))


def _random_bytes(layout: BlockLayout, num_blocks: int) -> Bytes:
    size = layout.num_bytes(0, layout.num_layers, num_blocks)
    random = np.random.default_rng(11).integers(0, 256, size, dtype=np.uint8)
    return layout.by_layer(random, 0, layout.num_layers, num_blocks)


def _worst_difference(own: Payload, restored: Payload, dtype: torch.dtype) -> float:
    """Largest absolute difference of bytes that differ; infinite where a number is NaN or numbers are equal."""
    values = [torch.from_numpy(np.ascontiguousarray(each).reshape(-1)).view(dtype).double() for each in (own, restored)]
    worst = float((values[0] - values[1]).abs().max())
    return worst if worst > 0 else float("inf")
