"""Measures what recomputation costs in this worker, in seconds rather than minutes.

Attention over a longer past costs linearly more, so a few offsets suffice: they are measured from the near end on
while the budget lasts, and the far end is extended linearly. The past is not real: its blocks repeat and hold zeros,
which costs the same time. Measured on the worker's main thread before anything is served, on every rank.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable, GoldenPoint
from cacheflow.plan.engine_pass import EnginePass
from cacheflow.plan.problem import Seconds
from cacheflow.vllm.models.layers import mapped
from cacheflow.vllm.models.partial_forward import PartialForward
from cacheflow.vllm.startup.agreement import from_first_rank
from cacheflow.vllm.startup.probe import Scratch, scratch_blocks
from cacheflow.vllm.worker.layout import BlockLayout
from cacheflow.vllm.worker.state_blocks import StateBlocks

logger = logging.getLogger(__name__)

_PAST_TOKENS = 8192
"""Distinct tokens of the past; more than any CPU cache holds of a layer's keys and values, then they repeat."""
_LAYERS_TIMED = 6
"""A pass over several layers, so that weights come from memory as in a real one; on CUDA in as few calls as can be, and
timed by events, so that neither calls nor waits count for layers."""
_REPEATS = 3
_LEAST_RECURRENT = 2
"""Kernels of recurrent layers prefill no single token (vLLM 0.32 on the CPU); two take as long."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What costs are asked for.

    Attributes:
        chunk_tokens: Longest chunk.
        pass_tokens: Most tokens that the engine's own prefill takes in one pass.
        max_tokens: Farthest offset; the table covers every offset up to it.
    """

    chunk_tokens: int
    pass_tokens: int
    max_tokens: int


def calibrate(
    forward: PartialForward,
    layout: BlockLayout,
    states: StateBlocks | None = None,
    *,
    identity: CostIdentity,
    lengths: Lengths,
    budget_s: float = 8.0,
) -> CostTable:
    """Measure chunks at offsets, for each kind of layer, and the engine's own longest pass.

    Uses scratch blocks at the end of the KV cache; they are zero afterwards. Tensor-parallel ranks measure together and
    all return the first rank's table, each under its own identity. Takes roughly ``budget_s``, but the two nearest
    offsets are measured whatever they take.
    """
    size, max_tokens = layout.block_size, lengths.max_tokens
    chunk_tokens = min(lengths.chunk_tokens, max_tokens)
    num_blocks = layout.num_blocks - 1 - (0 if states is None else states.num_groups)
    past_tokens = min(_PAST_TOKENS, max_tokens, num_blocks * size - chunk_tokens)
    past_tokens = max(size, past_tokens // size * size)
    layer_kinds = _kinds(forward, layout)
    names = sorted(set(layer_kinds))
    pass_tokens = max(chunk_tokens, min(lengths.pass_tokens, max_tokens, num_blocks * size))
    with scratch_blocks(layout, max(past_tokens + chunk_tokens, pass_tokens), states) as scratch:
        meter = _Meter(forward, scratch, past_blocks=past_tokens // size)
        kinds = {}
        for kind in names:
            layers = [layer for layer, each in enumerate(layer_kinds) if each == kind]
            axes = (_lengths(chunk_tokens, size), _offsets(max_tokens, chunk_tokens, size))
            few = _a_few(layers, neighbours=forward.queues)
            kinds[kind] = _grid(meter, few, *axes, budget_s=budget_s / len(names), max_tokens=max_tokens)
        every = _a_few(list(range(len(layer_kinds))), neighbours=forward.queues)
        overhead_s = meter.seconds(1, 0, every)
        head_s = meter.head_s()
        reach = Lengths(chunk_tokens=chunk_tokens, pass_tokens=pass_tokens, max_tokens=max_tokens)
        engine_pass = _engine_pass(meter, every, [kinds[kind] for kind in layer_kinds], reach, budget_s=budget_s)
    kinds, overhead_s, head_s, engine_pass = from_first_rank((kinds, overhead_s, head_s, engine_pass))
    return CostTable(
        identity=identity,
        layer_kinds=layer_kinds,
        kinds=kinds,
        head_s=head_s,
        call_overhead_s=overhead_s,
        golden=tuple(_golden(kind, grid) for kind, grid in kinds.items()),
        engine_pass=engine_pass,
    )


def _lengths(chunk_tokens: int, block_size: int) -> list[int]:
    return sorted({1, min(block_size, chunk_tokens), max(1, chunk_tokens // 2), chunk_tokens})


def _offsets(max_tokens: int, chunk_tokens: int, block_size: int) -> list[int]:
    """0, fourfold steps from 1,024 tokens on, the farthest at which a whole chunk fits, and the end; whole blocks."""
    fits = (max_tokens - chunk_tokens) // block_size * block_size
    steps = [0]
    step = max(block_size, 1024 // block_size * block_size)
    while step < fits:
        steps.append(step)
        step *= 4
    return sorted({*steps, fits, -(-max_tokens // block_size) * block_size})


def _a_few(layers: list[int], *, neighbours: bool) -> list[int]:
    """A few of the layers: evenly or, where they are to run in one call, from the middle of the longest stretch."""
    longest = [*range(*max(_stretches(layers), key=lambda stretch: stretch[1] - stretch[0]))]
    if neighbours and len(longest) > 1:
        count = min(_LAYERS_TIMED, len(longest))
        first = (len(longest) - count) // 2
        return longest[first : first + count]
    count = min(_LAYERS_TIMED, len(layers))
    return [layers[index * len(layers) // count] for index in range(count)]


def _stretches(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring layers as ``[lo, hi)``."""
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and found[-1][1] == layer:
            found[-1] = found[-1][0], layer + 1
        else:
            found.append((layer, layer + 1))
    return found


def _kinds(forward: PartialForward, layout: BlockLayout) -> tuple[str, ...]:
    """Kind of each row of this stage: by whether its attention has a window, and by what else it is made of.

    In a mixture of experts some layers may be dense. Heads that differ show in what a layer keeps of a token: on the
    CPU linear layers have no weights left to be told apart by.
    """
    layers, drafter = forward.handle.layers, forward.handle.drafter
    found, names = dict[tuple[str, ...], str](), list[str]()
    for row, core in enumerate(forward.attention_layers()):
        base = _FULL if getattr(core, "sliding_window", None) in (None, -1, (-1, -1)) else _SLIDING
        made_of: tuple[str, ...] = (base, str(layout.block_bytes_L[row]))
        modules: tuple[torch.nn.Module, ...] = ()
        if layers is not None and row < layers.num_rows:
            modules = layers.modules[slice(*layers.span(row, row + 1))]
        elif drafter is not None:
            modules = (drafter.model,)
        made_of += tuple(_description(each) for module in modules for each in module.modules())
        if made_of not in found:
            others = sum(name.startswith(base) for name in found.values())
            found[made_of] = f"{base}_{others + 1}" if others else base
        names.append(found[made_of])
    return tuple(names)


def _description(module: torch.nn.Module) -> str:
    """Its class and how much it weighs; nothing that differs from layer to layer of one kind."""
    return f"{type(module).__name__} {sum(weight.numel() for weight in module.parameters(recurse=False))}"


def _grid(
    meter: _Meter, layers: list[int], lengths: list[int], offsets: list[int], *, budget_s: float, max_tokens: int
) -> CostGrid:
    """Measure one kind of layer as far as the budget and the model's longest sequence allow, extend the rest."""
    started_s = time.perf_counter()
    full_QP = np.zeros((len(lengths), len(offsets)))
    measured = 0
    column_s = 0.0
    for index, offset in enumerate(offsets):
        elapsed_s = time.perf_counter() - started_s
        stretch = (offset + lengths[-1]) / (offsets[index - 1] + lengths[-1]) if index else 1.0
        fits = offset + lengths[-1] <= max_tokens  # beyond, there is no rotary embedding
        affordable = index < 2 or elapsed_s + column_s * stretch <= budget_s
        if not from_first_rank(fits and affordable):
            break
        full_QP[:, index] = [meter.seconds(length, offset, layers) for length in lengths]
        column_s = time.perf_counter() - started_s - elapsed_s
        measured = index + 1
    if measured < len(offsets):
        logger.info("costs measured up to offset %d, extended linearly to %d", offsets[measured - 1], offsets[-1])
        _extend(full_QP, offsets, measured)
    kv_only_Q = [meter.seconds(length, 0, layers, kv_only=True) for length in lengths]
    # A longer chunk never costs less, and neither does a longer past: the rest is noise, which only adds.
    full_QP = np.minimum.accumulate(full_QP[::-1], axis=0)[::-1]
    full_QP = np.maximum.accumulate(full_QP, axis=1)
    kv_only_QP = np.minimum(np.array(kv_only_Q)[:, None], full_QP)
    return CostGrid(chunk_tokens=tuple(lengths), offsets=tuple(offsets), full_QP=full_QP, kv_only_QP=kv_only_QP)


def _extend(full_QP: Seconds, offsets: Sequence[int], measured: int) -> None:
    """Continue each row along the line through its last two measured points; never downwards."""
    far = offsets[measured - 1]
    slope_Q = np.zeros(len(full_QP))
    if measured > 1:
        rise_Q = full_QP[:, measured - 1] - full_QP[:, measured - 2]
        slope_Q = np.maximum(0.0, rise_Q / (far - offsets[measured - 2]))
    for index in range(measured, len(offsets)):
        full_QP[:, index] = full_QP[:, measured - 1] + slope_Q * (offsets[index] - far)


def _engine_pass(
    meter: _Meter, layers: list[int], grids_L: Sequence[CostGrid], lengths: Lengths, *, budget_s: float
) -> EnginePass | None:
    """How much less vLLM's own prefill takes than the chunks of a save; see ``plan/engine_pass.py``.

    Times the longest pass at offset 0 that the budget allows; None when it has no two chunks. The pass holds
    collectives, so its length is the first rank's.
    """
    chunk_tokens = lengths.chunk_tokens
    chunks_s = [0.0]
    for count in range(1, lengths.pass_tokens // chunk_tokens + 1):
        total_s = chunks_s[-1] + sum(grid.full_s(chunk_tokens, (count - 1) * chunk_tokens) for grid in grids_L)
        if count > 2 and total_s * (_REPEATS + 1) > budget_s:  # all layers: on the safe side
            break
        chunks_s.append(total_s)
    count = from_first_rank(len(chunks_s) - 1)
    if count < 2:
        return None
    first_s = sum(grid.full_s(chunk_tokens, 0) for grid in grids_L)
    total_s = sum(grid.full_s(chunk_tokens, index * chunk_tokens) for grid in grids_L for index in range(count))
    saved_s = (total_s - meter.seconds(count * chunk_tokens, 0, layers) * len(grids_L)) / (count - 1)
    # A boundary cannot save more than a chunk; noise can say that it does, or that it costs something.
    saved_s = min(max(0.0, saved_s), first_s)
    return EnginePass(pass_tokens=lengths.pass_tokens, chunk_tokens=chunk_tokens, saved_s=saved_s)


class _Meter:
    """Times chunks of one layer; median of a few repeats after one that is thrown away."""

    def __init__(self, forward: PartialForward, scratch: Scratch, *, past_blocks: int) -> None:
        """Write chunks after the first ``past_blocks`` of the scratch blocks, which stand for any past."""
        self._forward, self._states = forward, scratch.states[0]
        self._past, self._every = scratch.kv[:past_blocks], scratch.kv
        self._target = scratch.kv[past_blocks:]
        self._generator = torch.Generator().manual_seed(5)

    def seconds(self, length: int, offset: int, layers: list[int], *, kv_only: bool = False) -> float:
        """Seconds of one layer for ``length`` tokens after ``offset``."""
        handle = self._forward.handle
        if self._states:
            length = max(length, _LEAST_RECURRENT)
        past = [self._past[index % len(self._past)] for index in range(offset // handle.block_size)]
        boundary = None
        if not handle.is_first_stage:
            boundary = handle.boundary.random(length, self._generator, device=handle.device)
        blocks = [*past, *self._target] if offset else self._every
        segment = self._forward.segment(offset, [1] * length, blocks, boundary, state_blocks=self._states)
        if handle.compiled:
            return self._median_s(lambda: self._forward.run_whole(segment)) / handle.num_layers
        # What a layer returns for so many tokens is what the next one is given; which numbers does not matter.
        given = self._forward.run(segment, None, layers=(0, 1))
        # Of several layers in one call only the top one can be left after its keys and values.
        joined = self._forward.queues and not kv_only
        calls = _stretches(layers) if joined else [(layer, layer + 1) for layer in layers]
        states = [mapped(given, torch.clone) for _ in calls]

        def one_pass() -> None:
            for rows, carry in zip(calls, states, strict=True):
                self._forward.run(segment, carry, layers=rows, kv_only_top=kv_only)

        return self._median_s(one_pass) / len(layers)

    def head_s(self) -> float:
        """Seconds of the LM head for one token; 0 where this stage has none."""
        handle = self._forward.handle
        if handle.shard.pp_rank != handle.shard.pp_size - 1:
            return 0.0
        hidden = torch.randn((1, handle.hidden_size), generator=self._generator).to(handle.device, handle.dtype)

        def head() -> None:
            with torch.inference_mode():
                handle.model.compute_logits(hidden)

        return self._median_s(head)

    def _median_s(self, work: Callable[[], object]) -> float:
        return statistics.median([self._seconds(work) for _ in range(_REPEATS + 1)][1:])

    def _seconds(self, work: Callable[[], object]) -> float:
        """Seconds of work: on CUDA the device's own, with whatever it waited for launching."""
        before = self._forward.record()
        if before is not None:
            before.wait()
        started_s, begin = time.perf_counter(), self._forward.record()
        work()
        end = self._forward.record()
        if begin is None or end is None:
            return time.perf_counter() - started_s
        end.wait()
        return end.seconds_after(begin)


def _golden(kind: str, grid: CostGrid) -> GoldenPoint:
    """One interpolated query with its answer, to notice a damaged file by."""
    chunk, offset = grid.chunk_tokens[-1], (grid.offsets[0] + grid.offsets[-1]) // 2
    expected_s = grid.full_s(chunk, offset)
    return GoldenPoint(kind=kind, chunk_tokens=chunk, offset=offset, kv_only=False, expected_s=expected_s)
