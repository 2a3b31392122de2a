"""Drives a staged restoration by a virtual clock: a step lasts as long as its slowest stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cacheflow.plan.problem import RestoreProblem
from cacheflow.restore.pipeline import PipelineRestoration, PipelineWork
from cacheflow.restore.work import StepReport
from cacheflow.vllm.scheduler.pace import IDLE_COMPUTE_BUDGET_S, READ_AHEAD_S
from support.virtual_steps import MAX_STEPS, VirtualWorker


def run_staged(
    staged: PipelineRestoration, truths: Sequence[RestoreProblem], *, delay: int = 1, wait_s: float = 0.002
) -> list[VirtualWorker]:
    """One rank a stage; ``delay`` is how many steps later a report is there when orders are made."""
    workers = [VirtualWorker(truth) for truth in truths]
    ordered: deque[PipelineWork] = deque()
    for _ in range(MAX_STEPS):
        now_s = max(worker.now for worker in workers)
        for worker in workers:
            worker.now = now_s
        ordered.append(staged.next_work(now_s, compute_budget_s=IDLE_COMPUTE_BUDGET_S, read_ahead_s=READ_AHEAD_S))
        if len(ordered) == delay:
            orders = ordered.popleft()
            reports = {rank: worker.step(orders.by_stage[rank], wait_s=wait_s) for rank, worker in enumerate(workers)}
            staged.apply(StepReport(reports), max(worker.now for worker in workers))
        if staged.done:
            return workers
    raise AssertionError("no end in sight")
