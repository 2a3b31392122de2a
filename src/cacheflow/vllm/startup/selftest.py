"""Proves at start that restored KV equals the engine's own; what it cannot prove is not recomputed.

A probe of a few short chunks is prefilled by the engine's own steps. Then it is restored in other blocks, which hold
poison before: cells recomputed by partial forwards, cut at every boundary at which a restoration may be cut, the rest
copied as loads would be. Every byte of every layer must be equal, and in a hybrid model the running states at the end
too. Each layer is also run for its keys and values alone,
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
from cacheflow.plan.grid import Tile, block_layers
from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.models.boundary_states import States
from cacheflow.vllm.models.layers import Carry, mapped
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.startup.agreement import of_all_ranks
from cacheflow.vllm.startup.probe import (
    Probe,
    Scratch,
    SeenStep,
    gathered,
    make_probe,
    run_by_engine,
    scratch_blocks,
    step_by_engine,
    wipe,
)
from cacheflow.vllm.worker.layout import BlockLayout, Payload
from cacheflow.vllm.worker.recompute import VllmComputePort
from cacheflow.vllm.worker.state_blocks import StateBlocks

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
        worst: Largest absolute difference in it; infinite where a number is NaN, and of running states.
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
        states: Whether running states were compared too.
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
    states: bool = False

    def __str__(self) -> str:
        """What was proved, in one line."""
        what = "restored KV and running states" if self.states else "restored KV"
        parts = [f"{self.num_tokens} tokens in {self.num_chunks} chunks, {what} equal to the engine's bit for bit"]
        if self.num_cuts:
            parts.append(f"cut at {self.num_cuts} layers, keys and values alone in each")
        if self.windows:
            parts.append(f"behind windows of {', '.join(map(str, self.windows))} tokens")
        return ", ".join(parts)


def self_test(
    layout: BlockLayout,
    forward: PartialForward | None,
    states: StateBlocks | None = None,
    *,
    chunk_tokens: int,
    layers_per_block: int = 1,
) -> SelfTestResult:
    """Run a probe prompt in scratch blocks at the end of the KV cache; they are zero afterwards.

    Call after KV caches are registered and before anything is served, on every rank.

    Args:
        layout: The registered KV blocks.
        forward: How cells are recomputed; None tests copies alone.
        states: The running states of a hybrid model.
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
        with scratch_blocks(layout, num_tokens, states) as scratch:
            copy_equal = _copies_are_equal(layout, scratch.kv, _random_bytes(layout, len(scratch.kv)))
            if states is not None:
                copy_equal = copy_equal and _state_copies_are_equal(states, scratch.states[0])
    else:
        test = _RecomputeTest(forward, layout, states, layers_per_block)
        num_tokens, num_chunks = len(test.probe.tokens), len(test.probe.chunk_ends)
        needed = 2 * num_tokens + test.probe.chunk_tokens
        with scratch_blocks(layout, needed, states, num_states=num_chunks + 1) as scratch:
            copy_equal, difference = test.run(scratch)
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
        states=states is not None,
    )


class _RecomputeTest:
    """The probe of one engine, and what it is compared by."""

    def __init__(
        self, forward: PartialForward, layout: BlockLayout, states: StateBlocks | None, layers_per_block: int
    ) -> None:
        self._forward, self._layout, self._states = forward, layout, states
        handle = forward.handle
        self._layers_per_block = handle.num_layers if handle.compiled else layers_per_block
        self._num_blocks = -(-handle.num_layers // self._layers_per_block)
        self.probe = make_probe(handle, num_chunks=_NUM_CHUNKS)
        self.num_cuts = self._num_blocks - 1
        self.windows = () if handle.compiled else tuple(self._long_windows())

    def run(self, scratch: Scratch) -> tuple[bool, Difference | None]:
        """Whether copies are equal, and where recomputation is not.

        ``scratch`` holds the probe twice and a chunk, and states after each chunk and once more.
        """
        layout, probe, handle, block_ids = self._layout, self.probe, self._forward.handle, scratch.kv
        *engine_states, our_states = scratch.states
        count = len(probe.tokens) // layout.block_size
        engines, ours, spare = block_ids[:count], block_ids[count : 2 * count][::-1], block_ids[2 * count :]
        handed = _handed(run_by_engine(handle, probe, engines, engine_states))
        own = gathered(layout, engines)
        copy_equal = _copies_are_equal(layout, engines, own)
        restored = self._restored(ours, own, handed, own_states=our_states, end_states=engine_states[-1])
        where = "when it is recomputed layer by layer"
        found = [self._compare(own, restored, where), self._compare_states(engine_states[-1], our_states, where)]
        # Nothing is left out after a difference: other ranks may have found none, and layers are run by all together.
        if not handle.compiled:
            last = [each[count - len(spare) :] for each in own]
            alone = self._alone(engines, spare, handed[-1], scratch.states[-3:])
            found.append(self._compare(last, alone, "when its keys and values are computed alone"))
        found += [self._behind(window, engines, spare) for window in self.windows]
        return copy_equal, next((each for each in found if each is not None), None)

    def _restored(
        self,
        block_ids: list[int],
        own: Bytes,
        handed: Sequence[States | None],
        *,
        own_states: tuple[int, ...],
        end_states: tuple[int, ...],
    ) -> Bytes:
        """Restore the probe into poisoned blocks: a staircase is recomputed, the rest copied from ``own``.

        Of the rows that are not recomputed to the end the states are copied from ``end_states``.
        """
        wipe(self._layout, block_ids, value=_POISON)
        if self._states is not None:
            wipe(self._states.layout, list(own_states), value=_POISON)
        target = _target(self.probe, block_ids, self._layers_per_block, own_states)
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
                loaded = np.concatenate([each[first:last].reshape(-1) for each in own[layer:]])
                self._layout.scatter(layer, self._layout.num_layers, block_ids[first:last], loaded)
        port.finish()
        if self._states is not None and layer < self._states.num_rows:
            payload = np.empty(self._states.num_bytes(layer, self._states.num_rows), dtype=np.uint8)
            self._states.gather(layer, self._states.num_rows, end_states, payload)
            self._states.scatter(layer, self._states.num_rows, own_states, payload)
        return gathered(self._layout, block_ids)

    def _alone(
        self, past: list[int], spare: list[int], handed: States | None, states: Sequence[tuple[int, ...]]
    ) -> Bytes:
        """Keys and values of the last chunk, each layer's computed alone into spare blocks that hold poison.

        ``states`` are the running states before the chunk, those after it, and room for more.
        """
        wipe(self._layout, spare, value=_POISON)
        forward, probe = self._forward, self.probe
        tokens, start = probe.chunk(len(probe.chunk_ends) - 1), len(probe.tokens) - probe.chunk_tokens
        before = past[: start // self._layout.block_size]
        next_token = probe.token_after(len(probe.tokens))
        carry: Carry | None = None
        for layer in range(forward.handle.num_layers):
            for blocks, kv_only in (([*before, *spare], True), (past, False)):
                if self._states is not None and start:
                    self._states.copy(states[0], states[-1])
                segment = forward.segment(
                    start, tokens, blocks, _copied(handed), state_blocks=states[-1], next_token=next_token
                )
                out = forward.run(segment, _copied(carry), layers=(layer, layer + 1), kv_only_top=kv_only)
            carry = out
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
        segment = self._forward.segment(start, tokens, blocks, handed, next_token=next_token)
        self._forward.run(segment, None, layers=(0, handle.num_layers))
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

    def _compare_states(self, own: tuple[int, ...], restored: tuple[int, ...], where: str) -> Difference | None:
        """Compare the running states of all rows in two blocks of each group."""
        states = self._states
        if states is None:
            return None
        found = [np.empty(states.num_bytes(0, states.num_rows), dtype=np.uint8) for _ in range(2)]
        for blocks, out in zip((own, restored), found, strict=True):
            states.gather(0, states.num_rows, blocks, out)
        own_L, restored_L = (states.layout.by_layer(each, 0, states.layout.num_layers, 1) for each in found)
        for name, one, other in zip(states.layout.layer_names, own_L, restored_L, strict=True):
            if not np.array_equal(one, other):
                return Difference(where=where, layer=name, worst=float("inf"), share=float((one != other).mean()))
        return None

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


def _target(probe: Probe, block_ids: list[int], layers_per_block: int, state_blocks: tuple[int, ...]) -> RestoreTarget:
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
        state_blocks=state_blocks,
    )


def _copied(nest: Any) -> Any:  # noqa: ANN401
    return mapped(nest, torch.clone)


def _copies_are_equal(layout: BlockLayout, block_ids: list[int], own: Bytes) -> bool:
    """Put the bytes into blocks that hold something else, as reads are placed, and take them out again."""
    wipe(layout, block_ids, value=_POISON)
    wiped = all((each == _POISON).all() for each in gathered(layout, block_ids))
    payload = np.concatenate([each.reshape(-1) for each in own])
    layout.place(0, layout.num_layers, block_ids, payload, after=layout.fence())
    return wiped and all(map(np.array_equal, gathered(layout, block_ids), own))


def _state_copies_are_equal(states: StateBlocks, blocks: Sequence[int]) -> bool:
    """The same of running states, one row after the other: layers of two groups share the memory of a block."""
    size = states.num_bytes(0, states.num_rows)
    taken = np.empty(size, dtype=np.uint8)
    for payload in (np.full(size, _POISON, dtype=np.uint8), _random(size)):
        states.scatter(0, states.num_rows, blocks, payload)
        states.gather(0, states.num_rows, blocks, taken)
        if not np.array_equal(taken, payload):
            return False
    return True


def _random_bytes(layout: BlockLayout, num_blocks: int) -> Bytes:
    size = layout.num_bytes(0, layout.num_layers, num_blocks)
    return layout.by_layer(_random(size), 0, layout.num_layers, num_blocks)


def _random(size: int) -> Payload:
    return np.random.default_rng(11).integers(0, 256, size, dtype=np.uint8)


def _worst_difference(own: Payload, restored: Payload, dtype: torch.dtype) -> float:
    """Largest absolute difference of bytes that differ; infinite where a number is NaN or numbers are equal."""
    values = [torch.from_numpy(np.ascontiguousarray(each).reshape(-1)).view(dtype).double() for each in (own, restored)]
    worst = float((values[0] - values[1]).abs().max())
    return worst if worst > 0 else float("inf")
