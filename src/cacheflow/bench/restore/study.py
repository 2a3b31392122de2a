"""One prefix, one model, many restorations: the measured ground of every restore benchmark.

A study prefills a prefix once with fixed chunk boundaries, keeps its KV and logits as the reference, saves it, and
measures what each chunk costs. Every run then starts from a poisoned buffer and is compared bit for bit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from cacheflow.bench.restore.link import LinkDrop, StudyLink
from cacheflow.embedded.restorer import Restored, Restorer, RestoreRequest
from cacheflow.engine.cells import CellGeometry
from cacheflow.engine.families import require_chunk_tokens
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.runner import LayerRunner
from cacheflow.errors import ConfigError
from cacheflow.plan.bound import bound
from cacheflow.plan.grid import Grid, num_layer_blocks
from cacheflow.plan.problem import LinkCost, RestoreProblem, cell_bytes_KB, recurrent_B
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.registry import make_policy
from cacheflow.profiling.measure import CostMeter, chunk_points
from cacheflow.profiling.survey import ChunkCost, ChunkPoint
from cacheflow.restore.options import ExecutorOptions
from cacheflow.tensors.streams import DeviceStreams

LOADS = 3
"""Times that a prefix is loaded to find out how fast its store is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """The prefix of a study."""

    num_tokens: int
    suffix_tokens: int
    chunk_tokens: int = 512
    layers_per_block: int = 1
    cost_repeats: int = 3
    executor: ExecutorOptions = ExecutorOptions()  # noqa: RUF009 -- frozen

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ConfigError: A count is below 1.
        """
        for key in ("num_tokens", "suffix_tokens", "chunk_tokens", "layers_per_block", "cost_repeats"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}, must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One restoration and whether it was exact; ``kv_equal`` and ``logits_equal`` are ``torch.equal``.

    ``kv_equal`` holds for the running states of recurrent layers too.
    """

    restored: Restored
    kv_equal: bool
    logits_equal: bool
    token_equal: bool

    @property
    def correct(self) -> bool:
        """Whether keys, values, logits and the first token equalled the reference."""
        return self.kv_equal and self.logits_equal and self.token_equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """What a run is given wrongly, or what happens to its link; all 1 and None for a clean run."""

    cost_error: float = 1.0
    bandwidth_error: float = 1.0
    drop: LinkDrop | None = None


CLEAN = Wrong()


class Study:
    """A model with one prefilled, saved and measured prefix.

    Attributes:
        device_notes: For records, on CUDA: the attention kernel, and medians of what ``CostMeter`` keeps beside costs.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokens: Sequence[int],
        *,
        options: StudyOptions,
        link: StudyLink,
        streams: DeviceStreams | None = None,
    ) -> None:
        """Take the prompt; ``prepare`` does the work.

        Args:
            model: What runs.
            tokens: The prefix, then the new tokens.
            options: How they are cut, and how restorations are carried out.
            link: Where the prefix is saved.
            streams: Of a rehearsal; the model's device's own for None.

        Raises:
            ConfigError: Too few tokens, more than the model allows, or chunks that a hybrid model cannot have.
        """
        require_chunk_tokens(model.shape, options.chunk_tokens)
        total = options.num_tokens + options.suffix_tokens
        if len(tokens) < total or total > model.max_tokens:
            raise ConfigError(
                f"num_tokens {options.num_tokens} + suffix_tokens {options.suffix_tokens} = {total}: the prompt has "
                f"{len(tokens)} tokens, the model allows {model.max_tokens}"
            )
        self.model, self.options = model, options
        self.runner = LayerRunner(model, streams=streams)
        self.tokens = list(tokens[:total])
        self.grid = Grid.regular(
            num_tokens=options.num_tokens,
            chunk_tokens=options.chunk_tokens,
            num_blocks=num_layer_blocks(model.shape.num_layers, options.layers_per_block),
            suffix_tokens=options.suffix_tokens,
        )
        self._link = link
        self._kv = self.runner.new_kv(total)
        self._reference = self.runner.new_kv(total)
        self._checkpoint = self.runner.new_states()
        self._logits: torch.Tensor | None = None
        self._costs: dict[ChunkPoint, ChunkCost] = {}
        self._head_s = 0.0
        self._unlimited_bytes_per_s: float | None = None
        self.device_notes: dict[str, float | str] = {}

    @property
    def num_cost_steps(self) -> int:
        """How often ``prepare`` calls ``on_step``."""
        return self.options.cost_repeats * len(self._points())

    def prepare(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Prefill the reference, save the prefix, measure every chunk.

        Raises:
            StoreError: The prefix could not be saved.
        """
        ends = (*self.grid.chunk_ends, *self.grid.suffix_ends)
        self._logits = self.runner.prefill(self.tokens, ends, self._reference, on_chunk=self._save_prefix)
        meter = CostMeter(self.runner, max_tokens=len(self.tokens))
        self._costs = meter.measure_chunks(self._points(), repeats=self.options.cost_repeats, on_step=on_step)
        self._head_s = meter.measure_head_s()
        for name in ("events_over_wall", "launch_over_wall"):
            if measured := getattr(meter, name):
                self.device_notes[name] = round(statistics.median(measured), 4)
                self.device_notes["attention"] = self.model.attention.value

    def regrain(self, layers_per_block: int, *, executor: ExecutorOptions | None = None) -> None:
        """Cut the same prefix into other blocks and save it so; reference and costs stay.

        Raises:
            ConfigError: The model is a hybrid: its checkpoint at the prefix's end is gone.
            StoreError: The prefix could not be saved.
        """
        if self._checkpoint is not None:
            raise ConfigError(f"{self.model.name} is a hybrid: its prefix is cut once")
        options = replace(self.options, layers_per_block=self.model.shape.layers_of_block(layers_per_block))
        self.options = options if executor is None else replace(options, executor=executor)
        self.grid = replace(self.grid, num_blocks=num_layer_blocks(self.model.shape.num_layers, layers_per_block))
        self._link.close()
        self._link.save(self._reference, self._geometry(self._prefix_grid()), self.tokens)

    @property
    def store(self) -> str:
        """Where the prefix is saved, for records."""
        return self._link.store

    def problem(self, *, with_suffix: bool, bytes_per_s: float, drift: float = 1.0) -> RestoreProblem:
        """What a restoration costs, as measured here, over a link of ``bytes_per_s``.

        Args:
            with_suffix: Whether the new tokens belong to it.
            bytes_per_s: Of the link; must be finite.
            drift: Seconds that a measured compute second took at the time of a run.
        """
        shape, grid = self.model.shape, self.grid if with_suffix else self._prefix_grid()
        costs = [self._costs[point] for point in chunk_points(self.grid.chunk_ends)]
        suffix = chunk_points(self.grid.suffix_ends, start=self.grid.num_tokens) if with_suffix else ()
        geometry = self._geometry(grid)
        rows_B = np.array([(hi - lo) // shape.row_layers for lo, hi in map(geometry.layers, range(grid.num_blocks))])
        # A block for keys and values only still runs its lower rows in full.
        full_K = np.array([cost.full_s for cost in costs]) * drift
        kv_only_K = np.array([cost.kv_only_s for cost in costs]) * drift
        return RestoreProblem(
            grid=grid,
            compute_KB=np.outer(full_K, rows_B),
            kv_only_KB=np.outer(full_K, rows_B - 1) + kv_only_K[:, None],
            load_bytes_KB=cell_bytes_KB(shape, grid, layers_per_block=self.options.layers_per_block),
            link=LinkCost(bytes_per_s=bytes_per_s),
            suffix_B=sum(self._costs[point].full_s for point in suffix) * drift * rows_B.astype(np.float64),
            head_s=self._head_s * drift if with_suffix else 0.0,
            recurrent_B=recurrent_B(shape, layers_per_block=self.options.layers_per_block),
        )

    def _save_prefix(self, end: int) -> None:
        """Save the prefix where it ends, as long as the checkpoint is that of its end."""
        if end != self.grid.num_tokens:
            return
        self._link.save(self._reference, self._geometry(self._prefix_grid()), self.tokens)
        if self._checkpoint is not None and self._reference.checkpoint is not None:
            self._checkpoint.copy_from(self._reference.checkpoint)

    def recompute_s(self) -> float:
        """Measured seconds to recompute the whole prefix, every layer in full."""
        return float(self.problem(with_suffix=False, bytes_per_s=1e9).compute_KB.sum())

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix's keys and values, and of a hybrid model's checkpoint."""
        return self.grid.num_tokens * self.model.shape.kv_bytes_per_token + self.model.shape.checkpoint_bytes

    def bytes_per_s(self, ratio: float) -> float:
        """Bandwidth at which loading the prefix takes ``ratio`` times as long as recomputing it."""
        return self.prefix_bytes / (ratio * self.recompute_s())

    def link_bytes_per_s(self, asked_bytes_per_s: float) -> float:
        """What a link of ``asked_bytes_per_s`` delivers: itself, or for ``inf`` what it carries at most.

        With a codec it delivers more than it carries. The most is known of pinned memory from one large copy, else from
        loading the prefix: the fastest of three times, since what comes first opens connections, and neighbours only
        slow a store down.
        """
        if math.isfinite(asked_bytes_per_s):
            return asked_bytes_per_s / self._link.stored_share
        if self._unlimited_bytes_per_s is None:
            self._unlimited_bytes_per_s = self._link.copy_bytes_per_s(self._kv)
        if self._unlimited_bytes_per_s is None:
            self._unlimited_bytes_per_s = 1e12  # a guess, for the run that replaces it; load plans without it
            load = partial(self.run, make_policy("load"), with_suffix=False, bytes_per_s=asked_bytes_per_s)
            reports = [load().restored.report for _ in range(LOADS)]
            self._unlimited_bytes_per_s = max(each.loaded_bytes / each.restore_s for each in reports)
        return self._unlimited_bytes_per_s

    def least_restore_s(self, bytes_per_s: float) -> float:
        """The bound on restoring the prefix over a link of ``bytes_per_s``."""
        return bound(self.problem(with_suffix=False, bytes_per_s=bytes_per_s)).restore_s

    def close(self) -> None:
        """Free the saved prefix."""
        self._link.close()

    def run(self, policy: RestorePolicy, *, with_suffix: bool, bytes_per_s: float, wrong: Wrong = CLEAN) -> StudyRun:
        """Restore once from a poisoned buffer and compare with the reference.

        Args:
            policy: Who plans.
            with_suffix: Plan and run for the first token; else for the prefix alone.
            bytes_per_s: Bandwidth asked of the link; ``inf`` for as fast as it goes.
            wrong: Errors planted in the costs and bandwidth that the policy is given.
        """
        told_bytes_per_s = self.link_bytes_per_s(bytes_per_s) * wrong.bandwidth_error
        problem = self.problem(with_suffix=with_suffix, bytes_per_s=told_bytes_per_s, drift=wrong.cost_error)
        restorer = Restorer(
            runner=self.runner,
            policy=policy,
            rates=LiveRates(bytes_per_s=told_bytes_per_s),
            options=self.options.executor,
        )
        self._kv.poison()
        if self._kv.lane is not None:
            self._kv.lane.settle()  # what evicting takes is no part of a restoration
        transfer = self._link.open(self._kv, bytes_per_s=bytes_per_s, drop=wrong.drop)
        num_tokens = len(self.tokens) if with_suffix else self.grid.num_tokens
        request = RestoreRequest(
            tokens=self.tokens[:num_tokens],
            problem=problem,
            kv=self._kv,
            layers_per_block=self.options.layers_per_block,
        )
        return self._checked(restorer.restore(request, transfer), num_tokens)

    def _checked(self, restored: Restored, num_tokens: int) -> StudyRun:
        kv, reference = self._kv.kv_L2THD[:, :, :num_tokens], self._reference.kv_L2THD[:, :, :num_tokens]
        kv_equal = torch.equal(kv, reference) and self._same_states(at_end=num_tokens == len(self.tokens))
        logits, expected = restored.logits, self._logits
        if logits is None or expected is None:
            return StudyRun(restored=restored, kv_equal=kv_equal, logits_equal=True, token_equal=True)
        return StudyRun(
            restored=restored,
            kv_equal=kv_equal,
            logits_equal=torch.equal(logits, expected),
            token_equal=int(logits.argmax()) == int(expected.argmax()),
        )

    def _same_states(self, *, at_end: bool) -> bool:
        """Whether the running states are the reference's, at the end of the new tokens or of the prefix."""
        restored, reference = self._kv.checkpoint, self._reference.checkpoint if at_end else self._checkpoint
        return restored is None or reference is None or restored.equals(reference)

    def _prefix_grid(self) -> Grid:
        return replace(self.grid, suffix_ends=())

    def _points(self) -> list[ChunkPoint]:
        return list(chunk_points((*self.grid.chunk_ends, *self.grid.suffix_ends)))

    def _geometry(self, grid: Grid) -> CellGeometry:
        return CellGeometry(grid=grid, shape=self.model.shape, layers_per_block=self.options.layers_per_block)
