"""A store that hangs, in a question, a write or a read: turns go on without it."""

import threading
import time
from contextlib import closing, suppress

import pytest
import torch

from cacheflow.embedded import archive, concurrent
from cacheflow.errors import RestoreCancelled
from cacheflow.restore import reaper
from cacheflow.restore.options import ExecutorOptions
from cacheflow.restore.read_deadline import ReadDeadline
from cacheflow.stores.base import PutOutcome
from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
from cacheflow.stores.keys import ObjectKind
from cacheflow.stores.memory import MemoryStore
from support.embedded_cases import (
    answer,
    assert_same,
    make_engine,
    never_evicted,
    random_tokens,
    sampling_of,
    tiny,
    turns,
)
from support.gated_store import GatedStore
from support.waiting import eventually


@pytest.fixture
def model():
    return tiny("llama", "bfloat16")


@pytest.fixture
def store():
    store = GatedStore()
    with closing(store):
        yield store
        store.open_gates()


def lookup_threads():
    return {each for each in threading.enumerate() if each.name == "cacheflow-lookup"}


# Questions


def test_a_turn_goes_on_without_an_answer(store, model):
    session = make_engine(model, store, lookup_deadline_s=0.05).session()
    store.questions.clear()
    for turn in range(2):
        session.evict()
        played = answer(session, turns()[turn], sampling=sampling_of(turn), save=False)
        assert played.reply.lookup_timed_out
        assert_same(played, never_evicted(model)[turn])


def test_a_batch_takes_a_turn_without_an_answer(store, model):
    engine = make_engine(model, store, lookup_deadline_s=0.05)
    store.questions.clear()
    with engine.concurrent() as batch:
        reply = batch.submit(engine.session(), turns()[0], max_new_tokens=2, save=False).result(60)
    assert reply.lookup_timed_out


def test_what_was_found_before_the_store_hung_is_restored(model):
    class HangsInTheSecondQuestion(GatedStore):
        num_questions = -1  # while the turn before is played

        def holds(self, keys):
            if self.num_questions >= 0:
                self.num_questions += 1
            if self.num_questions == 2:
                self.questions.clear()
            return super().holds(keys)

    with closing(HangsInTheSecondQuestion()) as store:
        session = make_engine(model, store, policy="load", lookup_deadline_s=2.0).session()
        answer(session, turns()[0])
        session.evict()
        store.num_questions = 0
        played = answer(session, turns()[1], sampling=sampling_of(1), save=False)
        store.open_gates()
    assert played.reply.lookup_timed_out
    assert played.reply.restored_tokens == 96  # not the chunk after them, which ends with the turn
    assert_same(played, never_evicted(model)[1])


@pytest.mark.parametrize("what", ["generate", "warm"])
def test_a_cancel_ends_the_wait_for_an_answer(store, model, what):
    session = make_engine(model, store, lookup_deadline_s=3600.0).session(history=turns()[0])
    store.questions.clear()
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(RestoreCancelled, match="while the store was asked"):
        session.warm(cancel=cancel) if what == "warm" else session.generate([1], max_new_tokens=1, cancel=cancel)
    store.open_gates()
    assert session.tokens == list(turns()[0])
    assert len(session.generate([1], max_new_tokens=1).tokens) == 1


def test_the_threads_that_ask_end_with_the_engine(store, model):
    before = lookup_threads()
    engine = make_engine(model, store)
    engine.session().generate([1, 2], max_new_tokens=1)
    assert lookup_threads() - before
    engine.close()
    eventually(lambda: not lookup_threads() - before)


# Writes


def still_hangs(store):
    """No write has ended but by its deadline."""
    return {each for each, count in store.stats().put_outcomes.items() if count} == {PutOutcome.LATE}


def test_a_turn_is_answered_though_its_save_hangs_and_what_comes_late_is_right(store, model):
    reference = never_evicted(model)
    session = make_engine(model, store, policy="load", save_deadline_s=0.05).session()
    store.writes.clear()
    for turn in range(2):  # the second writes on in the buffer of the first
        played = answer(session, turns()[turn], sampling=sampling_of(turn))
        assert not played.reply.saved.complete
        assert_same(played, reference[turn])
    assert still_hangs(store)
    store.open_gates()
    eventually(lambda: store.stats().num_objects > 0)
    for turn in range(2, 4):
        session.evict()
        assert_same(answer(session, turns()[turn], sampling=sampling_of(turn)), reference[turn])


def test_a_batch_ends_though_a_save_hangs(store, model):
    engine = make_engine(model, store, save_deadline_s=0.05)
    store.writes.clear()
    with engine.concurrent() as batch:
        pending = batch.submit(engine.session(), turns()[0], max_new_tokens=2)
    assert not pending.result(0).saved.complete
    assert still_hangs(store)


def test_replies_do_not_wait_for_the_save_of_another(model):
    class HangsInOneWrite(GatedStore):
        num_writes = 0

        def write_record(self, key, parts, *, replace):
            self.num_writes += 1
            if self.num_writes > 1:
                return super(GatedStore, self).write_record(key, parts, replace=replace)
            return super().write_record(key, parts, replace=replace)

    with closing(HangsInOneWrite(writes=True)) as store:
        engine = make_engine(model, store, save_deadline_s=3600.0)
        with engine.concurrent() as batch:
            hangs = batch.submit(engine.session(), random_tokens(10, seed=1), max_new_tokens=2)
            eventually(lambda: store.num_writes > 0)
            unsaved = batch.submit(engine.session(), random_tokens(100, seed=2), max_new_tokens=2, save=False)
            saved = batch.submit(engine.session(), random_tokens(100, seed=3), max_new_tokens=2)
            assert len(unsaved.result(60).tokens) == 2
            assert saved.result(60).saved.complete
            assert not hangs.done()
            store.open_gates()
        assert hangs.result(0).saved.complete


def test_a_process_that_may_have_no_more_threads_replies(store, model, monkeypatch):
    monkeypatch.setattr(concurrent, "start_thread", lambda work, *, name, args: None)
    engine = make_engine(model, store)
    store.writes.clear()
    with engine.concurrent() as batch:
        reply = batch.submit(engine.session(), turns()[0], max_new_tokens=2).result(60)
    assert len(reply.tokens) == 2
    assert not reply.saved.complete


def test_notes_of_partial_chunks_that_are_saved_at_once_are_all_kept(model, monkeypatch):
    """Short prompts have one note for all of them."""
    monkeypatch.setattr(archive, "NOTE_TIMEOUT_S", 30.0)
    both = threading.Barrier(2)

    class ReadsNotesTogether(GatedStore):
        def read_record(self, key, header, payload):
            found = super().read_record(key, header, payload)
            if key.kind is ObjectKind.NEXT and not both.broken:
                with suppress(threading.BrokenBarrierError):
                    both.wait(0.2)  # until another one has read it too, where it may
            return found

    prompts = [random_tokens(length, seed=length) for length in (5, 9)]
    with closing(ReadsNotesTogether()) as store:
        engine = make_engine(model, store)
        with engine.concurrent() as batch:
            pending = [batch.submit(engine.session(), prompt, max_new_tokens=1) for prompt in prompts]
        assert all(each.result(0).saved.complete for each in pending)
        both.abort()
        for prompt in prompts:
            reply = engine.session(history=prompt).generate([1], max_new_tokens=1, save=False)
            assert reply.restored_tokens == len(prompt)


# Reads

HASTY = ExecutorOptions(deadline=ReadDeadline(floor_s=0.05))


def reapers():
    return {each for each in threading.enumerate() if each.name == "cacheflow-reaper"}


def test_a_turn_is_answered_though_its_reads_hang_and_what_comes_late_harms_nobody(store, model, monkeypatch, caplog):
    monkeypatch.setattr(reaper, "CLOSE_S", 0.05)
    reference, before = never_evicted(model), reapers()
    session = make_engine(model, store, policy="load", executor=HASTY).session()
    answer(session, turns()[0])
    for turn in range(1, 3):
        session.evict()
        store.reads.clear()
        played = answer(session, turns()[turn], sampling=sampling_of(turn), save=False)
        assert reapers() - before, "the reads still hang"
        assert "has not let go of the buffers" in caplog.text
        assert set(played.reply.report.failed_loads) == {"late"}
        store.open_gates()  # what was given up writes into its buffers now
        assert_same(played, reference[turn])
        assert torch.equal(session.resident_kv(), reference[turn].kv)
    eventually(lambda: not reapers() - before)
    session.evict()
    assert_same(answer(session, turns()[3], sampling=sampling_of(3)), reference[3])


def test_a_batch_ends_though_reads_hang(store, model, monkeypatch):
    monkeypatch.setattr(reaper, "CLOSE_S", 0.05)
    before = reapers()
    engine = make_engine(model, store, policy="load", executor=HASTY)
    session = engine.session()
    answer(session, turns()[0])
    session.evict()
    store.reads.clear()
    with engine.concurrent() as batch:
        pending = batch.submit(session, turns()[1], max_new_tokens=2, save=False)
    assert reapers() - before, "the reads still hang"
    assert len(pending.result(0).tokens) == 2
    store.open_gates()
    eventually(lambda: not reapers() - before)


def test_a_save_of_many_partial_chunks_waits_once_for_a_store_that_hangs_in_reads_and_takes_writes(model, monkeypatch):
    monkeypatch.setattr(archive, "NOTE_TIMEOUT_S", 0.2)
    with closing(FaultyStore(MemoryStore(capacity_bytes=64 << 20), FaultPlan())) as store:
        session = make_engine(model, store).session()
        for turn in range(20):
            session.generate(random_tokens(3, seed=turn), max_new_tokens=1, save=False)
        store.set_plan(FaultPlan(rules=(FaultRule(fault=Fault.HANG),)))
        began_s = time.monotonic()
        assert session.save().complete
        assert time.monotonic() - began_s < 2.0, "20 notes of 0.2 s would be 4 s"
