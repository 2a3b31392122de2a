"""Hours in minutes: chats that come, go, are aborted, preempted and served from a failing store, all answered right."""

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import pytest

from cacheflow.stores.faults import Fault, FaultPlan, FaultRule
from support.faulty_store import faulty_store
from support.growth import resident_bytes
from support.soak import MARKS, NUM_REQUESTS, SEED

pytestmark = MARKS

CHUNK = 128
MAX_HISTORY = 1400
MAX_LIVE = 7
ENGINE = {"max_model_len": 2048, "num_gpu_blocks_override": 22}
FAULTS = (Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.LATE, Fault.HANG, Fault.PUT_ERROR)
THREADS = {
    f"cacheflow-{name}" for name in ("census", "io", "lookup-0", "lookup-1", "reaper", "save", "store-0", "store-1")
}
TIE = 3e-4
"""Log-probabilities this close may swap: another batch or chunk grid rounds differently, also without a connector."""


@dataclass
class Session:
    """A chat: what was said so far, and the request under way."""

    history: list[int]
    live: str | None = None


@dataclass
class Traffic:
    """Random chats over a few shared openings; what they asked and were answered."""

    engine: object
    random: random.Random
    counts: Counter = field(default_factory=Counter)
    answered: list[tuple[list[int], list[int]]] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    restored: int = 0

    def words(self, low, high):
        from support.vllm_models import TINY

        return [self.random.randrange(2, TINY["vocab_size"]) for _ in range(self.random.randint(low, high))]

    def serve(self, num_requests):
        openings = [self.words(150, 500) for _ in range(3)]
        self.sessions = [Session(list(self.random.choice(openings))) for _ in range(10)]
        prompts = {}
        while self.counts["completed"] + self.counts["aborted"] < num_requests:
            live = [session for session in self.sessions if session.live]
            idle = [session for session in self.sessions if not session.live]
            if len(live) < MAX_LIVE and idle and self.random.random() < 0.4:
                session = self.random.choice(idle)
                if len(session.history) > MAX_HISTORY:
                    session.history = list(self.random.choice(openings))
                prompt = session.history + self.words(10, 160)
                session.live = self.engine.submit(prompt, num_tokens=self.random.randint(4, 160))
                prompts[session.live] = prompt
            self.engine.step()
            for session in live:
                self.look_at(session, prompts)
        self.engine.run()
        for session in self.sessions:
            if session.live:
                self.look_at(session, prompts)

    def look_at(self, session, prompts):
        answer = self.engine.answers[session.live]
        if answer.finish_reason is None:
            if self.random.random() < 0.004:
                self.engine.abort(session.live)
                self.counts["aborted"] += 1
                session.live = None
            return
        assert answer.finish_reason == "length"
        self.counts["completed"] += 1
        self.counts["restored"] += sum(record["outcome"] == "done" for record in answer.records)
        self.counts["cells"] += sum(r["recomputed_cells"] + r["loaded_cells"] for r in answer.records)
        self.counts["recomputed cells"] += sum(record["recomputed_cells"] for record in answer.records)
        self.counts["given up"] += "failed" in (answer.params or {}).get("cacheflow_reason", "")
        prompt = prompts[session.live]
        self.answered.append((prompt, answer.tokens))
        session.history, session.live = [*prompt, *answer.tokens], None


def sometimes_failing(recompute, chances):
    def instead(self, tile, *, kv_only_top):
        if chances.random() < 0.005:
            raise RuntimeError("an injected failure of compute")
        recompute(self, tile, kv_only_top=kv_only_top)

    return instead


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _single_process_vllm):
    from support.vllm_models import write_model

    return write_model(tmp_path_factory.mktemp("soak"), "llama")


def test_every_answer_is_vllms_own(folder, monkeypatch, capsys):
    from cacheflow.vllm.worker.recompute import VllmComputePort
    from support.connector_engine import our_threads, serving_engine

    plan = FaultPlan(rules=tuple(FaultRule(fault=fault, probability=0.01) for fault in FAULTS), seed=SEED)
    faulty = partial(faulty_store, plan=plan, latency_s=0.0005)
    monkeypatch.setattr("cacheflow.vllm.startup.open_store.open_store", faulty)
    monkeypatch.setattr(VllmComputePort, "recompute", sometimes_failing(VllmComputePort.recompute, random.Random(SEED)))
    options = {
        "throttle_bytes_per_s": 3e7, "policy": "cake", "cpu_bytes_to_use": 12 << 20, "restore_timeout_s": 1.0,
    }  # fmt: skip
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, options=options, **ENGINE) as engine:
        free_blocks, preempted = engine.free_blocks, engine.count_preemptions()
        traffic = Traffic(engine, random.Random(SEED))
        engine.keeps_kv = False
        traffic.serve(NUM_REQUESTS // 3)
        before = resident_bytes()
        traffic.serve(NUM_REQUESTS)
        grown = resident_bytes() - before
        traffic.counts["preempted"] = len(preempted)
        nothing_is_left(engine)
        engine.evict()
        assert engine.free_blocks == free_blocks
        assert set(our_threads()) <= THREADS
        injected = {fault.value: n for fault, n in engine.store.inner.injected().items() if n}
    assert grown < 64 << 20, f"grew by {grown} bytes"
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK, **ENGINE) as plain:
        gaps = [max(plain.log_gaps(prompt, tokens)) for prompt, tokens in traffic.answered]
    ties = [gap for gap in gaps if gap > 0]
    with capsys.disabled():
        print(f"\nsoak: {dict(traffic.counts)}, injected {injected}, ties {ties}, grew {grown >> 20} MiB")  # noqa: T201
    assert traffic.counts["restored"] > 0
    assert 0 < traffic.counts["recomputed cells"] < traffic.counts["cells"]
    assert sum(injected.values()) > 0
    assert max(gaps) < TIE
    assert len(ties) <= 1 + NUM_REQUESTS // 50


def nothing_is_left(engine):
    engine.settle()
    side, worker = engine.side, engine.worker
    assert side.requests == {}
    assert not side.has_work
    assert worker.idle
    assert engine.scheduler.failed_recving_kv_req_ids == set()
    assert engine.scheduler.finished_recving_kv_req_ids == set()
