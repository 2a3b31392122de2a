"""Thirty-two chats at once, over a store that fails all the time and has room for a third of what they keep.

::

    MALLOC_ARENA_MAX=1 CACHEFLOW_SOAK_MINUTES=30 pytest --long tests/embedded/test_session_soak.py

takes so long for each store, a minute in ``make test-long``, seconds in ``make test``. One arena, because glibc gives
each thread one of its own, and all of them are cut up: resident memory then grows for an hour while what is in use
does not. Nothing that the process holds may grow for ever, and every answer is compared with that of a chat that was
never evicted: tokens, logits, keys and values, boundaries of chunks, bit for bit.

The model is tiny but for its keys and values, as wide as those of a real one: so there are thousands of turns
in which something may be left behind, and what is left behind is large.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import xxhash

from cacheflow.embedded import Engine, Reply, Session
from cacheflow.embedded.concurrent import ConcurrentBatch, PendingReply
from cacheflow.engine.model import LoadedModel
from cacheflow.engine.random_models import tiny_model
from cacheflow.errors import RestoreCancelled
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores.base import Store
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKey, ObjectKind
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.record import HEADER_BYTES
from cacheflow.stores.tiered import TieredStore
from support.embedded_cases import CHUNK, NEW_TOKENS, make_engine, random_tokens, sampling_of
from support.growth import Watch, give_back, held, resident_bytes
from support.soak import SEED
from support.store_objects import put
from support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

MINUTES = os.environ.get("CACHEFLOW_SOAK_MINUTES")
LONG_MINUTES, SHORT_MINUTES = 1.0, 0.1
SESSIONS = 32
OPENINGS = 4
"""System prompts, so that eight chats share each."""
OPENING_TOKENS = 2 * CHUNK
TURN_TOKENS = (90, 45, 3, 40, 77, 61)
"""In another order in each chat: all of them are equally long in the end."""
CHAT_TOKENS = OPENING_TOKENS + sum(TURN_TOKENS) + NEW_TOKENS * (len(TURN_TOKENS) - 1)
SHARE = 1 / 3
"""Of the chats' keys and values that the store has room for."""
MEMORY_SHARE = 1 / 4
"""Of that, what the tier in memory has room for."""
COPY_BYTES = 4 << 20
"""What may wait to be written to a tier."""
KV_TOKENS = 8 * CHAT_TOKENS
"""What fits into KV memory: others wait."""

NEW, EVICTED, KEPT, CANCELLED = 0.25, 0.9, 0.1, 0.02
"""Chances: that a chat begins anew as another one, and around a turn, that it is evicted, kept, or given up."""
KEEP_S = 2.0
PATIENCE_S = 120.0
"""For an answer, on a machine that does other things: what hangs never comes."""

PARTS = 6
"""After each part of its time it says how far it is; at least as many samples."""
SLOPE_BYTES_PER_S = (1 << 20) / 60
NOISE_BYTES = 8 << 20
"""By so much resident memory may differ from one rest to the next."""
WARM_MINUTES, WARMING_BYTES = 5.0, 64 << 20
"""Before, everything still takes the memory that it keeps: in the last third of a shorter run so much at most."""
MOST = 2 * SESSIONS * CHAT_TOKENS
"""Objects of one class, or in all containers of one name together: the tokens of all chats are more than all else."""
THREADS, FILES = 64, 256
READS = ExecutorOptions(max_reads_in_flight=6, deadline=ReadDeadline(floor_s=0.05, factor=2.0))


def is_cell(key: ObjectKey) -> bool:
    return key.kind is ObjectKind.KV


def a_few_of_everything(seed: int) -> FaultPlan:
    """Some of each kind, and now and then a store that is out: long enough for a tier to be taken out of service.

    Probes alone end that there, each of which waits twice as long as the one before: a longer outage would be minutes.
    """
    return FaultPlan(
        rules=(
            FaultRule(fault=Fault.ERROR, matches=is_cell, every=1000, in_a_row=5),
            *(FaultRule(fault=each, probability=0.02) for each in Fault if each not in (Fault.LATE, Fault.HANG)),
            *(FaultRule(fault=each, matches=is_cell, probability=0.01) for each in (Fault.LATE, Fault.HANG)),
        ),
        seed=seed,
    )


@dataclass(frozen=True)
class Seen:
    """An answer and what it left in memory; equal only where every bit is."""

    tokens: tuple[int, ...]
    chunk_ends: tuple[int, ...]
    logits: bytes
    kv: bytes

    @classmethod
    def of(cls, session: Session, reply: Reply) -> Seen:
        kv = session.resident_kv()
        assert kv is not None
        return cls(reply.tokens, session.chunk_ends, _digest(reply.logits), _digest(kv))


def _digest(values: torch.Tensor) -> bytes:
    return xxhash.xxh3_128(values.contiguous().view(torch.uint8).numpy()).digest()


@dataclass(frozen=True)
class Script:
    """What is said in a chat, and what is to be answered."""

    turns: tuple[list[int], ...]
    answers: tuple[Seen, ...]


class Scripts:
    """Writes chats, and plays each once where nothing is ever evicted, on a model of its own."""

    def __init__(self, model: LoadedModel, chance: random.Random) -> None:
        self._engine = make_engine(model, MemoryStore(capacity_bytes=1 << 20))
        self._chance = chance
        self._openings = [random_tokens(OPENING_TOKENS, seed=number) for number in range(OPENINGS)]
        self._num_written = 0

    def new(self) -> Script:
        opening = self._openings[self._num_written % OPENINGS]
        self._num_written += 1
        lengths = self._chance.sample(TURN_TOKENS, len(TURN_TOKENS))
        turns = tuple([self._chance.randrange(320) for _ in range(length)] for length in lengths)
        turns = ([*opening, *turns[0]], *turns[1:])
        session, answers = self._engine.session(), []
        for turn, tokens in enumerate(turns):
            reply = session.generate(tokens, max_new_tokens=NEW_TOKENS, sampling=sampling_of(turn), save=False)
            answers.append(Seen.of(session, reply))
        return Script(turns, tuple(answers))


@dataclass
class Chat:
    script: Script
    session: Session
    turn: int = 0
    pending: PendingReply | None = None
    asked_at_s: float = 0.0


@dataclass
class Traffic:
    """Chats that go on side by side, and what came of them."""

    engine: Engine
    batch: ConcurrentBatch
    scripts: Scripts
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.chats = [Chat(self.scripts.new(), self.engine.session()) for _ in range(SESSIONS)]
        self.counts["chats"] = SESSIONS

    def step(self) -> None:
        """Ask and look wherever there is something to ask or to look at."""
        moved = False
        for chat in self.chats:
            if chat.pending is None:
                self._ask(chat)
                moved = True
            moved |= self._look(chat)
        if not moved:
            time.sleep(0.002)

    @property
    def is_enough(self) -> bool:
        """Whether it says anything, however little there was time for."""
        return self.counts["answers"] >= 2 * SESSIONS

    def finish(self) -> None:
        eventually(
            lambda: all(self._look(chat) for chat in self.chats if chat.pending is not None), patience_s=PATIENCE_S
        )

    def rest(self) -> None:
        """Until the next turn nothing runs, and no chat has anything in memory: how much is cached is chance."""
        self.finish()
        for chat in self.chats:
            chat.session.evict()

    def _ask(self, chat: Chat) -> None:
        if chat.turn == len(TURN_TOKENS):
            if self.chance.random() < NEW:
                chat.script = self.scripts.new()
                self.counts["chats"] += 1
            chat.session, chat.turn = self.engine.session(), 0
        if self.chance.random() < KEPT:
            self.counts["kept tokens"] += chat.session.keep(KEEP_S)
        if self.chance.random() < EVICTED:
            chat.session.evict()
        tokens, sampling = chat.script.turns[chat.turn], sampling_of(chat.turn)
        chat.pending = self.batch.submit(chat.session, tokens, max_new_tokens=NEW_TOKENS, sampling=sampling)
        chat.asked_at_s = time.monotonic()
        if self.chance.random() < CANCELLED:
            chat.pending.cancel()

    def _look(self, chat: Chat) -> bool:
        """Compare an answer, if it is there; whether it is."""
        assert chat.pending is not None
        if not chat.pending.done():
            assert time.monotonic() - chat.asked_at_s < PATIENCE_S, "a turn hangs"
            return False
        pending, chat.pending = chat.pending, None
        try:
            reply = pending.result(0)
        except RestoreCancelled:
            self.counts["given up"] += 1
            return True
        assert Seen.of(chat.session, reply) == chat.script.answers[chat.turn]
        chat.turn += 1
        self._count(reply)
        return True

    def _count(self, reply: Reply) -> None:
        self.counts["answers"] += 1
        self.counts["restored tokens"] += reply.restored_tokens
        self.counts["lookups too late"] += reply.lookup_timed_out
        if reply.report is not None:
            self.counts["restorations"] += 1
            self.counts["cells loaded"] += reply.report.loaded_cells
            self.counts["cells recomputed"] += reply.report.recomputed_cells
            self.counts["failed reads"] += sum(reply.report.failed_loads.values())


def wide_model() -> LoadedModel:
    return tiny_model("llama", dtype="bfloat16", num_key_value_heads=4, head_dim=64)


def capacity_of(model: LoadedModel) -> int:
    """Bytes of records that hold ``SHARE`` of the chats; their last chunks are short, so they have more of them."""
    num_records = (CHAT_TOKENS // CHUNK + len(TURN_TOKENS)) * model.shape.num_layers
    chat_bytes = CHAT_TOKENS * model.shape.kv_bytes_per_token + num_records * HEADER_BYTES
    return int(SESSIONS * chat_bytes * SHARE)


@contextmanager
def failing_store(kind: str, folder: Path, *, capacity_bytes: int) -> Iterator[tuple[Store, list[FaultyStore]]]:
    """The store, and where it fails."""
    file = FaultyStore(FileStore(folder, capacity_bytes=capacity_bytes, fsync=False), a_few_of_everything(SEED))
    if kind == "file":
        with file:
            yield file, [file]
        return
    inner = MemoryStore(capacity_bytes=int(capacity_bytes * MEMORY_SHARE))
    memory = FaultyStore(inner, a_few_of_everything(SEED + 1))
    with TieredStore({"memory": memory, "file": file}, copy_bytes=COPY_BYTES, probe_after_s=0.05) as store:
        yield store, [memory, file]


def in_words(traffic: Traffic, watch: Watch, faulty: list[FaultyStore]) -> str:
    struck: Counter[str] = Counter()
    for each in faulty:
        struck.update({fault.value: count for fault, count in each.injected().items()})
    last, mib = watch.samples[-1], 1 << 20
    sizes = [each.resident_bytes // mib for each in watch.rests]
    return (
        f"\n{dict(traffic.counts)}, all right; {struck.total()} faults {dict(struck)}"
        f"\nresident at rest {sizes} MiB, {watch.slope_bytes_per_s * 60 / mib:+.2f} MiB "
        f"a minute in the last {watch.end_s / 60:.1f}"
        f"\n{max(each.num_threads for each in watch.samples)} threads at most, {last.num_threads} at the end; "
        f"{max(each.num_files for each in watch.samples)} files at most, {last.num_files} at the end"
        f"\nthe most there was: {', '.join(f'{name} {count}' for name, count in watch.most().most_common(40))}\n"
    )


def test_whatever_an_object_of_ours_keeps_is_counted():
    with MemoryStore(capacity_bytes=1 << 20) as store:
        before = held([store])
        put(store, *range(7))
        grown = held([store]) - before
    assert grown["LruIndex._held"] == 7
    assert grown["MemoryStore._records"] == 7
    assert grown["HeldObject"] == 7


def test_what_was_freed_is_no_growth_and_what_is_kept_is():
    give_back()
    before = resident_bytes()
    pieces = [bytes(2000) for _ in range(30_000)]
    give_back()
    assert resident_bytes() - before > 50_000_000
    kept = pieces[::100]  # all over what they lie in
    pieces.clear()
    give_back()
    assert resident_bytes() - before < 20_000_000
    assert len(kept) == 300


@pytest.mark.parametrize("kind", ["file", "tiers"])
def test_chats_go_on_and_nothing_grows(kind, request, tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR, logger="cacheflow")  # pytest keeps every line: outages would fill memory
    minutes = float(MINUTES or (LONG_MINUTES if request.config.getoption("--long") else SHORT_MINUTES))
    model, chance = wide_model(), random.Random(SEED)
    period_s = min(10.0, max(0.5, minutes * 60 / 180))
    work_s = max(0.5, minutes)  # from one rest to the next
    with (
        failing_store(kind, tmp_path, capacity_bytes=capacity_of(model)) as (store, faulty),
        make_engine(model, store, executor=READS, lookup_deadline_s=0.5) as engine,
    ):
        with (
            engine.concurrent(kv_capacity_tokens=KV_TOKENS) as batch,
            Watch(engine, batch, store, period_s=period_s) as watch,
        ):
            traffic = Traffic(engine, batch, Scripts(wide_model(), chance), chance)
            until_s = time.monotonic() + minutes * 60
            parts_left = PARTS
            rest_at_s = time.monotonic() + work_s
            while (
                (left_s := until_s - time.monotonic()) > 0
                or not traffic.is_enough
                or min(len(watch.samples), len(watch.rests)) < PARTS
            ):
                traffic.step()
                if time.monotonic() > rest_at_s:
                    traffic.rest()
                    watch.rest()
                    rest_at_s = time.monotonic() + work_s
                if left_s < minutes * 60 * (parts_left - 1) / PARTS:
                    parts_left -= 1
                    with capsys.disabled():
                        sys.stdout.write(f"\n{traffic.counts['answers']} answers, {resident_bytes() >> 20} MiB")
                        sys.stdout.flush()
            traffic.finish()
        with capsys.disabled():
            sys.stdout.write(in_words(traffic, watch, faulty))
        assert store.stats().num_evicted > 0
        assert all(sum(each.injected()[fault] for each in faulty) for fault in Fault)
    assert traffic.counts["cells loaded"] > 0
    assert traffic.counts["cells recomputed"] > 0
    noise_bytes = NOISE_BYTES if minutes >= WARM_MINUTES else WARMING_BYTES
    assert watch.slope_bytes_per_s * watch.end_s < max(SLOPE_BYTES_PER_S * watch.end_s, noise_bytes)
    assert max(each.num_threads for each in watch.samples) < THREADS
    assert max(each.num_files for each in watch.samples) < FILES
    assert {name: count for name, count in watch.most().items() if count > MOST} == {}
    if minutes >= LONG_MINUTES:
        assert watch.growing(factor=1.5, slack=500) == {}
    eventually(lambda: not [each.name for each in threading.enumerate() if each.name.startswith("cacheflow-")])
