"""Many sessions at once: replies equal those of one at a time, whatever is shared, cancelled, refused or lost."""

from __future__ import annotations

import threading

import pytest

from cacheflow.errors import ConfigError, PromptError, RestoreCancelled, UnknownPolicyError
from cacheflow.policies.batch_registry import BATCH_POLICY_NAMES
from support.waiting import eventually

pytestmark = pytest.mark.torch

NEW = 4
LENGTHS = (70, 200, 33, 150)


def saved_histories(model, store, prompts, **options):
    """Tokens of conversations whose prefixes the store has, and the engine that saved them."""
    from support.embedded_cases import make_engine

    engine = make_engine(model, store, **options)
    histories = []
    for prompt in prompts:
        session = engine.session()
        session.generate(prompt, max_new_tokens=2)
        histories.append(session.tokens)
    return histories


def alone(model, store, histories, asked, **options):
    """Each conversation answered by itself, restored from the store, nothing saved."""
    from support.embedded_cases import make_engine

    engine = make_engine(model, store, **options)
    replies, kvs = [], []
    for history, tokens in zip(histories, asked, strict=True):
        session = engine.session(history=history)
        replies.append(session.generate(tokens, max_new_tokens=NEW, save=False))
        kvs.append(session.resident_kv().clone())
    return replies, kvs


def together(engine, histories, asked, *, save=False, answer=NEW, **options):
    sessions = [engine.session(history=history) for history in histories]
    with engine.concurrent(**options) as batch:
        tickets = [
            batch.submit(session, tokens, max_new_tokens=answer, save=save)
            for session, tokens in zip(sessions, asked, strict=True)
        ]
    return [ticket.result(0) for ticket in tickets], [session.resident_kv() for session in sessions]


def assert_equal_replies(replies, kvs, expected, expected_kvs):
    import torch

    for reply, kv, other, other_kv in zip(replies, kvs, expected, expected_kvs, strict=True):
        assert reply.tokens == other.tokens
        assert torch.equal(reply.logits, other.logits)
        assert torch.equal(kv, other_kv)
        assert reply.restored_tokens == other.restored_tokens
        assert len(reply.itl_s) == len(reply.tokens) - 1


def prompts_of(lengths, *, common=0):
    from support.embedded_cases import random_tokens

    head = random_tokens(common, seed=99)
    return [[*head, *random_tokens(length - common, seed=20 + index)] for index, length in enumerate(lengths)]


def asked_of(count):
    from support.embedded_cases import random_tokens

    return [random_tokens(9 + 5 * index, seed=50 + index) for index in range(count)]


@pytest.fixture
def store():
    from cacheflow.stores.memory import MemoryStore

    with MemoryStore(capacity_bytes=1 << 26) as store:
        yield store


def assert_no_threads():
    names = ("cacheflow-io", "cacheflow-compute", "cacheflow-late", "cacheflow-save")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


@pytest.mark.parametrize("objective", BATCH_POLICY_NAMES)
def test_every_policy_gives_the_replies_of_one_at_a_time(store, objective):
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of(LENGTHS))
    asked = asked_of(4)
    expected = alone(model, store, histories, asked)
    replies, kvs = together(make_engine(model, store), histories, asked, objective=objective)
    assert_equal_replies(replies, kvs, *expected)
    assert all(reply.report is not None for reply in replies)
    assert_no_threads()


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3_moe", "bfloat16"), ("mistral", "bfloat16"), ("qwen2", "float32")]
)
@pytest.mark.parametrize("policy", ["cake", "cacheflow", "layerwise_load"])
def test_other_models_and_restore_policies_are_exact_too(store, family, dtype, policy):
    from support.embedded_cases import make_engine, tiny

    model = tiny(family, dtype)
    histories = saved_histories(model, store, prompts_of(LENGTHS, common=32))
    asked = asked_of(4)
    expected = alone(model, store, histories, asked)
    replies, kvs = together(make_engine(model, store, policy=policy), histories, asked)
    assert_equal_replies(replies, kvs, *expected)


def test_a_shared_prefix_is_read_or_recomputed_once(store):
    from support.embedded_cases import CHUNK, make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((200, 170, 230), common=4 * CHUNK))
    asked = asked_of(3)
    expected = alone(model, store, histories, asked)
    replies, kvs = together(make_engine(model, store), histories, asked)
    assert_equal_replies(replies, kvs, *expected)
    shared = [reply.shared_tokens for reply in replies]
    assert shared[0] == 0 or shared.count(0) == 1
    assert sorted(shared)[1:] == [4 * CHUNK] * 2
    for reply, other in zip(replies, expected[0], strict=True):
        assert len(reply.report.cells_KB) == len(other.report.cells_KB) - reply.shared_tokens // CHUNK


def test_the_same_prompt_twice_shares_all_of_its_prefix(store):
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((150,))) * 2
    asked = asked_of(1) * 2
    expected = alone(model, store, histories, asked)
    replies, kvs = together(make_engine(model, store), histories, asked)
    assert_equal_replies(replies, kvs, *expected)
    assert sorted(reply.shared_tokens for reply in replies) == [0, replies[0].restored_tokens]


def test_a_follower_is_planned_anew_when_its_leader_is_cancelled(store):
    from cacheflow.stores.throttled import ThrottledStore
    from support.embedded_cases import CHUNK, make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((200, 170, 180), common=4 * CHUNK))
    asked = asked_of(3)
    expected, expected_kvs = alone(model, store, histories, asked)
    slow = ThrottledStore(store, 2e5)
    engine = make_engine(model, slow, policy="load")
    sessions = [engine.session(history=history) for history in histories]
    with engine.concurrent(objective="fcfs") as batch:
        tickets = [
            batch.submit(session, tokens, max_new_tokens=NEW, save=False)
            for session, tokens in zip(sessions, asked, strict=True)
        ]
        eventually(lambda: slow.stats().read_bytes > 0)
        tickets[0].cancel()
        with pytest.raises(RestoreCancelled, match="cancelled after"):
            tickets[0].result(30)
        engine.store.set_bandwidth(1e9)
        replies = [ticket.result(60) for ticket in tickets[1:]]
    assert sessions[0].tokens == histories[0]
    kvs = [session.resident_kv() for session in sessions[1:]]
    assert_equal_replies(replies, kvs, expected[1:], expected_kvs[1:])
    assert [reply.shared_tokens for reply in replies] == [0, 4 * CHUNK]
    assert_no_threads()


def test_new_resident_and_evicted_conversations_mix(store):
    from support.embedded_cases import make_engine, random_tokens, tiny

    model = tiny()
    (history,) = saved_histories(model, store, prompts_of((120,)))
    engine, reference = make_engine(model, store), make_engine(model, store)
    first, asked = random_tokens(80, seed=7), asked_of(3)

    def sessions_of(each):
        resident = each.session()
        resident.generate(first, max_new_tokens=2, save=False)
        return [each.session(history=history), resident, each.session()]

    expected_sessions, sessions = sessions_of(reference), sessions_of(engine)
    expected = [
        session.generate(tokens, max_new_tokens=NEW, save=False)
        for session, tokens in zip(expected_sessions, asked, strict=True)
    ]
    with engine.concurrent() as batch:
        tickets = [
            batch.submit(session, tokens, max_new_tokens=NEW, save=False)
            for session, tokens in zip(sessions, asked, strict=True)
        ]
        replies = [ticket.result(60) for ticket in tickets]
    assert_equal_replies(
        replies,
        [session.resident_kv() for session in sessions],
        expected,
        [session.resident_kv() for session in expected_sessions],
    )
    assert [reply.report is None for reply in replies] == [False, True, True]
    assert [reply.resident_tokens for reply in replies] == [0, 80, 0]


def test_what_a_turn_prefilled_is_saved_and_the_next_turn_goes_on(store):
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((70, 100)))
    asked = asked_of(2)
    engine = make_engine(model, store)
    sessions = [engine.session(history=history) for history in histories]
    for _ in range(2):
        with engine.concurrent() as batch:
            tickets = [batch.submit(s, t, max_new_tokens=2) for s, t in zip(sessions, asked, strict=True)]
            replies = [ticket.result(60) for ticket in tickets]
        assert all(reply.saved.complete for reply in replies)
        assert all(reply.saved.num_written > 0 for reply in replies)
        for session in sessions:
            session.evict()
    assert all(reply.restored_tokens >= 70 for reply in replies)


def test_requests_wait_for_memory_and_all_are_served(store):
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of(LENGTHS))
    asked = asked_of(4)
    expected = alone(model, store, histories, asked)
    replies, kvs = together(make_engine(model, store), histories, asked, kv_capacity_tokens=260)
    assert_equal_replies(replies, kvs, *expected)


def test_a_deadline_counts_from_the_submission_not_from_the_end_of_the_lookup(store):
    from dataclasses import replace

    from cacheflow.embedded.turn import Turn
    from support.embedded_cases import make_engine, tiny

    engine = make_engine(tiny(), store)
    session = engine.session()
    asked = session.ask([1, 2, 3], max_new_tokens=1)
    long_ago = replace(asked, started_s=asked.started_s - 45)
    assert Turn(engine, session, long_ago).request(first_token_within_s=60.0).first_token_within_s <= 15
    assert Turn(engine, session, long_ago).request().first_token_within_s is None


def test_what_can_never_fit_is_refused_with_the_numbers(store):
    from support.embedded_cases import make_engine, tiny

    engine = make_engine(tiny(), store)
    with engine.concurrent(kv_capacity_tokens=64) as batch:
        session = engine.session()
        with pytest.raises(PromptError, match="84 tokens, memory holds 64"):
            batch.submit(session, list(range(80)), max_new_tokens=4)
        assert len(batch.submit(session, list(range(20)), max_new_tokens=4).result(30).tokens) == 4


def test_a_conversation_that_fits_is_served_whatever_room_its_buffer_has(store):
    from support.embedded_cases import make_engine, tiny

    (first,), (asked,) = prompts_of((100,)), asked_of(1)
    engine = make_engine(tiny(), store)
    reference, session = engine.session(), engine.session()
    for each in (reference, session):
        each.generate(first, max_new_tokens=2, save=False)
    expected = reference.generate(asked, max_new_tokens=NEW, save=False)
    assert session.kv_capacity_tokens == 1024
    with engine.concurrent(kv_capacity_tokens=400) as batch:
        reply = batch.submit(session, asked, max_new_tokens=NEW, save=False).result(60)
    assert reply.resident_tokens == 100  # what is in memory moved to a buffer of its length
    assert session.kv_capacity_tokens == 102 + len(asked) + NEW
    assert_equal_replies([reply], [session.resident_kv()], [expected], [reference.resident_kv()])


@pytest.mark.parametrize("options", [{"recompute_budget_ms": 1.0}, {"itl_slo_ms": 5.0}])
def test_an_answer_goes_on_while_others_restore(store, options, monkeypatch):
    """With a budget of about a cell, tokens come between the cells of a long restoration; every one is right."""
    from cacheflow.embedded.turn import Turn
    from cacheflow.engine.compute_port import EngineComputePort
    from cacheflow.stores.throttled import ThrottledStore
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((40, 900)))
    asked = asked_of(2)
    engine = make_engine(model, ThrottledStore(store, 1e4), policy="cake")
    sessions = [engine.session(history=history) for history in histories]
    reference = make_engine(model, store).session(history=histories[0])
    expected = reference.generate(asked[0], max_new_tokens=60, save=False)
    done = []
    noting(monkeypatch, Turn, "step", done)
    noting(monkeypatch, EngineComputePort, "recompute", done)
    with engine.concurrent(objective="fcfs", **options) as batch:
        answering = batch.submit(sessions[0], asked[0], max_new_tokens=60, save=False)
        answering.first_token(60)
        restoring = batch.submit(sessions[1], asked[1], max_new_tokens=1, save=False)
        reply = answering.result(60)
        restoring.result(60)
    assert reply.tokens == expected.tokens
    assert len(reply.itl_s) == 59
    cells = [index for index, what in enumerate(done) if what == "recompute"]
    assert done[cells[0] : cells[-1]].count("step") >= 10, "decoding stood still while the other request was restored"


def noting(monkeypatch, owner, name, done):
    """Add a method's name to ``done`` whenever it is called."""
    method = getattr(owner, name)

    def noted(self, *args, **kwargs):
        done.append(name)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, noted)


def test_cancelling_ends_one_request_only(store):
    from cacheflow.stores.throttled import ThrottledStore
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((200, 90)))
    asked = asked_of(2)
    expected, expected_kvs = alone(model, store, histories, asked)
    slow = ThrottledStore(store, 1e5)
    engine = make_engine(model, slow, policy="load")
    sessions = [engine.session(history=history) for history in histories]
    with engine.concurrent(objective="fcfs") as batch:
        tickets = [batch.submit(s, t, max_new_tokens=NEW, save=False) for s, t in zip(sessions, asked, strict=True)]
        with pytest.raises(ConfigError, match="has a request in the batch"):
            batch.submit(sessions[0], asked[0], max_new_tokens=1)
        tickets[0].cancel()
        with pytest.raises(RestoreCancelled):
            tickets[0].result(30)
        slow.set_bandwidth(1e9)
        reply = tickets[1].result(60)
        again = batch.submit(sessions[0], asked[0], max_new_tokens=NEW, save=False).result(60)
    kvs = [session.resident_kv() for session in sessions]
    assert_equal_replies([again, reply], kvs, expected, expected_kvs)


def test_closing_early_gives_up_what_is_left(store):
    from cacheflow.stores.throttled import ThrottledStore
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of((200, 90)))
    slow = ThrottledStore(store, 1e4)
    engine = make_engine(model, slow, policy="load")
    sessions = [engine.session(history=history) for history in histories]
    batch = engine.concurrent()
    tickets = [batch.submit(s, [1, 2, 3], max_new_tokens=1) for s in sessions]
    batch.close()
    batch.close()
    for ticket in tickets:
        assert ticket.done()
        with pytest.raises(RestoreCancelled):
            ticket.result(0)
    with pytest.raises(ConfigError, match="closed"):
        batch.submit(sessions[0], [1], max_new_tokens=1)
    assert_no_threads()
    slow.set_bandwidth(1e9)
    assert len(sessions[0].generate([5, 6], max_new_tokens=1).tokens) == 1


def test_lost_and_damaged_objects_cost_time_only(store):
    from cacheflow.stores.faults import Fault, FaultPlan, FaultRule, FaultyStore
    from cacheflow.stores.keys import ObjectKind
    from support.embedded_cases import make_engine, tiny

    model = tiny()
    histories = saved_histories(model, store, prompts_of(LENGTHS, common=32))
    asked = asked_of(4)
    expected = alone(model, store, histories, asked)

    is_kv = {"matches": lambda key: key.kind is ObjectKind.KV}
    rules = tuple(
        FaultRule(fault=fault, probability=0.15, **is_kv) for fault in (Fault.MISS, Fault.CORRUPT, Fault.ERROR)
    )
    engine = make_engine(model, FaultyStore(store, FaultPlan(rules=rules, seed=4)))
    replies, kvs = together(engine, histories, asked)
    assert_equal_replies(replies, kvs, *expected)
    assert sum(sum(reply.report.failed_loads.values()) for reply in replies) > 0


def test_one_batch_at_a_time_and_bad_options_are_refused(store):
    from support.embedded_cases import make_engine, tiny

    engine = make_engine(tiny(), store)
    with engine.concurrent(), pytest.raises(ConfigError, match="open batch"):
        engine.concurrent()
    with engine.concurrent():
        pass
    with pytest.raises(UnknownPolicyError, match="mean_ttft"):
        engine.concurrent(objective="fastest")
    for bad in ("starvation_s", "recompute_budget_ms", "itl_slo_ms", "kv_capacity_tokens"):
        with pytest.raises(ConfigError, match=bad):
            engine.concurrent(**{bad: 0})
