"""Requests of a live batch over fake ports: real threads, one shared link, cells as numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cacheflow.plan.grid import Tile
from cacheflow.plan.problem import RestoreProblem
from cacheflow.plan.rates import LiveRates
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.restore.batch import BatchRequest, Prepared
from cacheflow.restore.executor import BatchExecutor
from cacheflow.state.batch import BatchScheduler
from cacheflow.types import LoadOutcome
from support.fake_ports import FakeBuffer, FakeCompute, FakeTicket, FakeTransfer
from support.problems import transformer_problem

THREADS = ("cacheflow-io", "cacheflow-compute", "cacheflow-late")


def running_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in THREADS]


@dataclass
class FakeLink:
    """Serves the reads of every request one after the other."""

    free_s: float = 0.0


class SharedTransfer(FakeTransfer):
    """A port of one request over the link of all."""

    def __init__(self, buffer: FakeBuffer, link: FakeLink, *, cell_s: float) -> None:
        super().__init__(buffer, cell_s=cell_s)
        self.link = link

    def start(self, tile: Tile, *, deadline_s: float) -> FakeTicket:
        self._free_s = self.link.free_s
        ticket = super().start(tile, deadline_s=deadline_s)
        self.link.free_s = self._free_s
        return ticket


class FakeDecode:
    """An answer of a number of tokens; notes which thread made it."""

    def __init__(self, num_tokens: int, *, step_s: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self.num_tokens, self.step_s, self.sleep = num_tokens, step_s, sleep
        self.num_made = 0
        self.thread_ids: set[int] = set()

    def start(self) -> bool:
        return self.step()

    def step(self) -> bool:
        self.thread_ids.add(threading.get_ident())
        self.sleep(self.step_s)
        self.num_made += 1
        assert self.num_made <= self.num_tokens
        return self.num_made < self.num_tokens


@dataclass
class FakeRequest:
    """One request, its ports, and what became of it."""

    problem: RestoreProblem
    link: FakeLink
    cell_s: float = 0.001
    load_s: float = 0.001
    num_answer: int = 1
    step_s: float = 0.0
    num_tokens: int = 0
    first_token_within_s: float | None = None
    prepare_error: Exception | None = None
    sleep: Callable[[float], None] = time.sleep
    num_prepared: int = 0
    buffer: FakeBuffer = field(init=False)
    compute: FakeCompute = field(init=False)
    transfer: SharedTransfer = field(init=False)
    decode: FakeDecode = field(init=False)

    def __post_init__(self) -> None:
        self.buffer = FakeBuffer(self.problem.grid)
        self.compute = FakeCompute(self.buffer, cell_s=self.cell_s, sleep=self.sleep)
        self.transfer = SharedTransfer(self.buffer, self.link, cell_s=self.load_s)
        self.decode = FakeDecode(self.num_answer, step_s=self.step_s, sleep=self.sleep)

    def request(self) -> BatchRequest[FakeTicket]:
        return BatchRequest(
            problem=self.problem,
            prepare=self.prepare,
            num_tokens=self.num_tokens,
            first_token_within_s=self.first_token_within_s,
        )

    def prepare(self, running) -> Prepared[FakeTicket]:
        self.num_prepared += 1
        if self.prepare_error is not None:
            raise self.prepare_error
        return Prepared(problem=self.problem, compute=self.compute, transfer=self.transfer, decode=self.decode)

    def is_right(self) -> bool:
        return self.buffer.is_right() and self.compute.finished and self.decode.num_made == self.num_answer


def problem(num_tokens: int, *, num_blocks: int = 4, ratio: float = 1.0, suffix_tokens: int = 64) -> RestoreProblem:
    return transformer_problem(
        num_tokens=num_tokens, suffix_tokens=suffix_tokens, num_blocks=num_blocks, ratio=ratio, chunk_tokens=512
    )


def new_executor(policy: str = "mean_ttft", *, restore: str = "cacheflow", bytes_per_s: float = 1e6, **options):
    starvation_s = options.pop("starvation_s", float("inf"))
    scheduler = BatchScheduler(
        make_batch_policy(policy, make_policy(restore)),
        LiveRates(bytes_per_s=bytes_per_s),
        starvation_s=starvation_s,
    )
    return BatchExecutor(scheduler, **options)


OUTCOMES = (*([LoadOutcome.OK] * 6), LoadOutcome.MISS, LoadOutcome.CORRUPT, LoadOutcome.ERROR, LoadOutcome.LATE, None)
"""How a read may end; None: not before its deadline."""
