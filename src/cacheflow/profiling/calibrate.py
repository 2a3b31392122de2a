"""Calibration: what this model costs on this machine, and from which lengths which way of restoring pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from cacheflow.engine.identity import model_identity
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.runner import LayerRunner
from cacheflow.errors import ConfigError
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostTable, GoldenPoint, build_problem
from cacheflow.plan.grid import Grid
from cacheflow.plan.plan import Choice
from cacheflow.plan.problem import LinkCost
from cacheflow.policies.registry import make_policy
from cacheflow.profiling.measure import ChunkPoint, CostMeter
from cacheflow.profiling.profile import Profile

OnStep = Callable[[str, int, int], None]
"""Called with what is measured, steps done, steps in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What is measured.

    Attributes:
        chunk_tokens: Longest chunk; shorter ones are measured down to a single token.
        max_tokens: Longest sequence; None for the model's own limit, at most 8,192.
        repeats: Rounds; medians are kept.
        suffix_tokens: New tokens assumed for crossover and break-even.
    """

    chunk_tokens: int = 512
    max_tokens: int | None = None
    repeats: int = 2
    suffix_tokens: int = 64

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A count is below 1.
        """
        for key in ("chunk_tokens", "repeats", "suffix_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}, must be at least 1")
        if self.max_tokens is not None and self.max_tokens < self.chunk_tokens:
            raise ConfigError(f"max_tokens {self.max_tokens} is below chunk_tokens {self.chunk_tokens}")


@dataclass(slots=True)
class Calibration:
    """Measures one model; ``run`` may be called once."""

    model: LoadedModel
    options: CalibrationOptions
    on_step: OnStep = field(default=lambda what, done, total: None)

    def __post_init__(self) -> None:
        """Check that a chunk fits the model.

        Raises:
            ConfigError: It does not.
        """
        if self.options.chunk_tokens > self.max_tokens:
            raise ConfigError(f"chunk_tokens {self.options.chunk_tokens} exceeds the model's {self.max_tokens} tokens")

    def run(self, link: LinkCost) -> Profile:
        """Measure compute, then work out crossover and break-even over ``link``."""
        costs = self.measure_costs()
        runner = LayerRunner(self.model)
        meter = CostMeter(runner, max_tokens=self.max_tokens)
        lengths = [n for n in (512, 1024, 2048, 4096) if n <= self.max_tokens]
        big_pass_s = {}
        for done, length in enumerate(lengths, start=1):
            big_pass_s[length] = meter.measure_big_pass_s(length, repeats=1) * self.model.shape.num_layers
            self.on_step("one big pass", done, len(lengths))
        return Profile(
            costs=costs,
            link=link,
            chunk_tokens=self.options.chunk_tokens,
            crossover_tokens=self._crossover_tokens(costs, link),
            break_even_tokens=self._break_even_tokens(costs, link),
            big_pass_s=big_pass_s,
        )

    @property
    def max_tokens(self) -> int:
        """Longest sequence measured."""
        return min(self.options.max_tokens or 8192, self.model.max_tokens)

    def measure_costs(self) -> CostTable:
        """The cost table: every kind of layer, every chunk length at every offset."""
        chunk, longest = self.options.chunk_tokens, self.max_tokens
        lengths = sorted({1, 16, max(1, chunk // 8), max(1, chunk // 2), chunk})
        offsets = sorted({0, *(o for o in (512, 1024, 2048, 4096, 6144) if o < longest), longest})
        runner = LayerRunner(self.model)
        layer_kinds = kinds_of_layers(self.model)
        kinds: dict[str, CostGrid] = {}
        for kind in dict.fromkeys(layer_kinds):
            layers = [layer for layer, each in enumerate(layer_kinds) if each == kind]
            meter = CostMeter(runner, max_tokens=longest + lengths[-1], layers=layers)
            kinds[kind] = self._measure_kind(meter, kind, lengths, offsets)
        meter = CostMeter(runner, max_tokens=1)
        return CostTable(
            identity=model_identity(self.model),
            layer_kinds=layer_kinds,
            kinds=kinds,
            head_s=meter.measure_head_s(),
            call_overhead_s=meter.measure_call_overhead_s(),
            golden=tuple(_golden(kinds)),
        )

    def _measure_kind(self, meter: CostMeter, kind: str, lengths: list[int], offsets: list[int]) -> CostGrid:
        points = [ChunkPoint(length, offset) for length in lengths for offset in offsets]
        total, done = len(points) * self.options.repeats, 0

        def step() -> None:
            nonlocal done
            done += 1
            self.on_step(f"chunks by offset, {kind} layers", done, total)

        measured = meter.measure_chunks(points, repeats=self.options.repeats, on_step=step)
        full_QP = np.array([[measured[ChunkPoint(q, p)].full_s for p in offsets] for q in lengths])
        kv_only_QP = np.array([[measured[ChunkPoint(q, p)].kv_only_s for p in offsets] for q in lengths])
        return CostGrid(
            chunk_tokens=tuple(lengths),
            offsets=tuple(offsets),
            full_QP=full_QP,
            kv_only_QP=np.minimum(kv_only_QP, full_QP),
        )

    def _lengths(self) -> range:
        step = max(1, self.options.chunk_tokens // 4)
        return range(step, self.max_tokens - self.options.suffix_tokens + 1, step)

    def _crossover_tokens(self, costs: CostTable, link: LinkCost) -> int:
        """``L_delta``: longest prefix whose layer-wise restoration is predicted no slower than token-wise.

        Source: CacheFlow v1, figure 3.
        """
        layer_wise = make_policy("cacheflow_v1", crossover_tokens=10**9)
        token_wise = make_policy("cacheflow_v1", crossover_tokens=0)
        crossover = 0
        for length in self._lengths():
            problem = build_problem(costs, self._grid(length, 0), self.model.shape, link=link)
            if layer_wise.plan(problem).predicted.restore_s <= token_wise.plan(problem).predicted.restore_s:
                crossover = length
        return crossover

    def _break_even_tokens(self, costs: CostTable, link: LinkCost) -> int | None:
        """Shortest prefix that the guard does not leave to recomputation."""
        policy = make_policy("cacheflow")
        for length in self._lengths():
            problem = build_problem(costs, self._grid(length, self.options.suffix_tokens), self.model.shape, link=link)
            guard = policy.plan(problem).guard
            if guard is not None and guard.choice is not Choice.RECOMPUTE:
                return length
        return None

    def _grid(self, num_tokens: int, suffix_tokens: int) -> Grid:
        return Grid.regular(
            num_tokens=num_tokens,
            chunk_tokens=self.options.chunk_tokens,
            num_blocks=self.model.shape.num_layers,
            suffix_tokens=suffix_tokens,
        )


def kinds_of_layers(model: LoadedModel) -> tuple[str, ...]:
    """Kind of each layer, bottom first: ``full_attention`` or ``sliding_attention``."""
    config = model.module.config
    listed = getattr(config, "layer_types", None)
    if listed:
        return tuple(listed)
    kind = "sliding_attention" if model.shape.sliding_window is not None else "full_attention"
    return (kind,) * model.shape.num_layers


def _golden(kinds: dict[str, CostGrid]) -> Iterator[GoldenPoint]:
    """One measured and one interpolated point of each kind."""
    for kind, costs in kinds.items():
        middle = (costs.offsets[0] + costs.offsets[-1]) // 2
        for chunk_tokens, offset in (
            (costs.chunk_tokens[-1], costs.offsets[0]),
            (costs.chunk_tokens[-1] - 1 or 1, middle),
        ):
            for kv_only in (False, True):
                ask = costs.kv_only_s if kv_only else costs.full_s
                yield GoldenPoint(
                    kind=kind,
                    chunk_tokens=chunk_tokens,
                    offset=offset,
                    kv_only=kv_only,
                    expected_s=ask(chunk_tokens, offset),
                )
