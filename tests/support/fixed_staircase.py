"""A policy of the tests': which cells are recomputed is planned by them, whatever the machine and the link take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from cacheflow.plan.plan import Prediction, RestorePlan, Share, SuffixStart
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.staircase import compute_tiles, load_tiles
from support.patience import no_late_reads


@dataclass(frozen=True)
class FixedStaircase:
    """The same cells are recomputed whatever the two sides take."""

    levels_K: tuple[int, ...]
    kv_only_top: bool
    name: ClassVar[str] = "fixed_staircase"

    def plan(self, problem: RestoreProblem) -> RestorePlan:
        return RestorePlan(
            policy=self.name, compute_sequence=compute_tiles(self.levels_K),
            load_sequence=load_tiles(self.levels_K, problem.grid.num_blocks), share=Share.NONE,
            suffix_start=SuffixStart.AFTER_RESTORE, levels_K=self.levels_K, kv_only_top=self.kv_only_top,
            predicted=Prediction(restore_s=1.0, ttft_s=1.0, compute_s=1.0, load_s=1.0),
        )  # fmt: skip

    def cells(self, num_blocks: int) -> list[str]:
        """What an explain record says of it."""
        return ["c" * level + "l" * (num_blocks - level) for level in self.levels_K]


@contextmanager
def planned(engine: Any, *levels_K: int, kv_only_top: bool = True) -> Iterator[FixedStaircase]:
    """An engine whose restorations meanwhile recompute so many blocks of each chunk, and load those above.

    No read is late, which would be recomputed.
    """
    with no_late_reads(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.side.decider, "policy", FixedStaircase(levels_K, kv_only_top))
        yield engine.side.decider.policy
