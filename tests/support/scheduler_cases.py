"""A scheduler side without vLLM: facts by hand, a memory store that holds what a test says, a worker that obeys."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from cacheflow.model_shape import ModelShape
from cacheflow.plan.cost_grid import CostGrid
from cacheflow.plan.costs import CostIdentity, CostTable
from cacheflow.plan.engine_pass import EnginePass
from cacheflow.plan.problem import LinkCost
from cacheflow.restore.work import ComputeReport, LoadReport, RankReport, StepReport
from cacheflow.stores.base import PutRequest, Store
from cacheflow.stores.keys import WHOLE, RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from cacheflow.vllm.facts import EngineFacts
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.side import SchedulerSide
from cacheflow.vllm.scheduler.view import RequestView, ScheduledRequest
from cacheflow.vllm.step import StepWork

CHUNK, BLOCK, LAYERS, MAX_TOKENS = 64, 16, 4, 4096
NAMESPACE = "0" * 31 + "1"
SHAPE = ModelShape(
    name="tiny", num_layers=LAYERS, hidden_size=8, num_q_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=8,
    vocab_size=100,
)  # fmt: skip


def costs(*, layer_s: float = 0.01, engine_pass: EnginePass | None = None) -> CostTable:
    """Every layer of a whole chunk takes ``layer_s``; a shorter one as much less."""
    full_QP = np.array([[layer_s / 4] * 2, [layer_s] * 2])
    identity = CostIdentity(
        model="tiny", fingerprint="f", num_layers=LAYERS, device_type="cpu", device="d", dtype="bfloat16",
        num_threads=1, attention="a",
    )  # fmt: skip
    grid = CostGrid(chunk_tokens=(1, CHUNK), offsets=(0, MAX_TOKENS - CHUNK), full_QP=full_QP, kv_only_QP=full_QP * 0.2)
    return CostTable(
        identity=identity, layer_kinds=("full",) * LAYERS, kinds={"full": grid}, head_s=0.001, engine_pass=engine_pass
    )


def facts(*, ratio: float = 1.0, **changes) -> EngineFacts:
    """``ratio``: seconds to load a chunk over seconds to recompute it."""
    chunk_bytes = CHUNK * SHAPE.kv_bytes_per_token
    values = {
        "shard": WHOLE, "namespace": NAMESPACE, "shape": SHAPE, "layers_per_block": 1, "block_size": BLOCK,
        "costs": costs(), "link": LinkCost(bytes_per_s=chunk_bytes / (0.01 * LAYERS * ratio)),
    }  # fmt: skip
    return EngineFacts(**{**values, **changes})


def tokens(count: int, *, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 100, count).tolist()


OPEN_CASES: list[Case] = []
"""What a test has opened; the suite closes it when the test ends."""


@dataclass
class Case:
    """A scheduler side, its store and its clock."""

    options: ConnectorOptions = field(
        default_factory=lambda: ConnectorOptions(chunk_tokens=CHUNK, lookup_timeout_s=20.0, explain=True)
    )
    facts_by_rank: tuple[EngineFacts, ...] = field(default_factory=lambda: (facts(),))
    now_s: float = 0.0
    store: Store = field(default_factory=lambda: MemoryStore(capacity_bytes=1 << 28))

    def __post_init__(self) -> None:
        self.side = SchedulerSide(self.options, self.store, self.facts_by_rank, clock=lambda: self.now_s)
        OPEN_CASES.append(self)

    def close(self) -> None:
        """End the threads of the side and of its store."""
        self.side.close()
        self.store.close()

    def arrive(self, request_id: str, prompt: list[int], **kwargs) -> None:
        self.side.new_request(
            RequestView(request_id=request_id, tokens=prompt, num_prompt_tokens=len(prompt), **kwargs)
        )

    def hold(self, request_id: str, num_chunks: int) -> None:
        """Put the first chunks of a known request into the store."""
        request = self.side.requests[request_id]
        requests = []
        for name in request.prefix.chain_hashes(0, num_chunks):
            for layer in range(LAYERS):
                for facts in self.facts_by_rank:
                    key = RankKeys(facts.shard).kv(request.name.namespace, name, (layer, layer + 1))
                    requests.append(PutRequest(key, [np.zeros(64, np.uint8)], shape=(64,), dtype="bfloat16"))
        self.store.submit_put(requests).wait(20)

    def saved_prompt(self, count: int, num_chunks: int, *, seed: int = 0, **kwargs) -> list[int]:
        """A prompt whose first chunks an earlier request left in the store."""
        prompt = tokens(count, seed=seed)
        self.arrive("earlier", prompt, **kwargs)
        self.hold("earlier", num_chunks)
        self.side.finished("earlier")
        return prompt

    def matched(self, request_id: str, num_computed: int = 0, *, num_preemptions: int = 0) -> int | None:
        """``num_matched`` once the lookup has answered."""
        for _ in range(20_000):
            matched = self.side.num_matched(request_id, num_computed, num_preemptions=num_preemptions)
            request = self.side.requests.get(request_id)
            if matched is not None or (request is not None and request.decision is not None):
                return matched
            if request is not None and request.question is not None:
                time.sleep(0.001)
        raise AssertionError("the lookup never answered")

    def matched_now(self, request_id: str) -> int | None:
        """``num_matched``, asked once."""
        return self.side.num_matched(request_id, 0)

    def begin(self, request_id: str, num_computed: int = 0) -> int:
        matched = self.matched(request_id, num_computed)
        assert matched
        num_blocks = (num_computed + matched) // BLOCK
        self.side.allocated(request_id, range(100, 100 + num_blocks), matched)
        return matched

    def step(self, *scheduled: ScheduledRequest, busy: int = 0) -> StepWork:
        return self.side.step(scheduled, lambda _: range(1000), num_scheduled_tokens=busy)


@dataclass
class Worker:
    """Obeys at once: every order takes ``step_s``, every read ends as ``outcome`` says."""

    case: Case
    ranks: tuple[int, ...] = (0,)
    step_s: float = 0.02
    compute_error: str = ""
    outcome: dict[tuple[int, int], LoadOutcome] = field(default_factory=dict)
    default: LoadOutcome = LoadOutcome.OK
    targets: dict[int, object] = field(default_factory=dict)
    restored: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    num_computed: dict[int, int] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    failed_blocks: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def carry_out(self, orders: StepWork) -> None:
        for target in orders.targets:
            self.targets[target.restore_id] = target
            self.restored[target.restore_id] = set()
            self.num_computed[target.restore_id] = 0
        self.failed_blocks |= orders.failed_blocks
        loads, computes, finished = [], [], []
        for each in orders.of_stage(0):
            resident = self.restored[each.restore_id]
            for read in each.reads:
                outcome = self.outcome.get(read.piece, self.default)
                if outcome is LoadOutcome.OK:
                    resident.add(read.piece)
                loads.append(
                    LoadReport(
                        restore_id=each.restore_id, piece=read.piece, outcome=outcome,
                        num_bytes=CHUNK * SHAPE.kv_bytes_per_token_layer, busy_s=0.01,
                    )
                )  # fmt: skip
            for order in each.compute:
                resident.update(order.tile.cells())
            if each.compute:
                first = self.num_computed[each.restore_id]
                self.num_computed[each.restore_id] += len(each.compute)
                seconds = () if self.compute_error else tuple(0.01 for _ in each.compute)
                computes.append(
                    ComputeReport(restore_id=each.restore_id, first=first, seconds=seconds, error=self.compute_error)
                )
            if each.finish or each.cancel:
                finished.append(each.restore_id)
        self.finished += finished
        self.case.now_s += self.step_s
        report = RankReport(loads=tuple(loads), computes=tuple(computes), finished=tuple(finished))
        self.case.side.take_report(StepReport(dict.fromkeys(self.ranks, report)))

    def run(self, *, max_steps: int = 2000) -> None:
        """Step until nothing is under way."""
        for _ in range(max_steps):
            if not self.case.side.has_work:
                return
            self.carry_out(self.case.step())
        raise AssertionError("the restoration never ended")
