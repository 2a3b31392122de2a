"""What decides the KV that a worker computes and may change while it serves: its weights and its adapters.

The scheduler side decides on saves and restorations by the weights and the adapters it knows of, and hears of a change
only after the step in which it shows. So the worker has the last word: what was decided for another state than the
present one is not saved, and a restoration that ends in another state than it began for is reported as failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cacheflow.restore.work import RestoreTarget
from cacheflow.vllm.adapters import AdapterLoad, AdapterVersion, LoadedAdapters
from cacheflow.vllm.step import ModelNews, SaveWork, StepWork
from cacheflow.vllm.worker.weights_watch import WeightsWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A restoration under way: what it rests on, and the KV blocks that it writes."""

    weights_version: int
    adapter: AdapterVersion | None
    block_ids: tuple[int, ...]


class ModelState:
    """Holds one rank's saves and restorations against the weights and adapters that are loaded now.

    Worker's main thread alone.
    """

    def __init__(self, *, rank: int, block_size: int, weights: WeightsWatch, adapters: LoadedAdapters) -> None:
        """Compare work with these weights, as they are now, and these adapters; ``block_size`` in tokens."""
        self._rank, self._block_size = rank, block_size
        self._weights, self._adapters = weights, adapters
        self._begun: dict[int, _Begun] = {}
        self._generation = 0
        self._first_version = self._reported_version = self._version_before_forward = weights.version
        self._refused: dict[int, str] = {}
        self._loads: list[AdapterLoad] = []

    def begin_step(self, work: StepWork) -> None:
        """Take note of a new generation, before the forward; whatever the weights are now, it begins with them."""
        if work.generation > self._generation:
            self._generation = work.generation
            self._weights.accept()
        self._version_before_forward = self._weights.version
        self._loads += [replace(each, before_forward=True) for each in self._adapters.take_loads()]
        self._weights.begin_step()

    def begin(self, target: RestoreTarget, work: StepWork) -> None:
        """Note what a restoration that starts with this step rests on."""
        self._begun[target.restore_id] = _Begun(
            weights_version=work.weights_versions.get(self._rank, 0),
            adapter=work.adapters.get(target.restore_id),
            # With the blocks that are copied from another restoration: they lie right before ``start``.
            block_ids=target.block_ids[target.start // self._block_size - len(target.copied_from) :],
        )

    def end(self, restore_ids: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Those of these restorations that do not fit the present state, with all KV blocks that each has written."""
        failed = dict[int, tuple[int, ...]]()
        if restore_ids:
            self._weights.check()
        for restore_id in restore_ids:
            begun = self._begun.pop(restore_id)
            reason = self._contradiction(begun.weights_version, begun.adapter)
            if reason:
                self._refused[restore_id] = reason
                failed[restore_id] = begun.block_ids
        return failed

    def may_save(self, work: StepWork) -> tuple[SaveWork, ...]:
        """The saves that fit the present state."""
        if not work.saves:
            return ()
        self._weights.check()
        version = work.weights_versions.get(self._rank, 0)
        return tuple(save for save in work.saves if not self._contradiction(version, save.adapter))

    def _contradiction(self, weights_version: int, adapter: AdapterVersion | None) -> str:
        if self._first_version + weights_version != self._weights.version:
            return "the weights have changed"
        return "its adapter was loaded again from other files" if self._adapters.contradicts(adapter) else ""

    def take_news(self) -> ModelNews:
        """What the scheduler side does not know yet."""
        change = self._weights.change if self._weights.version > self._reported_version else None
        if change is not None:
            change = replace(
                change,
                version=change.version - self._first_version,
                before_forward=change.announced and change.version == self._version_before_forward,
            )
        self._reported_version = self._weights.version
        refused, self._refused = self._refused, {}
        loads, self._loads = (*self._loads, *self._adapters.take_loads()), []
        return ModelNews(
            weights=change,
            adapter_loads=loads,
            refused=refused,
        )
