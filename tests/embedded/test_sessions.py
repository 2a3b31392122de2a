"""What a session promises besides the golden truth: what is found again and what must not be, cancel, bad prompts."""

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from cacheflow.embedded import Engine, EngineOptions, restorer
from cacheflow.embedded import turn as turn_module
from cacheflow.engine.compute_port import EngineComputePort
from cacheflow.engine.model import load_model
from cacheflow.engine.random_models import tiny_model
from cacheflow.engine.sampling import Sampling
from cacheflow.engine.saver import SaveReport
from cacheflow.errors import ConfigError, CostRangeError, ProfileError, PromptError, RestoreCancelled
from cacheflow.plan.problem import LinkCost
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.file import FileStore
from cacheflow.stores.keys import ObjectKind
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.opening import open_store
from cacheflow.stores.retention import Retention
from cacheflow.stores.throttled import ThrottledStore
from support.embedded_cases import (
    CHUNK,
    NEW_TOKENS,
    answer,
    assert_nothing_runs,
    assert_same,
    balanced_bytes_per_s,
    cost_table,
    make_engine,
    never_evicted,
    random_tokens,
    sampling_of,
    tiny,
    turns,
)
from support.store_kinds import SHARED, url_of
from support.store_objects import put

CAPACITY = 64 << 20
PROMPT = random_tokens(118)
QUESTION = random_tokens(9, seed=4)


@pytest.fixture
def store():
    with MemoryStore(capacity_bytes=CAPACITY) as store:
        yield store


@pytest.fixture
def model():
    return tiny("llama", "float32")


def fresh_answer(model, prompt, tokens, **options):
    """The answer of an engine that has never seen anything: turns one after the other, never evicted."""
    with MemoryStore(capacity_bytes=1 << 20) as store:
        session = make_engine(model, store, **options).session()
        for each in (prompt, tokens):
            if each:
                played = answer(session, each, save=False)
        return played


# What is found again


def test_a_partial_last_chunk_is_restored_whole(store, model):
    engine = make_engine(model, store, policy="load")
    first = engine.session()
    first.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert first.chunk_ends == (32, 64, 96, 118)
    again = engine.session(history=first.tokens)
    played = answer(again, QUESTION)
    assert played.reply.restored_tokens == 118
    assert played.reply.report.cells_KB == ("lll",) * 4
    assert_same(played, fresh_answer(model, PROMPT, QUESTION))


@pytest.mark.parametrize("kind", SHARED)
def test_an_engine_opens_its_store_by_url_and_closes_it(model_folder, tmp_path, request, kind):
    url = url_of(kind, request, tmp_path / "store")
    model = load_model(model_folder, device="cpu", dtype="float32")
    parts = {
        "store": url, "capacity_bytes": CAPACITY, "costs": cost_table(model), "link": LinkCost(bytes_per_s=1e9),
        "options": EngineOptions(chunk_tokens=CHUNK, policy="load", self_test=False),
    }  # fmt: skip
    with open_store(url, capacity_bytes=CAPACITY), Engine.open(model_folder, **parts) as engine:
        first = engine.session()
        first.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        with Engine.open(model_folder, **parts) as other:
            again = answer(other.session(history=first.tokens), QUESTION)
    assert again.reply.restored_tokens == 118
    assert_same(again, fresh_answer(model, PROMPT, QUESTION))
    assert put(engine.store, 1) == put(other.store, 1) == (PutOutcome.ERROR,)
    assert not [each for each in threading.enumerate() if each.name.startswith("cacheflow-store")]


def test_an_engine_that_cannot_be_opened_leaves_no_store_open(model_folder, monkeypatch):
    opened = []
    monkeypatch.setattr("cacheflow.embedded.engine.open_store", lambda *words, **how: opened.append(
        open_store(*words, **how)) or opened[0])  # fmt: skip
    costs = cost_table(tiny("llama", "bfloat16"))
    with pytest.raises(ProfileError, match="fingerprint"):
        Engine.open(
            model_folder, store="memory", capacity_bytes=CAPACITY, link=LinkCost(bytes_per_s=1e9),
            costs=replace(costs, identity=replace(costs.identity, fingerprint="0" * 32)),
        )  # fmt: skip
    assert put(opened[0], 1) == (PutOutcome.ERROR,)


def test_an_engine_leaves_a_store_open_that_it_did_not_open(store, model):
    with make_engine(model, store):
        pass
    assert put(store, 1) == (PutOutcome.STORED,)


def test_a_prompt_shorter_than_a_chunk_is_saved_and_restored(store, model):
    engine = make_engine(model, store, policy="load")
    session = engine.session()
    first = session.generate(PROMPT[:5], max_new_tokens=NEW_TOKENS)
    assert first.report is None
    assert first.saved == SaveReport(num_written=3)
    session.evict()
    played = answer(session, QUESTION)
    assert played.reply.restored_tokens == 5
    assert played.chunk_ends == (5, 5 + NEW_TOKENS + len(QUESTION))
    assert_same(played, fresh_answer(model, PROMPT[:5], QUESTION))


@pytest.mark.parametrize(("shared", "restored"), [(70, 64), (64, 64), (63, 32), (31, 0), (117, 96)])
def test_a_prompt_that_diverges_gets_the_chunks_it_shares(store, model, shared, restored):
    engine = make_engine(model, store)
    engine.session().generate(PROMPT, max_new_tokens=NEW_TOKENS)
    other = [*PROMPT[:shared], (PROMPT[shared] + 1) % 320, *random_tokens(50, seed=6)]
    played = answer(engine.session(), other)
    assert played.reply.restored_tokens == restored
    assert played.reply.suffix_tokens == len(other) - restored
    assert_same(played, fresh_answer(model, [], other))


def test_a_whole_prompt_sent_again_keeps_a_token_to_compute(store, model):
    engine = make_engine(model, store)
    expected = answer(engine.session(), PROMPT)
    played = answer(engine.session(), PROMPT)
    assert played.reply.restored_tokens == 96
    assert_same(played, expected)


def test_turns_with_partial_chunks_are_found_by_another_engine_over_the_same_files(tmp_path):
    """Everything but the files is new, as in another process: weights, fingerprint, store, engine."""
    reference = never_evicted(tiny("qwen2", "bfloat16"))
    history: list[int] = []
    for turn, tokens in enumerate(turns()):
        model = tiny_model("qwen2", dtype="bfloat16")
        with FileStore(tmp_path, capacity_bytes=CAPACITY, fsync=False) as store:
            session = make_engine(model, store).session(history=history)
            played = answer(session, tokens, sampling=sampling_of(turn))
        assert_same(played, reference[turn])
        before = reference[turn - 1].chunk_ends[-1] if turn else 0
        assert played.reply.restored_tokens == before
        assert played.reply.saved.num_written == 3 * (len(played.chunk_ends) - len(reference[turn - 1].chunk_ends)
                                                       if turn else len(played.chunk_ends))  # fmt: skip
        history = session.tokens


def test_warm_restores_before_the_turn_comes(store, model):
    reference = never_evicted(model)
    session = make_engine(model, store).session()
    assert session.warm() is None
    answer(session, turns()[0])
    assert session.warm() is None  # resident
    for turn, tokens in enumerate(turns()[1:], start=1):
        session.evict()
        report = session.warm()
        assert report is not None
        assert report.ttft_s is None
        assert session.chunk_ends == reference[turn - 1].chunk_ends
        assert torch.equal(session.resident_kv(), reference[turn - 1].kv)
        played = answer(session, tokens, sampling=sampling_of(turn))
        assert played.reply.report is None
        assert played.reply.resident_tokens == reference[turn - 1].chunk_ends[-1]
        assert played.reply.restored_tokens == 0
        assert_same(played, reference[turn])


def test_what_warm_did_not_find_is_prefilled_in_its_chunks_after_another_evict(store, model):
    reference = never_evicted(model)
    session = make_engine(model, store).session()
    for turn in range(3):
        answer(session, turns()[turn], sampling=sampling_of(turn), save=turn == 0)
    session.evict()
    assert session.warm() is not None
    assert session.chunk_ends == reference[0].chunk_ends  # the others were never saved
    session.evict()
    assert_same(answer(session, turns()[3], sampling=sampling_of(3)), reference[3])


def test_warm_finds_nothing_in_an_empty_store(store, model):
    session = make_engine(model, store).session(history=PROMPT)
    assert session.warm() is None
    assert session.resident_kv() is None


def test_a_resident_turn_touches_no_store(store, model):
    session = make_engine(model, store).session()
    answer(session, turns()[0])
    reads = sum(store.stats().get_outcomes.values())
    played = answer(session, turns()[1], sampling=sampling_of(1), save=False)
    assert played.reply.report is None
    assert played.reply.resident_tokens == 118
    assert played.reply.saved == SaveReport()
    assert sum(store.stats().get_outcomes.values()) == reads


def test_saving_later_and_twice(store, model):
    session = make_engine(model, store).session()
    assert session.save() == SaveReport()
    answer(session, PROMPT, save=False)
    assert store.stats().num_objects == 0
    assert session.save() == SaveReport(num_written=12)
    assert session.save() == SaveReport(num_existing=12)
    session.evict()
    assert session.save() == SaveReport()
    assert answer(session, QUESTION).reply.restored_tokens == 118


def test_a_save_with_a_timeout_does_not_wait_for_a_slow_link(model):
    with ThrottledStore(MemoryStore(capacity_bytes=CAPACITY), 1e3, throttle_puts=True) as store:
        session = make_engine(model, store).session()
        answer(session, PROMPT, save=False)
        assert session.save(timeout_s=0.02) == SaveReport(num_failed=12)
        with pytest.raises(ConfigError, match="timeout_s is -1"):
            session.save(timeout_s=-1)


@pytest.mark.parametrize(("deadline_s", "timed_out"), [(1e-9, True), (60.0, False)])
def test_a_reply_says_that_the_lookup_timed_out(store, model, deadline_s, timed_out):
    answer(make_engine(model, store).session(), PROMPT)
    session = make_engine(model, store, lookup_deadline_s=deadline_s).session()
    reply = answer(session, PROMPT).reply
    assert reply.lookup_timed_out is timed_out
    assert (reply.restored_tokens == 0) is timed_out


def test_evict_leaves_the_conversation_and_nothing_else(store, model):
    session = make_engine(model, store).session()
    first = answer(session, PROMPT)
    session.evict()
    session.evict()
    assert session.resident_kv() is None
    assert session.resident_tokens == 0
    assert session.chunk_ends == ()
    assert session.tokens == [*PROMPT, *first.reply.tokens]


def test_a_long_conversation_outgrows_its_buffer(store, model):
    """Buffers start at 1,024 tokens; growing keeps what is in them."""
    engine = make_engine(model, store, chunk_tokens=64)
    session, reference = engine.session(), engine.session()
    long = random_tokens(500)
    for tokens in (long, long, long[:200]):
        session.evict()
        kept, evicted = answer(reference, tokens, save=False), answer(session, tokens)
        assert_same(evicted, kept)
    assert session.resident_tokens > 1024


# What must not be found


def others(store):
    """Engines whose KV is not interchangeable with that of ``make_engine(llama, float32)``, by what differs."""
    llama = tiny("llama", "float32")
    make = partial(make_engine, store=store, policy="load")
    return {
        "chunk size": lambda: make(llama, chunk_tokens=16).session(),
        "layers per block": lambda: make(llama, layers_per_block=2).session(),
        "weights": lambda: make(tiny("llama", "float32", seed=1)).session(),
        "family": lambda: make(tiny("mistral", "float32")).session(),
        "dtype": lambda: make(tiny("llama", "bfloat16")).session(),
        "tenant": lambda: make(llama).session(salt="b"),
        "no tenant": lambda: make(llama).session(),
    }


@pytest.mark.parametrize("what", list(others(None)))
def test_what_is_not_interchangeable_does_not_hit(store, model, what):
    engine = make_engine(model, store, policy="load")
    engine.session(salt="a").generate(PROMPT, max_new_tokens=NEW_TOKENS)
    session = others(store)[what]()
    reply = session.generate([*PROMPT, *QUESTION], max_new_tokens=NEW_TOKENS)
    assert reply.restored_tokens == 0
    assert reply.report is None
    same = engine.session(salt="a").generate([*PROMPT, *QUESTION], max_new_tokens=NEW_TOKENS)
    assert same.restored_tokens == 118


def room_for(num_conversations, model):
    """Bytes of the records of so many conversations of 118 tokens."""
    chunk_bytes = model.shape.num_layers * (4096 + CHUNK * model.shape.kv_bytes_per_token_layer)
    return num_conversations * 4 * chunk_bytes


def test_a_prefix_that_is_kept_outlives_other_conversations(model):
    room_bytes = room_for(3, model)
    with MemoryStore(capacity_bytes=room_bytes) as store:
        engine = make_engine(model, store, policy="load")
        for kept in (True, False):
            session = engine.session()
            session.generate(random_tokens(118, seed=50 + kept), max_new_tokens=NEW_TOKENS)
            if kept:
                assert session.keep(600.0) == 118
            session.evict()
            for seed in range(20):
                engine.session().generate(random_tokens(118, seed=100 + 20 * kept + seed), max_new_tokens=NEW_TOKENS)
            restored = session.generate(QUESTION, max_new_tokens=NEW_TOKENS).restored_tokens
            assert restored == (118 if kept else 0)


def test_a_conversation_of_another_process_can_be_kept(model, store):
    first = make_engine(model, store).session(salt="a")
    first.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    assert make_engine(model, store).session(salt="a", history=first.tokens).keep(60.0) == 118
    assert make_engine(model, store).session(salt="b", history=first.tokens).keep(60.0) == 0
    assert make_engine(model, store).session(salt="a").keep(60.0) == 0


@pytest.mark.parametrize("keep_s", [0, -1.0, float("nan"), float("inf"), "120", True, None])
def test_nonsense_to_keep_is_refused(model, store, keep_s):
    with pytest.raises(ConfigError, match="keep_s is"):
        make_engine(model, store).session(history=PROMPT).keep(keep_s)


def test_a_tenants_sessions_cannot_throw_out_anothers(model):
    room_bytes = room_for(3, model)
    with MemoryStore(capacity_bytes=room_bytes, retention=Retention(tenant_quota=0.5)) as store:
        engine = make_engine(model, store, policy="load")
        quiet = engine.session(salt="quiet")
        quiet.generate(PROMPT, max_new_tokens=NEW_TOKENS)
        quiet.evict()
        for seed in range(20):
            engine.session(salt="noisy").generate(random_tokens(118, seed=200 + seed), max_new_tokens=NEW_TOKENS)
        assert quiet.generate(QUESTION, max_new_tokens=NEW_TOKENS).restored_tokens == 118


def test_another_number_of_threads_does_not_hit(store, model, torch_threads):
    make_engine(model, store).session().generate(PROMPT, max_new_tokens=NEW_TOKENS)
    torch.set_num_threads(2)
    session = make_engine(model, store).session()
    assert session.generate([*PROMPT, *QUESTION], max_new_tokens=1).restored_tokens == 0


def test_a_damaged_note_of_a_partial_chunk_costs_that_chunk_only(model):
    """The boundaries of an evicted session are its own: what is prefilled again gets the same bits."""
    notes = FaultRule(fault=Fault.CORRUPT, matches=lambda key: key.kind is ObjectKind.NEXT)
    with FaultyStore(MemoryStore(capacity_bytes=CAPACITY), FaultPlan(rules=(notes,))) as store:
        session = make_engine(model, store).session()
        for turn, tokens in enumerate(turns()):
            session.evict()
            played = answer(session, tokens, sampling=sampling_of(turn))
            assert played.reply.restored_tokens == (96 if turn else 0)
            assert_same(played, never_evicted(model)[turn])


# Cancel


class Tripwire:
    """Sets a cancel event at the n-th cell that compute restores."""

    def __init__(self, monkeypatch, at_cell):
        self.cancel, seen = threading.Event(), [0]
        wire = self

        class Compute(EngineComputePort):
            def recompute(self, tile, *, kv_only_top):
                super().recompute(tile, kv_only_top=kv_only_top)
                seen[0] += 1
                if seen[0] == at_cell:
                    wire.cancel.set()

        for module in (restorer, turn_module):
            monkeypatch.setattr(module, "EngineComputePort", Compute)


@pytest.mark.parametrize("at_cell", [1, 3])
@pytest.mark.parametrize("way", ["generate", "warm"])
def test_cancel_in_mid_restore_leaves_the_session_usable(model, monkeypatch, way, at_cell):
    reference = never_evicted(model)
    cell_bytes_per_s = balanced_bytes_per_s(model)
    with ThrottledStore(MemoryStore(capacity_bytes=CAPACITY), cell_bytes_per_s) as store:
        session = make_engine(model, store, policy="recompute").session()
        answer(session, turns()[0])
        session.evict()
        tokens, wire = list(session.tokens), Tripwire(monkeypatch, at_cell)
        generate = partial(session.generate, turns()[1], max_new_tokens=NEW_TOKENS)
        with pytest.raises(RestoreCancelled, match="cancelled after"):
            (session.warm if way == "warm" else generate)(cancel=wire.cancel)
        assert_nothing_runs()
        assert session.tokens == tokens
        assert session.resident_kv() is None
        assert_same(answer(session, turns()[1], sampling=sampling_of(1)), reference[1])


def test_cancel_while_only_the_link_works(model):
    """The second read sets the event, over a link that would take minutes."""
    cancel, seen = threading.Event(), []

    def cancel_at_second(key):
        seen.append(key)
        if len(seen) == 2:
            cancel.set()
        return False

    reads = FaultRule(fault=Fault.MISS, matches=lambda key: key.kind is ObjectKind.KV and cancel_at_second(key))
    memory = MemoryStore(capacity_bytes=CAPACITY)
    saver = make_engine(model, memory).session()
    answer(saver, turns()[0])
    with FaultyStore(ThrottledStore(memory, 1000.0), FaultPlan(rules=(reads,))) as store:
        session = make_engine(model, store, policy="load").session(history=saver.tokens)
        with pytest.raises(RestoreCancelled):
            session.warm(cancel=cancel)
        assert_nothing_runs()
        assert session.resident_kv() is None


@pytest.mark.parametrize("state", ["evicted", "resident", "new"])
def test_cancel_set_before_the_turn(store, model, state):
    reference = never_evicted(model)
    session, turn = make_engine(model, store).session(), 0
    if state != "new":
        answer(session, turns()[0])
        turn = 1
    if state == "evicted":
        session.evict()
    tokens, ends, cancel = list(session.tokens), session.chunk_ends, threading.Event()
    cancel.set()
    with pytest.raises(RestoreCancelled):
        session.generate(turns()[turn], max_new_tokens=NEW_TOKENS, cancel=cancel)
    assert_nothing_runs()
    assert session.tokens == tokens
    assert session.chunk_ends == ends
    assert_same(answer(session, turns()[turn], sampling=sampling_of(turn)), reference[turn])


# Bad prompts


@pytest.mark.parametrize(
    ("tokens", "max_new_tokens", "message"),
    [
        ([], 4, "0 new prompt tokens"),
        ([1], 0, "max_new_tokens 0"),
        ([1], -3, "max_new_tokens -3"),
        ([5, -1], 4, "0 or more .* got -1 to 5"),
        ([320], 4, "vocabulary is 0 to 319"),
        ([1] * 2045, 4, "2045 tokens plus 4 new ones exceeds the model's 2048"),
        ([1], 2048, "exceeds the model's 2048"),
    ],
)
@pytest.mark.parametrize("evicted", [False, True])
def test_a_bad_prompt_is_refused_and_nothing_is_lost(store, model, tokens, max_new_tokens, message, evicted):
    session = make_engine(model, store).session()
    with pytest.raises(PromptError, match=message):
        session.generate(tokens, max_new_tokens=max_new_tokens)
    first = answer(session, PROMPT)
    if evicted:
        session.evict()
    before = list(session.tokens)
    with pytest.raises(PromptError):
        session.generate(tokens, max_new_tokens=max_new_tokens)
    assert session.tokens == before
    assert before[-NEW_TOKENS:] == list(first.reply.tokens)
    assert_same(answer(session, QUESTION), fresh_answer(model, PROMPT, QUESTION))


def test_the_longest_conversation_is_served(store):
    model = tiny_model("llama", max_position_embeddings=128)
    session = make_engine(model, store).session()
    assert len(session.generate(random_tokens(120), max_new_tokens=8).tokens) == 8
    session.evict()
    with pytest.raises(PromptError, match="129 tokens plus 1 new ones exceeds the model's 128"):
        session.generate([1], max_new_tokens=1)


def test_a_history_that_is_too_long_or_wrong_is_refused(store, model):
    engine = make_engine(model, store)
    with pytest.raises(PromptError, match="exceeds the model's 2048"):
        engine.session(history=[1] * 2048).generate([1], max_new_tokens=1)
    with pytest.raises(PromptError, match="-7"):
        engine.session(history=[3, -7]).generate([1], max_new_tokens=1)


# Sampling


def test_sampling_is_seeded_and_the_same_after_a_restoration(store, model):
    def sampled(seed, *, evicted):
        session = engine.session(history=history)
        if not evicted:
            session.warm()
        how = Sampling(temperature=1.2, top_p=0.9, seed=seed)
        return session.generate(QUESTION, max_new_tokens=12, sampling=how, save=False).tokens

    engine = make_engine(model, store)
    saver = engine.session()
    answer(saver, PROMPT)
    history = saver.tokens
    assert sampled(1, evicted=True) == sampled(1, evicted=False)
    assert len({sampled(seed, evicted=True) for seed in range(4)}) > 1


def test_a_stop_token_ends_the_answer_and_stays_in_it(store, model):
    whole = answer(make_engine(model, store).session(), PROMPT).reply.tokens
    session = make_engine(model, store).session()
    reply = session.generate(PROMPT, max_new_tokens=50, stop_tokens=frozenset(whole[1:2]))
    assert reply.tokens[-1] == whole[1]
    assert len(reply.tokens) <= 2


# The engine's door


def test_the_model_is_tested_at_the_door(store, model, monkeypatch):
    seen = []
    monkeypatch.setattr("cacheflow.embedded.engine.self_test", seen.append)
    make_engine(model, store, self_test=True)
    assert seen == [model]


def test_the_self_test_passes_and_serves(store, model):
    played = answer(make_engine(model, store, self_test=True).session(), turns()[0])
    assert_same(played, never_evicted(model)[0])


def test_a_chunk_longer_than_any_measured_is_refused_at_the_door(store, model):
    link = LinkCost(bytes_per_s=1e9)
    costs = cost_table(model, chunk_tokens=CHUNK)
    with pytest.raises(CostRangeError, match=r"chunk_tokens 64 is outside the measured 1\.\.32"):
        Engine(model, store=store, costs=costs, link=link, options=EngineOptions(chunk_tokens=64, self_test=False))


@pytest.mark.parametrize("whose", ["an evicted session", "another process"])
def test_a_conversation_beyond_the_measured_range_is_prefilled_to_the_same_bits(store, model, caplog, whose):
    costs = cost_table(model, max_tokens=64)
    options = EngineOptions(chunk_tokens=CHUNK, self_test=False)
    engine = Engine(model, store=store, costs=costs, link=LinkCost(bytes_per_s=1e9), options=options)
    session = engine.session()
    answer(session, PROMPT)
    if whose == "an evicted session":
        session.evict()
    else:
        session = engine.session(history=session.tokens)
    played = answer(session, QUESTION)
    assert played.reply.report is None
    assert played.reply.restored_tokens == 0
    assert "118 cached tokens are prefilled, not restored: offset 96 is outside the measured 0..64" in caplog.text
    assert_same(played, fresh_answer(model, PROMPT, QUESTION))


def test_a_long_new_prompt_has_nothing_to_price_and_warns_of_nothing(store, model, caplog):
    costs = cost_table(model, max_tokens=64)
    options = EngineOptions(chunk_tokens=CHUNK, self_test=False)
    engine = Engine(model, store=store, costs=costs, link=LinkCost(bytes_per_s=1e9), options=options)
    assert_same(answer(engine.session(), PROMPT), fresh_answer(model, [], PROMPT))
    assert caplog.text == ""


def test_prompts_may_be_arrays_and_must_be_token_ids(store, model):
    engine = make_engine(model, store)
    session = engine.session(history=np.array(PROMPT))
    assert_same(answer(session, np.array(QUESTION)), fresh_answer(model, [], [*PROMPT, *QUESTION]))
    for bad in ([0.5], ["a"], [[1, 2]], np.zeros((2, 2), np.int64)):
        with pytest.raises(PromptError, match="one-dimensional integers"):
            session.generate(bad, max_new_tokens=1)
        with pytest.raises(PromptError, match="one-dimensional integers"):
            engine.session(history=bad)
    with pytest.raises(ConfigError, match="salt is 7, must be a string"):
        engine.session(salt=7)
