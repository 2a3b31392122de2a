"""Chats with a hybrid: together, aborted, preempted, served from a failing store, forgotten; every answer is right."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from cacheflow.stores.faults import Fault, FaultRule
from support.faulty_store import inject
from support.hybrid_engines import CHUNK, UNLIKELY_SHARE, hybrid_engine, num_unlikely
from support.soak import MARKS, NUM_REQUESTS, SEED

pytestmark = MARKS

MAX_LIVE = 5
MAX_HISTORY = 1100
FAULTS = [FaultRule(fault=fault, probability=0.05) for fault in (Fault.MISS, Fault.CORRUPT, Fault.ERROR, Fault.LATE)]
STEP_TOKENS = CHUNK + 8
"""A chunk and a token of each that decodes: so every prompt is computed in chunks, as it is alone."""


@pytest.fixture
def folder(tmp_path, _single_process_vllm):
    from support.random_weights import model_folder

    return model_folder(tmp_path / "qwen3_next", "qwen3_next")


@dataclass
class Asked:
    """A request, and what came of it.

    Attributes:
        chat: It is a turn of this one.
        prompt: What was said before, and something new.
        num_tokens: Of the reply.
        name: As the engine's answers have it.
        request: VLLM's.
    """

    chat: int
    prompt: list[int]
    num_tokens: int
    name: str
    request: object


@dataclass
class Traffic:
    """Random chats over a few shared openings."""

    engine: object
    random: random.Random
    counts: Counter = field(default_factory=Counter)
    answered: list[Asked] = field(default_factory=list)

    def words(self, low, high):
        return [self.random.randrange(2, 512) for _ in range(self.random.randint(low, high))]

    def begin(self, chat, history):
        """The next turn; its reply completes no block, so that all keys and values that are reused are a prefill's."""
        prompt = history + self.words(10, 160)
        room = CHUNK - len(prompt) % CHUNK
        if room < 8:
            prompt = prompt[: -(8 - room)]
        num_tokens = min(self.random.randint(2, 30), CHUNK - len(prompt) % CHUNK - 1)
        name = self.engine.submit(prompt, num_tokens=num_tokens)
        return Asked(chat, prompt, num_tokens, name, self.engine.request(name))

    def serve(self, num_requests):
        engine, openings = self.engine, [self.words(150, 600) for _ in range(3)]
        histories = [list(self.random.choice(openings)) for _ in range(10)]
        live = []
        while len(self.answered) + self.counts["aborted"] < num_requests:
            idle = sorted(set(range(len(histories))) - {each.chat for each in live})
            if len(live) < MAX_LIVE and self.random.random() < 0.3:
                chat = self.random.choice(idle)
                if len(histories[chat]) > MAX_HISTORY:
                    histories[chat] = list(self.random.choice(openings))
                live.append(self.begin(chat, histories[chat]))
            self.disturb()
            engine.step()
            for each in list(live):
                if self.look_at(each, histories):
                    live.remove(each)
        engine.run()
        for each in live:
            self.look_at(each, histories)

    def disturb(self):
        """Now and then another link, reads that fail or do not fail any more, and preemption of all that run."""
        chance = self.random.random()
        if chance < 0.004:
            self.engine.balance_link(1024, ratio=self.random.choice([0.3, 1.0, 3.0]))
        elif chance < 0.01:
            inject(self.engine, *(FAULTS if self.random.random() < 0.5 else ()))
        elif chance < 0.03 and not self.engine.side.has_work and not self.engine.scheduler.kv_holding_waiting:
            # vLLM preempts nobody who waits for a connector, or was restored and does not run yet
            self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            self.counts["resets"] += 1

    def look_at(self, asked, histories):
        """Whether a request has ended."""
        answer = self.engine.answers[asked.name]
        if answer.finish_reason is None:
            if self.random.random() < 0.004:
                self.engine.abort(asked.name)
                self.counts["aborted"] += 1
                return True
            return False
        self.answered.append(asked)
        histories[asked.chat] = [*asked.prompt, *answer.tokens]
        self.counts.update(record["outcome"] for record in answer.records)
        for record in answer.records:
            self.counts["recomputed cells"] += record["recomputed_cells"]
            self.counts["loaded cells"] += record["loaded_cells"]
            self.counts["after vLLM's own"] += record["start"] > 0
            self.counts["reads failed"] += bool(record["failed_loads"])
        self.counts["preemptions"] += asked.request.num_preemptions
        return True


def test_no_answer_is_from_a_wrong_state(folder, capsys):
    options = {"save_decode_kv": False, "cpu_bytes_to_use": 64 << 20, "restore_timeout_s": 2.0}
    arguments = {"max_num_batched_tokens": STEP_TOKENS, "num_gpu_blocks_override": 72, "max_model_len": 2048}
    with hybrid_engine(folder, options=options, **arguments) as engine:
        engine.evict()
        free_blocks = engine.free_blocks
        engine.keeps_kv = False
        inject(engine, *FAULTS)
        traffic = Traffic(engine, random.Random(SEED))
        traffic.serve(NUM_REQUESTS)
        inject(engine)
        engine.settle()
        assert engine.side.requests == {}
        assert not engine.side.has_work
        assert engine.worker.idle
        engine.evict()
        assert engine.free_blocks == free_blocks
        wrong, unlikely, num_tokens = [], 0, 0
        for each in traffic.answered:
            answer = engine.answers[each.name]
            found = num_unlikely(engine, each.prompt, answer.tokens)
            unlikely, num_tokens = unlikely + found, num_tokens + len(answer.tokens)
            if found > 1 + UNLIKELY_SHARE * len(answer.tokens):
                wrong.append((each.prompt, each.request.num_preemptions, answer.records))
    with capsys.disabled():
        print(f"\nsoak: seed {SEED}, {len(traffic.answered)} answered, {dict(traffic.counts)}")  # noqa: T201
    assert wrong == []
    # Of all replies together, where one of a single token counts too: vLLM's own had 7 of 10,049.
    assert unlikely <= 1 + num_tokens / 200
    met = ("done", "aborted", "preemptions", "recomputed cells", "loaded cells", "after vLLM's own", "reads failed")
    assert min(traffic.counts[each] for each in met) > 0, traffic.counts


def replies(engine, openings, params, *, evict, seed):
    """Chats of four turns, interleaved, each turn with the model's own reply to the one before; all replies."""
    chances = random.Random(seed)
    histories, replied = [list(each) for each in openings], []
    for _ in range(4):
        for history in histories:
            history += [chances.randrange(2, 512) for _ in range(chances.randint(20, 200))]
            replied.append(engine.ask(history, num_tokens=chances.randint(100, 300), params=params))
            history += replied[-1].tokens
        engine.ask([5] * 20, num_tokens=1, params={"cacheflow": "off"})  # vLLM tells workers of ends a step later
        if evict:
            engine.evict()
    return replied


def test_chats_that_are_forgotten_are_those_that_are_not(folder, capsys):
    """What decoding left is restored up to where vLLM would go on from, if it kept all states and forgot nothing.

    Keys, values and states that decode steps computed differ from a prefill's in rounding: so both take them.
    """
    arguments = {"num_gpu_blocks_override": 800, "prefix_cache_retention_interval": None, "max_model_len": 4096}
    num_chats = max(1, NUM_REQUESTS // 40)
    chances = random.Random(SEED)
    openings = [[chances.randrange(2, 512) for _ in range(chances.randint(150, 600))] for _ in range(num_chats)]
    with hybrid_engine(folder, **arguments) as engine:
        engine.evict()
        kept = replies(engine, openings, {"cacheflow": "off"}, evict=False, seed=SEED)
        engine.evict()
        again = replies(engine, openings, {"cacheflow": "load"}, evict=True, seed=SEED)
    records = [record for answer in again for record in answer.records]
    with capsys.disabled():
        print(f"\nchats: seed {SEED}, {len(again)} turns, {len(records)} restored")  # noqa: T201
    assert [answer.tokens for answer in again] == [answer.tokens for answer in kept]
    assert [record["outcome"] for record in records] == ["done"] * (3 * num_chats)
