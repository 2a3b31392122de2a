"""One tenant (``cache_salt``) can neither read another's prefix nor find out that it is there."""

import logging

import pytest

pytest.importorskip("torch")

from cacheflow.stores.memory import MemoryStore
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.view import ScheduledRequest
from support.scheduler_cases import CHUNK, Case, Worker, tokens

pytestmark = pytest.mark.torch

OURS, THEIRS = "our very own salt", "their very own salt"


class NotingStore(MemoryStore):
    """Notes what it is asked, by kind and number of objects."""

    def __init__(self):
        super().__init__(capacity_bytes=1 << 28)
        self.asked = []

    def holds(self, keys):
        self.asked.append(("contains", len(keys), sum(super().holds(keys))))
        return super().holds(keys)

    def read_record(self, key, header, payload):
        self.asked.append(("read",))
        return super().read_record(key, header, payload)


def options(**changes):
    return ConnectorOptions(**{"chunk_tokens": CHUNK, "lookup_timeout_s": 20.0, "explain": True, **changes})


def seen_by(salt, *, prompt, saved_salt, **changes):
    """All that a tenant sees of a prompt which somebody has saved, and all that the store is asked for it."""
    case = Case(options=options(**changes), store=NotingStore())
    saved = tokens(6 * CHUNK + 1)
    case.arrive("earlier", saved, salt=saved_salt)
    assert case.matched("earlier") == 0, "asked and answered, so that what the store is asked from here on is of 'a'"
    case.hold("earlier", 6)
    case.side.finished("earlier")
    case.store.asked.clear()
    case.side.counts.take()
    case.arrive("a", saved if prompt == "saved" else tokens(6 * CHUNK + 1, seed=77), salt=salt)
    matched = case.matched("a")
    work = case.step(ScheduledRequest("a", 6 * CHUNK), busy=1)
    answer = case.side.finished("a")
    after = case.step()
    return {
        "matched": matched,
        "answer": answer,
        "counts": case.side.counts.take(),
        "num_saves": len(work.saves),
        "num_targets": len(work.targets),
        "keeps": after.keeps,
        "asked": case.store.asked,
    }


@pytest.mark.parametrize("salt", [OURS, ""])
def test_anothers_prompt_looks_like_one_that_nobody_has_saved(salt):
    """Not by wall time, which depends on the machine, but by what is done, of which time is made."""
    anothers = seen_by(salt, prompt="saved", saved_salt=THEIRS)
    nobodys = seen_by(salt, prompt="new", saved_salt=THEIRS)
    assert anothers == nobodys
    assert anothers["matched"] == 0
    assert anothers["num_saves"] == 6, "what another has is computed and saved once more"
    assert [found for _, _, found in anothers["asked"]] == [0] * len(anothers["asked"])


def test_a_tenants_own_prompt_is_found():
    """Or the test above could not fail."""
    own = seen_by(OURS, prompt="saved", saved_salt=OURS)
    assert own["matched"] == 6 * CHUNK
    assert own != seen_by(OURS, prompt="new", saved_salt=OURS)


def test_what_one_tenant_is_restoring_is_not_copied_or_waited_for_by_another():
    case = Case()
    prompt = case.saved_prompt(6 * CHUNK + 1, 6, salt=THEIRS)
    case.arrive("a", prompt, salt=THEIRS)
    assert case.begin("a") == 6 * CHUNK
    worker = Worker(case)
    worker.carry_out(case.step())
    assert case.side.has_work
    case.arrive("b", prompt, salt=OURS)
    assert case.matched("b") == 0
    worker.run()


def saves_of(case, request_id, num_chunks):
    return case.step(ScheduledRequest(request_id, num_chunks * CHUNK), busy=1).saves


def test_chunks_that_requests_of_a_tenant_share_are_saved_once_and_those_of_two_tenants_twice():
    case = Case()
    shared = tokens(3 * CHUNK)
    for name, salt, seed in (("a", OURS, 1), ("b", OURS, 2), ("c", THEIRS, 1)):
        case.arrive(name, [*shared, *tokens(CHUNK + 1, seed=seed)], salt=salt)
        assert case.matched(name) == 0
    names = {name: [save.chain_hash for save in saves_of(case, name, 4)] for name in "abc"}
    assert [len(each) for each in names.values()] == [4, 1, 4]
    assert len({each for chain in names.values() for each in chain}) == 9


def test_workers_are_told_whose_chunks_are_without_the_salt():
    case = Case(options=options(tenant_quota=0.5))
    prompt = case.saved_prompt(6 * CHUNK + 1, 6, salt=OURS)
    case.arrive("a", prompt, salt=OURS)
    case.arrive("b", prompt, salt=THEIRS)
    assert case.begin("a") == 6 * CHUNK
    assert case.matched("b") == 0
    work = case.step(ScheduledRequest("b", 2 * CHUNK), busy=1)
    (target,) = work.targets
    assert sorted(work.claims.values()) == sorted([target.chain_hashes, tuple(each.chain_hash for each in work.saves)])
    assert OURS not in repr(work)
    assert THEIRS not in repr(work)
    assert not Case().step(ScheduledRequest("b", 2 * CHUNK), busy=1).claims, "without a quota nobody is told"


def test_no_salt_is_logged_or_answered(caplog):
    with caplog.at_level(logging.DEBUG):
        case = Case(options=options(tenant_quota=0.5))
        prompt = case.saved_prompt(6 * CHUNK + 1, 6, salt=OURS, params={"keep": "never"})
        case.arrive("a", prompt, salt=OURS, params={"keep": 60})
        case.begin("a")
        Worker(case).run()
        answer = case.side.finished("a")
        case.step()
    assert answer["cacheflow"]
    assert caplog.records
    for text in (caplog.text, repr(answer), repr(case.side.counts.take()), *(key for key in case.store.census())):
        assert OURS not in text
