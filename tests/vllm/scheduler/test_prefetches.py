"""What workers are told to bring into the fastest tier: of requests that queue, and of announced prefixes."""

import time

import pytest

pytest.importorskip("torch")

from cacheflow.stores.base import PrefetchRequest
from cacheflow.stores.keys import RankKeys, chain_root
from cacheflow.stores.memory import MemoryStore
from cacheflow.stores.throttled import ThrottledStore
from cacheflow.stores.tiered import TieredStore
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.prefetches import ANNOUNCED_S, RENEW_S
from cacheflow.vllm.scheduler.request_params import MAX_ANNOUNCED_TOKENS, MAX_PREFIXES
from support.scheduler_cases import CHUNK, LAYERS, Case, Worker, tokens
from support.waiting import eventually

pytestmark = pytest.mark.torch

NUM_CHUNKS = 6
OURS, THEIRS = "our very own salt", "their very own salt"


def options(**changes):
    return ConnectorOptions(**{"chunk_tokens": CHUNK, "lookup_timeout_s": 20.0, "explain": True, **changes})


def tiered_case(*, salt="", num_prompts=1, clock_s=0.0, throttled=False, **changes):
    """A case whose store holds prompts in the slow tier alone; the last token of each is computed in any case."""
    fast, slow = (MemoryStore(capacity_bytes=1 << 28) for _ in range(2))
    tiers = TieredStore({"fast": fast, "slow": slow})
    store = ThrottledStore(tiers, 1e12) if throttled else tiers
    case = Case(options=options(**changes), store=store, now_s=clock_s)
    prompts = []
    for seed in range(num_prompts):
        prompt = tokens(NUM_CHUNKS * CHUNK + 1, seed=seed)
        case.arrive("earlier", prompt, salt=salt)
        assert case.matched("earlier") == 0
        case.hold("earlier", NUM_CHUNKS)
        names = case.side.requests["earlier"]
        assert tiers.drain(20.0)
        keys = [
            RankKeys().kv(names.name.namespace, each, (layer, layer + 1))
            for each in names.prefix.chain_hashes(0, NUM_CHUNKS)
            for layer in range(LAYERS)
        ]
        assert fast.delete(keys) == len(keys)
        case.side.finished("earlier")
        case.step()
        prompts.append(prompt)
    return case, prompts


def hashes_of(case, prompt, *, salt=""):
    """Chain hashes of a prompt's whole chunks."""
    case.arrive("named", prompt, salt=salt, params={"cacheflow": "off"})
    request = case.side.requests["named"]
    request.prefix.extend(prompt)
    case.side.finished("named")
    return request.prefix.chain_hashes(0, len(prompt) // CHUNK)


def answered(case, *names):
    """Wait until the store has said what it holds of these requests."""
    for name in names:
        question = case.side.requests[name].question
        lookups = [question.lookup, question.tier_lookup]
        eventually(lambda lookups=lookups: all(each is None or each.is_over for each in lookups))


def announced_is_answered(case):
    """Wait until the store has said what it holds of the only prefix that was announced."""
    (announced,) = case.side._prefetches._announced  # noqa: SLF001 -- nothing else says what it waits for
    eventually(lambda: announced.question.lookup.is_over and announced.question.tier_lookup.is_over)


def due(case, *, num_steps=5000):
    """Steps until workers are told something to bring or to keep; what they are told."""
    for _ in range(num_steps):
        work = case.step()
        if work.prefetches or work.keeps:
            return work
        time.sleep(0.001)
    raise AssertionError("nothing was due")


# Requests that queue


def test_a_request_that_queues_is_brought_and_one_that_begins_is_not():
    case, (prompt,) = tiered_case()
    case.arrive("a", prompt)
    answered(case, "a")
    (work,) = case.step().prefetches  # vLLM has no room for it, and did not ask
    assert work.chain_hashes == hashes_of(case, prompt)
    assert (work.within_s, work.keep_s, work.tenant) == (RENEW_S, 0.0, chain_root("").hex())
    assert not case.step().prefetches, "once"
    assert case.begin("a") == NUM_CHUNKS * CHUNK
    case.now_s += 2 * RENEW_S
    work, worker = case.step(), Worker(case)
    assert not work.prefetches
    worker.carry_out(work)
    worker.run()
    case.arrive("b", prompt)
    answered(case, "b")
    assert case.begin("b") == NUM_CHUNKS * CHUNK
    assert not case.step().prefetches, "it was begun in the step in which it came"


def test_over_a_throttled_link_it_is_brought_too():
    case, (prompt,) = tiered_case(throttled=True)
    case.arrive("a", prompt)
    answered(case, "a")
    (work,) = case.step().prefetches
    assert work.chain_hashes == hashes_of(case, prompt)


def test_one_that_waits_for_the_stores_answer_alone_does_not_queue():
    case, (prompt,) = tiered_case()
    case.arrive("a", prompt)
    answered(case, "a")
    case.side._prefetches.asked("a", answered=False)  # noqa: SLF001 -- as if the answer had come right after vLLM asked
    assert not case.step().prefetches
    (work,) = case.step().prefetches
    assert len(work.chain_hashes) == NUM_CHUNKS


def test_what_was_offered_and_finds_no_room_is_brought():
    case, (prompt,) = tiered_case()
    case.arrive("a", prompt)
    assert case.matched("a") == NUM_CHUNKS * CHUNK
    assert len(case.step().prefetches) == 1


def test_vllm_is_told_nothing_while_the_answer_is_out():
    case, (prompt,) = tiered_case()
    case.arrive("a", prompt)
    question = case.side.requests["a"].question
    question.lookup._future = type(question.lookup._future)()  # noqa: SLF001 -- a store that does not answer
    assert case.side.num_matched("a", 0) is None
    assert not case.step().prefetches
    assert not case.step().prefetches


def test_workers_are_reminded_while_it_queues_and_not_when_it_has_ended():
    case, (prompt,) = tiered_case()
    case.arrive("a", prompt)
    answered(case, "a")
    assert len(case.step().prefetches) == 1
    case.now_s += RENEW_S
    assert len(case.step().prefetches) == 1
    case.side.finished("a")
    case.now_s += RENEW_S
    assert not case.step().prefetches


def test_the_first_in_the_queue_go_first():
    case, prompts = tiered_case(num_prompts=4, prefetch_queued=2)
    for number, prompt in enumerate(prompts):
        case.arrive(f"r{number}", prompt)
    answered(case, "r0", "r1", "r2", "r3")
    wanted = [hashes_of(case, prompt) for prompt in prompts]
    assert [work.chain_hashes for work in case.step().prefetches] == wanted[:2]
    assert case.begin("r0")
    assert [work.chain_hashes for work in case.step().prefetches] == [wanted[2]]
    case.side.passed_over("r1", num_loaded=0)
    assert [work.chain_hashes for work in case.step().prefetches] == [wanted[3]]


@pytest.mark.parametrize(
    ("changes", "params", "num_chunks"),
    [
        ({}, None, 6),
        ({}, {"cacheflow": "load"}, 6),
        ({}, {"cacheflow": "recompute"}, 0),
        ({}, {"cacheflow": "off"}, 0),
        ({"policy": "recompute"}, None, 0),
        ({"prefetch_queued": 0}, None, 0),
        ({"max_load_tokens": 3 * CHUNK}, None, 3),
        ({}, {"max_load_tokens": 2 * CHUNK + 1}, 2),
    ],
)
def test_only_what_can_be_restored_is_brought(changes, params, num_chunks):
    case, (prompt,) = tiered_case(**changes)
    case.arrive("a", prompt, params=params)
    if case.side.requests["a"].question is not None:
        answered(case, "a")
    assert sum(len(work.chain_hashes) for work in case.step().prefetches) == num_chunks


def test_what_is_in_the_fastest_tier_or_in_a_store_without_tiers_is_not_brought():
    fast, slow = (MemoryStore(capacity_bytes=1 << 28) for _ in range(2))
    for store in (TieredStore({"fast": fast, "slow": slow}), MemoryStore(capacity_bytes=1 << 28)):
        case = Case(options=options(), store=store)
        prompt = case.saved_prompt(NUM_CHUNKS * CHUNK + 1, NUM_CHUNKS)
        case.arrive("a", prompt)
        answered(case, "a")
        assert case.matched("a") == NUM_CHUNKS * CHUNK
        assert not case.step().prefetches


def test_after_a_reset_nothing_of_before_is_brought():
    case, (prompt,) = tiered_case()
    case.arrive("a", prompt)
    case.arrive("b", tokens(CHUNK + 1, seed=9), params={"prefetch": [prompt]})
    answered(case, "a")
    announced_is_answered(case)
    case.side.reset()
    work = case.step()
    assert not work.prefetches
    assert not work.keeps


def test_it_is_planned_for_the_tier_in_which_it_is_by_then():
    case, (prompt,) = tiered_case()
    fast, slow = case.store.tiers
    fast.promise(bytes_per_s=1e12, latency_s=1e-5)
    slow.promise(bytes_per_s=1e2, latency_s=1e-5)
    case.arrive("a", prompt)
    assert case.matched("a") == 0, "from there it is better computed"
    (work,) = case.step().prefetches
    keys = [RankKeys().kv(work.namespace, each, (n, n + 1)) for each in work.chain_hashes for n in range(LAYERS)]
    case.store.prefetch([PrefetchRequest(each, 64) for each in keys], within_s=60.0)
    eventually(lambda: all(fast.store.contains(keys)))
    assert case.begin("a") == NUM_CHUNKS * CHUNK
    restoration = case.step()
    assert len(restoration.targets) == 1
    Worker(case).carry_out(restoration)


# Announced prefixes


@pytest.mark.parametrize(
    ("keep", "keep_s", "until_next"),
    [(None, 300.0, True), ("tool", 300.0, True), (90, 90.0, False), (0, 0.0, False)],
)
def test_what_was_announced_is_brought_and_kept(keep, keep_s, until_next):
    case, (prompt,) = tiered_case()
    params = {"prefetch": [[*prompt, *tokens(CHUNK, seed=5)]]} | ({} if keep is None else {"keep": keep})
    case.arrive("a", tokens(CHUNK + 1, seed=9), params=params)
    work = due(case)
    (prefetch,) = work.prefetches
    assert prefetch.chain_hashes == hashes_of(case, prompt), "as far as the store has it"
    assert (prefetch.within_s, prefetch.keep_s) == (keep_s or ANNOUNCED_S, keep_s)
    assert [(each.chain_hashes, each.keep_s) for each in work.keeps] == [(prefetch.chain_hashes, keep_s)] * bool(keep_s)
    assert "cacheflow_error" not in case.side.finished("a")
    case.step()
    case.arrive("b", prompt)
    case.side.finished("b")
    freed = [(each.chain_hashes, each.keep_s) for each in case.step().keeps]
    assert freed == [(prefetch.chain_hashes, 0.0)] * until_next, "until the next request on it"


def test_one_that_is_neither_saved_nor_restored_may_announce_others():
    case, (prompt,) = tiered_case()
    case.arrive("a", tokens(CHUNK + 1), params={"prefetch": [prompt], "keep": 60, "cacheflow": "off"})
    work = due(case)
    assert [each.keep_s for each in work.keeps] == [60.0]
    assert "cacheflow_error" not in (case.side.finished("a") or {})
    assert not case.step().keeps, "nothing of its own is kept"


def test_without_tiers_what_was_announced_is_kept():
    case = Case(options=options())
    prompt = case.saved_prompt(NUM_CHUNKS * CHUNK + 1, NUM_CHUNKS)
    case.arrive("a", tokens(CHUNK + 1, seed=9), params={"prefetch": [prompt]})
    work = due(case)
    assert not work.prefetches
    assert [len(each.chain_hashes) for each in work.keeps] == [NUM_CHUNKS]


def test_several_are_brought_in_the_order_announced_and_what_nobody_has_is_left_out():
    case, prompts = tiered_case(num_prompts=2)
    announced = [prompts[1], tokens(3 * CHUNK, seed=70), [], prompts[0][: 2 * CHUNK], [1, 2]]
    case.arrive("a", tokens(CHUNK + 1, seed=9), params={"prefetch": announced})
    brought = []
    while len(brought) < 2:
        brought += due(case).prefetches
    assert [work.chain_hashes for work in brought] == [
        hashes_of(case, prompts[1]), hashes_of(case, prompts[0])[:2],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        "abc", 5, True, {"a": 1}, [1, 2], [[1], 2], [["1"]], [[1.5]], [[-1]], [[None]], [[[1]]], [[1], [[2], 3]],
        [[True]], [[2**63]], [[2**70]], [[1]] * (MAX_PREFIXES + 1), [[1] * (MAX_ANNOUNCED_TOKENS + 1)],
    ],
)  # fmt: skip
def test_what_is_announced_wrongly_is_answered_and_nothing_is_brought(asked):
    case, _ = tiered_case()
    case.arrive("a", tokens(2 * CHUNK, seed=9), params={"prefetch": asked, "explain": True})
    for _ in range(5):
        work = case.step()
        assert not work.prefetches
        assert not work.keeps
    error = case.side.finished("a")["cacheflow_error"]
    assert error.startswith("prefetch is ")
    assert "must be a list of lists of token ids, 16 at most" in error
    assert len(error) < 300


def seen_by(salt, *, announced):
    """All that a tenant sees of what it announces, and all that workers are told for it."""
    case, (saved,) = tiered_case(salt=THEIRS)
    prompt = saved if announced == "saved" else tokens(len(saved), seed=77)
    asked, contains = [], case.store.contains
    case.store.contains = lambda keys: asked.append((len(keys), sum(contains(keys)))) or contains(keys)
    case.arrive("a", tokens(CHUNK + 1, seed=9), salt=salt, params={"prefetch": [prompt]})
    answered(case, "a")
    announced_is_answered(case)
    work = case.step()
    answer = case.side.finished("a")
    return {
        "answer": answer,
        "work": (work.prefetches, work.keeps),
        "asked": sorted(asked),
        "counts": case.side.counts.take(),
    }


@pytest.mark.parametrize("salt", [OURS, ""])
def test_anothers_prefix_looks_like_one_that_nobody_has_saved(salt):
    anothers, nobodys = seen_by(salt, announced="saved"), seen_by(salt, announced="new")
    assert anothers == nobodys
    assert anothers["work"] == ((), ())
    own = seen_by(THEIRS, announced="saved")
    assert len(own["work"][0]) == 1, "or this could not fail"
    assert THEIRS not in repr(own["work"])
