"""A store that hangs, in a question, a write or a read: turns go on without it."""

import threading
from contextlib import closing

import pytest

from cacheflow.errors import RestoreCancelled
from support.embedded_cases import (
    answer,
    assert_same,
    make_engine,
    never_evicted,
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
