"""Proves at load that the engine reproduces the model, and refuses the model if it does not.

Three runs over a few hundred random tokens cut into unequal chunks: chunk by chunk; a staircase (some cells recomputed,
the others copied from the first run, everything else NaN); and the model's own forward with transformers' attention.
Staircase and chunked must be bit-equal. Chunked and the model's own must agree within a tolerance, since one big pass
rounds differently: relative Frobenius error of keys, values and running states (worst layer) and of the last logits.

A window longer than the test never cuts in here; ``tests/engine`` covers windows on small models.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.runner import LayerRunner
from cacheflow.engine.running_states import RunningStates
from cacheflow.errors import SelfTestError
from cacheflow.hybrid_shape import DELTA_CHUNK
from cacheflow.plan.grid import Grid, Tile

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest relative error against the model's own forward. bf16: SmolLM2 (30 layers) has 2.0e-2, random models of three
layers 1e-2, up to 4e-2 in logits; ignoring a window gives 0.2 and more."""

MOE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 5e-2}
"""The same with experts: in half precision rounding sends single tokens to another expert (0.09 seen in bf16)."""

_ENDS = (97, 161, 288, 320)
_HYBRID_ENDS = (2 * DELTA_CHUNK, 3 * DELTA_CHUNK, 5 * DELTA_CHUNK, 6 * DELTA_CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport:
    """What the self-test measured.

    Attributes:
        kv_error: Worst relative error of a layer's keys, values or running state against the model's own forward.
        logits_error: Relative error of the last token's logits.
        tolerance: What both had to stay under.
        staircase_equal: Staircase and chunked gave the same bits, in keys, values, running states and logits.
        elapsed_s: How long it took.
    """

    kv_error: float
    logits_error: float
    tolerance: float
    staircase_equal: bool
    elapsed_s: float

    @property
    def passed(self) -> bool:
        """Whether the model may be served."""
        return self.staircase_equal and self.kv_error <= self.tolerance and self.logits_error <= self.tolerance


def self_test(model: LoadedModel) -> SelfTestReport:
    """Run the three forwards and compare.

    Raises:
        SelfTestError: The report does not pass; the message carries its numbers.
    """
    started_s = time.perf_counter()
    runner = LayerRunner(model)
    wanted = _ENDS if model.shape.row_layers == 1 else _HYBRID_ENDS
    ends = tuple(end for end in wanted if end <= model.max_tokens) or (model.max_tokens,)
    generator = torch.Generator().manual_seed(7)
    tokens: list[int] = torch.randint(model.shape.vocab_size, (ends[-1],), generator=generator).tolist()
    saved = runner.new_kv(ends[-1])
    before_last: dict[int, RunningStates] = {}

    def keep(end: int) -> None:
        if saved.checkpoint is not None and end in ends[-2:-1]:
            before_last[end] = saved.checkpoint.clone()

    logits = runner.prefill(tokens, ends, saved, on_chunk=keep)
    equal = _staircase_equals(runner, tokens, ends, saved, logits, next(iter(before_last.values()), None))
    kv_error, logits_error = _against_own_forward(model, tokens, saved, logits)
    report = SelfTestReport(
        kv_error=kv_error,
        logits_error=logits_error,
        tolerance=tolerance_for(model),
        staircase_equal=equal,
        elapsed_s=time.perf_counter() - started_s,
    )
    if not report.passed:
        raise SelfTestError(
            f"model {model.name!r} ({model.dtype}, {model.device}) is not reproduced: relative error of keys and "
            f"values {kv_error:.2e}, of logits {logits_error:.2e}, at most {report.tolerance:.0e} is allowed; "
            f"staircase bit-equal {equal}"
        )
    return report


def tolerance_for(model: LoadedModel) -> float:
    """Largest relative error against the model's own forward that counts as rounding."""
    return (MOE_TOLERANCE if model.shape.num_experts else TOLERANCE)[model.dtype]


def _staircase_equals(
    runner: LayerRunner,
    tokens: list[int],
    ends: tuple[int, ...],
    saved: KVBuffer,
    logits: torch.Tensor,
    states: RunningStates | None,
) -> bool:
    """Recompute heights that fall along the prefix, copy the rest, run the last chunk as the suffix.

    ``states`` are those of recurrent layers at the end of the prefix.
    """
    shape = runner.model.shape
    num_blocks = shape.num_rows
    grid = Grid(chunk_ends=ends[:-1], suffix_ends=ends[-1:], num_blocks=num_blocks)
    kv = runner.new_kv(ends[-1])
    port = EngineComputePort(runner, grid=grid, tokens=tokens, kv=kv, layers_per_block=shape.row_layers)
    levels = [num_blocks - (num_blocks * chunk) // max(1, grid.num_chunks) for chunk in range(grid.num_chunks)]
    for chunk, level in enumerate(levels):
        middle = level // 2
        if middle:
            port.recompute(Tile(chunk, chunk + 1, 0, middle), kv_only_top=False)
        port.recompute(Tile(chunk, chunk + 1, middle, level), kv_only_top=True)
        if level < num_blocks:
            cell = (level * shape.row_layers, shape.num_layers, *grid.chunk_range(chunk))
            kv.cell(*cell).copy_(saved.cell(*cell))
    if kv.checkpoint is not None and states is not None:
        kv.checkpoint.copy_from(states, (levels[-1] * shape.row_layers, shape.num_layers))
    port.run_suffix(0, num_blocks)
    port.finish()
    same = torch.equal(kv.kv_L2THD, saved.kv_L2THD) and port.logits is not None and torch.equal(port.logits, logits)
    ended, expected = port.end_states, saved.checkpoint
    return same and (ended is None or expected is None or ended.equals(expected))


def _against_own_forward(
    model: LoadedModel, tokens: list[int], kv: KVBuffer, logits: torch.Tensor
) -> tuple[float, float]:
    """Relative errors ``(keys, values and states, logits)`` against one pass with transformers' own attention."""
    own = own_forward(model, tokens)
    kv_error = 0.0
    for layer, entry in enumerate(own.past_key_values.layers):
        if model.shape.is_recurrent(layer):
            assert kv.checkpoint is not None, "recurrent layers have states"
            pairs = [(kv.checkpoint.delta(layer), entry.recurrent_states[0][0])]
        else:
            pairs = [
                (ours.transpose(0, 1), own_1[0])
                for ours, own_1 in zip(kv.of_layer(layer), (entry.keys, entry.values), strict=True)
            ]
        kv_error = max(kv_error, *(relative_error(*pair) for pair in pairs))
    return kv_error, relative_error(logits, own.logits[0, -1].cpu())


def own_forward(model: LoadedModel, tokens: list[int], *, attention: str = "sdpa") -> Any:  # noqa: ANN401 -- transformers output
    """One pass of the model's own ``forward`` with one of transformers' attention functions.

    Returns:
        The transformers output: ``logits [1, 1, V]`` of the last token and ``past_key_values.layers[i].keys`` and
        ``.values [1, H, T, D]``, whole also under a sliding window; of recurrent layers ``.recurrent_states[0]``.
    """
    from transformers import DynamicCache

    config = model.module.config
    ours, config._attn_implementation = config._attn_implementation, attention  # noqa: SLF001 -- read at each call
    try:
        with torch.no_grad():
            ids = torch.tensor([tokens], device=model.device)
            # Told of a window, the cache would drop what lies before it; untold, it knows no recurrent layer.
            cache = DynamicCache() if model.shape.row_layers == 1 else DynamicCache(config=config)
            return model.module(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        config._attn_implementation = ours  # noqa: SLF001


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64; NaN counts as infinite."""
    wide = reference.double()
    error = float((ours.double() - wide).norm() / wide.norm().clamp_min(1e-30))
    return error if error == error else float("inf")
