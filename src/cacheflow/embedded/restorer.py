"""One restoration from plan to first token: policy, state machine, executor and the engine's two ports."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.kv_buffer import KVBuffer
from cacheflow.engine.runner import LayerRunner
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.plan.report import RestoreReport
from cacheflow.policies.base import RestorePolicy
from cacheflow.policies.fcfs import FirstComeFirstServed
from cacheflow.restore.batch import BatchOutcome, BatchRequest
from cacheflow.restore.executor import execute, serve
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.ports import Ticket, TransferPort
from cacheflow.state.batch import BatchScheduler
from cacheflow.state.restoration import RestoreState

CUDA_CLAIM_S = 0.002
"""On an asynchronous device compute claims blocks for this long at once, so that launching keeps ahead of running."""

T = TypeVar("T", bound=Ticket)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What is to be restored.

    Attributes:
        tokens: Prefix tokens, then the new tokens; as many as the problem's grid spans.
        problem: Grid and costs.
        kv: Where the keys and values go; at least as long as ``tokens``. Its checkpoint is that after all of them.
        layers_per_block: Layers in one block of the grid.
    """

    tokens: Sequence[int]
    problem: RestoreProblem
    kv: KVBuffer
    layers_per_block: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What came of it: the report, and the last token's logits ``[V]`` (float32, CPU); None without a suffix."""

    report: RestoreReport
    logits: torch.Tensor | None


@dataclass(slots=True)
class Restorer:
    """Restores requests under one policy, carrying live rates from one to the next.

    Attributes:
        runner: The model.
        policy: Makes the plans.
        rates: What compute and the link were seen to do; corrected by every restoration.
        options: How the executor drives its ports.
    """

    runner: LayerRunner
    policy: RestorePolicy
    rates: LiveRates
    options: ExecutorOptions = field(default_factory=ExecutorOptions)

    def serve(self, request: BatchRequest[T], *, cancel: threading.Event | None = None) -> BatchOutcome:
        """Serve one request alone on the calling thread, from plan to last token.

        Raises:
            RestoreCancelled: ``cancel`` was set before the first token was there.
        """
        scheduler = BatchScheduler(FirstComeFirstServed(self.policy), self.rates, min_claim_s=self.min_claim_s)
        return serve(request, scheduler, options=self.options, cancel=cancel)

    @property
    def min_claim_s(self) -> float:
        """What compute claims at once at least, in seconds."""
        return 0.0 if self.runner.lane is None else CUDA_CLAIM_S

    def restore(
        self, request: RestoreRequest, transfer: TransferPort[T], *, cancel: threading.Event | None = None
    ) -> Restored:
        """Plan and carry out one restoration on the calling thread.

        Raises:
            RestoreCancelled: ``cancel`` was set before the first token was there.
            ConfigError: The grid does not fit the model, the tokens or the buffer.
        """
        started_s = time.perf_counter()
        plan = self.policy.plan(request.problem)
        planning_s = time.perf_counter() - started_s
        state = RestoreState(request.problem, plan, self.rates, min_claim_s=self.min_claim_s)
        compute = EngineComputePort(
            self.runner,
            grid=request.problem.grid,
            tokens=request.tokens,
            kv=request.kv,
            layers_per_block=request.layers_per_block,
        )
        report = execute(state, compute, transfer, options=self.options, planning_s=planning_s, cancel=cancel)
        compute.keep_states()
        return Restored(report=report, logits=compute.logits)
