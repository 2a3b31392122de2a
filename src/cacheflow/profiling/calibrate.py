"""Calibration: what this model costs on this machine, and from which lengths which way of restoring pays."""

from __future__ import annotations

import math
import time
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
from cacheflow.plan.problem import LinkCost, RestoreProblem, Seconds
from cacheflow.plan.steadiness import Steadiness, judge
from cacheflow.policies.registry import make_policy
from cacheflow.profiling.measure import CostMeter
from cacheflow.profiling.profile import Profile
from cacheflow.profiling.survey import LEAST_OFFSETS, ChunkPoint, Survey, Surveyor, median_cost
from cacheflow.types import Clock

OnStep = Callable[[str, int, int], None]
"""Called with what is measured, steps done, steps in all."""
CHUNKS_SHARE = 0.8
"""Part of the time limit that chunks may use; big passes get what is left."""
CALL_REPEATS = 9
"""Times the head and a call without a past are measured, as far as the time allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What is measured.

    Attributes:
        chunk_tokens: Longest chunk; shorter ones are measured down to a single token.
        max_tokens: Longest sequence; None for the model's own limit, at most 8,192.
        repeats: Rounds; medians are kept.
        suffix_tokens: New tokens assumed for crossover and break-even.
        time_limit_s: Seconds that measuring compute may take. What it does not allow is left out, from the far end; a
            measurement under way is not cut off.
    """

    chunk_tokens: int = 512
    max_tokens: int | None = None
    repeats: int = 2
    suffix_tokens: int = 64
    time_limit_s: float = math.inf

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A count is below 1, or the time limit is not above 0.
        """
        for key in ("chunk_tokens", "repeats", "suffix_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}, must be at least 1")
        if self.max_tokens is not None and self.max_tokens < self.chunk_tokens:
            raise ConfigError(f"max_tokens {self.max_tokens} is below chunk_tokens {self.chunk_tokens}")
        if not self.time_limit_s > 0:
            raise ConfigError(f"time_limit_s is {self.time_limit_s}, must be above 0")


@dataclass(slots=True)
class Calibration:
    """Measures one model; ``run`` may be called once.

    Attributes:
        clock: Times everything.
        cpu_clock: Processor seconds of this process.
        busy: What was seen of other work on the machine, for people; empty where rounds and offsets agree.
        left_out: What was not measured, each with why.
    """

    model: LoadedModel
    options: CalibrationOptions
    on_step: OnStep = field(default=lambda what, done, total: None)
    clock: Clock = time.perf_counter
    cpu_clock: Clock = time.process_time
    busy: str = field(default="", init=False)
    left_out: list[str] = field(default_factory=list, init=False)
    _began_s: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Check that a chunk fits the model.

        Raises:
            ConfigError: It does not.
        """
        if self.options.chunk_tokens > self.max_tokens:
            raise ConfigError(f"chunk_tokens {self.options.chunk_tokens} exceeds the model's {self.max_tokens} tokens")

    def run(self, link: LinkCost) -> Profile:
        """Measure compute, then work out crossover and break-even over ``link``.

        Raises:
            ConfigError: The time limit did not allow a table of costs at all; says what was measured.
        """
        costs = self.measure_costs()
        big_pass_s = self._measure_big_passes(costs)
        return Profile(
            costs=costs,
            link=link,
            chunk_tokens=self.options.chunk_tokens,
            crossover_tokens=self._crossover_tokens(costs, link),
            break_even_tokens=self._break_even_tokens(costs, link),
            big_pass_s=big_pass_s,
            busy=self.busy,
        )

    def _measure_big_passes(self, costs: CostTable) -> dict[int, float]:
        lengths = [n for n in (512, 1024, 2048, 4096) if n <= self.max_tokens]
        if self.busy:
            self.left_out.append(f"big passes: {self.busy.partition(':')[0]}")
            return {}
        meter = CostMeter(LayerRunner(self.model), max_tokens=self.max_tokens, clock=self.clock)
        big_pass_s: dict[int, float] = {}
        for done, length in enumerate(lengths, start=1):
            if self._left_s() < self._big_pass_s(costs, length, big_pass_s):
                left = ", ".join(f"{each:,}" for each in lengths[done - 1 :])
                self.left_out.append(f"big passes of {left} tokens: no time")
                break
            big_pass_s[length] = meter.measure_big_pass_s(length, repeats=1) * self.model.shape.num_rows
            self.on_step("one big pass", done, len(lengths))
        return big_pass_s

    def _big_pass_s(self, costs: CostTable, length: int, known: dict[int, float]) -> float:
        """What a big pass is expected to take: four times one of half its length, or its chunks, as far as measured."""
        if length // 2 in known:
            return 4.0 * known[length // 2]
        reach = min(grid.offsets[-1] for grid in costs.kinds.values())
        chunk = self.options.chunk_tokens
        offsets = [min(offset, reach) for offset in range(0, length, chunk)]
        return sum(costs.kinds[kind].full_s(chunk, offset) for kind in costs.layer_kinds for offset in offsets)

    def _left_s(self) -> float:
        """Seconds left of the time limit, which begins when it is first asked for."""
        if self._began_s is None:
            self._began_s = self.clock()
        return self.options.time_limit_s - (self.clock() - self._began_s)

    @property
    def max_tokens(self) -> int:
        """Longest sequence measured."""
        return min(self.options.max_tokens or 8192, self.model.max_tokens)

    def measure_costs(self) -> CostTable:
        """The cost table: every kind of layer, every chunk length at every offset that the time limit allows.

        Raises:
            ConfigError: It does not allow two offsets; says what was measured.
        """
        chunk, longest = self.options.chunk_tokens, self.max_tokens
        lengths = sorted({1, 16, max(1, chunk // 8), max(1, chunk // 2), chunk})
        offsets = sorted({0, *(o for o in (512, 1024, 2048, 4096, 6144) if o < longest), longest})
        runner = LayerRunner(self.model)
        layer_kinds = kinds_of_layers(self.model)
        names = tuple(dict.fromkeys(layer_kinds))
        chunks_s = CHUNKS_SHARE * self._left_s()
        kinds: dict[str, CostGrid] = {}
        for index, kind in enumerate(names):
            layers = [(layer, layer + 1) for layer, each in enumerate(layer_kinds) if each == kind]
            meter = CostMeter(runner, max_tokens=longest + lengths[-1], rows=layers, clock=self.clock)
            spent_s = self.options.time_limit_s - self._left_s() if math.isfinite(chunks_s) else 0.0
            limit_s = (chunks_s - spent_s) / (len(names) - index)
            kinds[kind] = self._measure_kind(meter, kind, (lengths, offsets), num_layers=len(layers), limit_s=limit_s)
        every = [(layer, layer + 1) for layer in range(runner.num_layers)]
        meter = CostMeter(runner, max_tokens=1, rows=every, clock=self.clock)
        call_s = sum(kinds[kind].full_s(1, 0) for kind in layer_kinds)
        repeats = int(max(1.0, min(CALL_REPEATS, self._left_s() / (2 * call_s))))
        return CostTable(
            identity=model_identity(self.model),
            layer_kinds=layer_kinds,
            kinds=kinds,
            head_s=meter.measure_head_s(repeats=repeats),
            call_overhead_s=meter.measure_call_overhead_s(repeats=repeats),
            golden=tuple(_golden(kinds)),
        )

    def _measure_kind(
        self, meter: CostMeter, kind: str, axes: tuple[list[int], list[int]], *, num_layers: int, limit_s: float
    ) -> CostGrid:
        (lengths, offsets), what = axes, f"chunks by offset, {kind} layers"
        meter.time_point(ChunkPoint(lengths[0], 0))  # the first call of all is slower
        cpu_began_s = self.cpu_clock()
        surveyor = Surveyor(meter.time_point, lengths=lengths, offsets=offsets, rounds=self.options.repeats)
        found = surveyor.survey(
            limit_s=limit_s, clock=self.clock, on_step=lambda done, total: self.on_step(what, done, total)
        )
        # On a GPU the process waits.
        on_cpu = self.model.device.type == "cpu"
        cpu_share = (self.cpu_clock() - cpu_began_s) / found.seconds if on_cpu and found.seconds > 0 else None
        steadiness = judge(found.times(num_layers=num_layers), cpu_share=cpu_share)
        if len(found.offsets) < min(LEAST_OFFSETS, len(offsets)):
            raise ConfigError(
                f"the time limit of {self.options.time_limit_s:g} s allows no profile: {found.num_measured} of "
                f"{found.num_wanted} measurements of {kind} layers took {found.seconds:.0f} s, and costs are needed at "
                f"{LEAST_OFFSETS} offsets or more"
                + (f"; {steadiness.complaint}" if steadiness.busy else "")
                + ". Calibrate when the machine is quiet, or give more time"
            )
        self._note(found, kind, offsets, steadiness)
        costs = {point: median_cost(rounds) for point, rounds in found.costs.items()}
        full_QP = _rising(np.array([[costs[ChunkPoint(q, p)].full_s for p in found.offsets] for q in lengths]))
        kv_only_QP = np.array([[costs[ChunkPoint(q, p)].kv_only_s for p in found.offsets] for q in lengths])
        return CostGrid(
            chunk_tokens=tuple(lengths),
            offsets=found.offsets,
            full_QP=full_QP,
            kv_only_QP=np.minimum(kv_only_QP, full_QP),
        )

    def _note(self, found: Survey, kind: str, offsets: list[int], steadiness: Steadiness) -> None:
        """Keep what is to be said of a survey."""
        # Whoever asks for one round cannot have them compared.
        if self.options.repeats > 1 or steadiness.busy:
            self.busy = self.busy or steadiness.complaint
        if far := offsets[len(found.offsets) :]:
            where = ", ".join(f"{each:,}" for each in far)
            self.left_out.append(f"{kind} layers after {where} tokens: no time; costs end at {found.offsets[-1]:,}")
        once = sum(len(rounds) < self.options.repeats for rounds in found.costs.values())
        if once:
            self.left_out.append(f"repeats of {once} of {len(found.costs)} chunks of {kind} layers: no time")

    def _lengths(self, costs: CostTable) -> range:
        """Prefixes that the costs hold, new tokens included."""
        step = max(1, self.options.chunk_tokens // 4)
        reach = min(self.max_tokens, *(grid.offsets[-1] for grid in costs.kinds.values()))
        return range(step, reach - self.options.suffix_tokens + 1, step)

    def _crossover_tokens(self, costs: CostTable, link: LinkCost) -> int:
        """``L_delta``: longest prefix whose layer-wise restoration is predicted no slower than token-wise.

        Source: CacheFlow v1, figure 3.
        """
        layer_wise = make_policy("cacheflow_v1", crossover_tokens=10**9)
        token_wise = make_policy("cacheflow_v1", crossover_tokens=0)
        crossover = 0
        for length in self._lengths(costs):
            problem = self._problem(costs, self._grid(length, 0), link)
            if layer_wise.plan(problem).predicted.restore_s <= token_wise.plan(problem).predicted.restore_s:
                crossover = length
        return crossover

    def _break_even_tokens(self, costs: CostTable, link: LinkCost) -> int | None:
        """Shortest prefix that the guard does not leave to recomputation."""
        policy = make_policy("cacheflow")
        for length in self._lengths(costs):
            problem = self._problem(costs, self._grid(length, self.options.suffix_tokens), link)
            guard = policy.plan(problem).guard
            if guard is not None and guard.choice is not Choice.RECOMPUTE:
                return length
        return None

    def _grid(self, num_tokens: int, suffix_tokens: int) -> Grid:
        return Grid.regular(
            num_tokens=num_tokens,
            chunk_tokens=self.options.chunk_tokens,
            num_blocks=self.model.shape.num_rows,
            suffix_tokens=suffix_tokens,
        )

    def _problem(self, costs: CostTable, grid: Grid, link: LinkCost) -> RestoreProblem:
        shape = self.model.shape
        return build_problem(costs, grid, shape, link=link, layers_per_block=shape.row_layers)


def kinds_of_layers(model: LoadedModel) -> tuple[str, ...]:
    """Kind of each layer, bottom first: ``full_attention``, ``sliding_attention`` or ``linear_attention``."""
    config = model.module.config
    listed = getattr(config, "layer_types", None)
    if listed:
        return tuple(listed)
    kind = "sliding_attention" if model.shape.sliding_window is not None else "full_attention"
    return (kind,) * model.shape.num_layers


def _rising(full_QP: Seconds) -> Seconds:
    """The costs without what only other work on the machine explains, which only adds.

    A chunk costs at most what a longer one does, and at most what the same one does at a farther offset.
    """
    for axis in (0, 1):
        full_QP = np.flip(np.minimum.accumulate(np.flip(full_QP, axis), axis=axis), axis)
    return full_QP


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
