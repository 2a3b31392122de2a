"""A start of the connector that ends in a side of the test's."""

from __future__ import annotations

from collections.abc import Sequence

from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.scheduler.side import SchedulerSide
from cacheflow.vllm.starting import Starting
from cacheflow.vllm.worker.side import WorkerSide


class SideStart(Starting):
    """Hands its side to the connector that begins with it, once."""

    def __init__(self, side: SchedulerSide | WorkerSide) -> None:
        self._sides = [side]

    def scheduler(self, facts_by_rank: Sequence[EngineFacts]) -> SchedulerSide:
        return self._sides.pop()

    def worker(self) -> WorkerSide:
        return self._sides.pop()
